//! One file a command: takes the settings, asks the catalog and the walls, and shows what came out.
mod batches;
mod cancel;
mod doctor;
mod down;
mod fetch;
mod licence;
mod migrate;
mod models;
mod reconcile;
mod serve;
mod status;
mod submit;
mod up;
mod verify;
mod watch;

use anyhow::{Context, Result};
use schema::{BatchProgress, CatalogError, ModelName, PgCatalog};

use crate::cli::{Cli, Command};
use crate::config::Settings;
use crate::logging;
use crate::terminal::Terminal;

/// A person's command asks one thing after the other.
const CONNECTIONS: u32 = 2;

/// Whether a command did all it was asked to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It did.
    Done,
    /// It ended in order, but what it reports is not what one hopes for, such as discarded jobs.
    Incomplete,
}

/// Runs the command. Must be awaited on the main thread, because `up` starts child processes that end with it.
///
/// # Errors
/// Whatever keeps the command from doing its work, for people to read.
pub async fn run(cli: Cli) -> Result<Outcome> {
    let Cli { global, command } = cli;
    let serves = matches!(command, Command::Up(_) | Command::Serve(_));
    logging::start(global.log.as_deref(), if serves { "info" } else { "warn" }, global.log_format)?;
    let terminal = Terminal { json: global.json };
    let settings = Settings::resolve(global)?;
    let done = match command {
        Command::Up(arguments) => up::run(arguments, &settings, terminal).await,
        Command::Down => down::run(&settings, terminal).await,
        Command::Serve(arguments) => serve::run(arguments, &settings).await,
        Command::Migrate(arguments) => migrate::run(&arguments, &settings, terminal).await,
        Command::Models(command) => models::run(command, &settings, terminal).await,
        Command::Licence(command) => licence::run(command, &settings, terminal).await,
        Command::Submit(arguments) => submit::run(*arguments, &settings, terminal).await,
        Command::Batches(arguments) => batches::run(&arguments, &settings, terminal).await,
        Command::Status(arguments) => status::run(&arguments, &settings, terminal).await,
        Command::Watch(arguments) => return watch::run(&arguments, &settings, terminal).await,
        Command::Cancel(arguments) => cancel::run(&arguments, &settings, terminal).await,
        Command::Fetch(arguments) => return fetch::run(arguments, &settings, terminal).await,
        Command::Verify(arguments) => return verify::run(&arguments, &settings, terminal).await,
        Command::Doctor => return doctor::run(&settings, terminal).await,
        Command::Reconcile(arguments) => return reconcile::run(&arguments, &settings, terminal).await,
    };
    done.map(|()| Outcome::Done)
}

async fn connect(settings: &Settings) -> Result<PgCatalog> {
    let connected = PgCatalog::connect(&settings.database_url()?, CONNECTIONS).await;
    match connected {
        // Its environment file is there, so it was killed and could not remove it.
        Err(error @ CatalogError::Unreachable(_)) if settings.uses_local_database() => {
            Err(anyhow::Error::from(error).context(format!(
                "the local stack with its data in {} does not answer\nhint: start it again with `darkroom up`",
                settings.data_dir().display()
            )))
        }
        connected => Ok(connected?),
    }
}

/// The progress of the batch that a person means by `text`.
async fn batch(catalog: &PgCatalog, text: &str) -> Result<BatchProgress> {
    let batch_id = catalog.resolve_batch(text).await?;
    catalog.batch_progress(batch_id).await?.with_context(|| format!("batch {batch_id} is gone"))
}

fn no_such_model(model: &ModelName) -> anyhow::Error {
    anyhow::anyhow!("no model is called `{model}`\nhint: `darkroom models list` shows those there are")
}

/// `1 job`, `2 jobs`.
fn counted(count: u64, thing: &str) -> String {
    if count == 1 { format!("1 {thing}") } else { format!("{count} {thing}s") }
}

/// A count from the catalog, which is never negative.
fn unsigned(count: i64) -> u64 {
    count.unsigned_abs()
}

/// `1 h 02 m`, `3 m 04 s`, `5.6 s`.
fn duration(seconds: f64) -> String {
    let whole = seconds.max(0.0).round();
    let (hours, minutes) = ((whole / 3600.0).floor(), (whole / 60.0).floor() % 60.0);
    if hours >= 1.0 {
        format!("{hours} h {minutes:02} m")
    } else if minutes >= 1.0 {
        format!("{minutes} m {:02} s", whole % 60.0)
    } else {
        format!("{:.1} s", seconds.max(0.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_read_counts_and_durations() {
        assert_eq!(counted(1, "job"), "1 job");
        assert_eq!(counted(0, "job"), "0 jobs");
        let durations = [-1.0, 0.04, 59.4, 59.9, 61.0, 3599.0, 3660.0].map(duration);
        assert_eq!(durations, ["0.0 s", "0.0 s", "59.4 s", "1 m 00 s", "1 m 01 s", "59 m 59 s", "1 h 01 m"]);
    }
}
