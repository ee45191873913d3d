//! Why the fleet did not end its work: taken while everything still runs, since afterwards nobody can be asked.

use std::fmt::Write;
use std::path::Path;

use sqlx::PgPool;

use super::crew::Crew;
use crate::process::tail;

/// Of each log.
const QUOTED_LINES: usize = 12;
/// Where the broker writes what happens to it, below the stack's folder.
const BROKER_LOG: &str = "rabbitmq/log/node.log";

/// Jobs that are not final, the broker's queues, and the last words of everyone.
pub async fn take(crew: &Crew) -> String {
    let mut text =
        String::from("jobs that are not final, by state, band, whether published, and the oldest:\n");
    match open_jobs(crew.fleet.pool()).await {
        Ok(rows) => rows.iter().for_each(|row| {
            let _ = writeln!(text, "  {row}");
        }),
        Err(error) => {
            let _ = writeln!(text, "  the database does not tell: {error}");
        }
    }
    let columns = ["list_queues", "name", "state", "messages_ready", "messages_unacknowledged", "consumers"];
    let queues = crew.fleet.servers().try_rabbitmqctl(&[&["--quiet"], &columns[..]].concat());
    let _ = writeln!(text, "queues: name, state, ready, unacknowledged, consumers\n{}", indented(&queues));
    for (name, log) in crew.last_words().await {
        let _ = writeln!(text, "{name}:\n{}", indented(&tail(&log, QUOTED_LINES)));
    }
    let log = crew.fleet.servers().data_dir().join(BROKER_LOG);
    let _ = writeln!(text, "the broker:\n{}", indented(&tail(&read(&log), QUOTED_LINES)));
    text
}

async fn open_jobs(pool: &PgPool) -> Result<Vec<String>, sqlx::Error> {
    let sql = "SELECT format('%s %s, %s, limit %s: %s jobs, oldest %s s', state, band,
                             CASE WHEN published_at IS NULL THEN 'unpublished' ELSE 'published' END,
                             coalesce(microbatch_limit::text, 'none'), count(*),
                             round(extract(epoch FROM now() - min(coalesce(published_at, created_at)))))
               FROM jobs WHERE finalized_at IS NULL
               GROUP BY state, band, published_at IS NULL, microbatch_limit ORDER BY 1";
    sqlx::query_scalar(sql).fetch_all(pool).await
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| format!("{}: {error}", path.display()))
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("  | {line}\n")).collect()
}
