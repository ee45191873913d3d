//! The chart of job states is one chart: in Rust, in the SQL enums, in the SQL table, in the pages, and in what
//! Postgres lets through.

use std::fmt::Display;

use schema::{
    AttemptOutcome, ErrorClass, JobId, JobState, LeaseReturn, NoiseScheduler, ObjectFaultKind, PriorityBand,
    TRANSITIONS,
};

use crate::support::{Fixture, completed, failure, rule_of};

fn words<T: Display>(all: &[T]) -> Vec<String> {
    all.iter().map(ToString::to_string).collect()
}

#[tokio::test]
async fn sql_enums_list_the_words_of_the_rust_enums() {
    let fixture = Fixture::new().await;
    for (sql_type, words) in [
        (JobState::SQL_TYPE, words(JobState::ALL)),
        (AttemptOutcome::SQL_TYPE, words(AttemptOutcome::ALL)),
        (ErrorClass::SQL_TYPE, words(ErrorClass::ALL)),
        (PriorityBand::SQL_TYPE, words(PriorityBand::ALL)),
        (NoiseScheduler::SQL_TYPE, words(NoiseScheduler::ALL)),
        (ObjectFaultKind::SQL_TYPE, words(ObjectFaultKind::ALL)),
    ] {
        let sql = format!("SELECT unnest(enum_range(NULL::{sql_type}))::text");
        let in_sql: Vec<String> = sqlx::query_scalar(&sql).fetch_all(&fixture.pool).await.unwrap();
        assert_eq!(in_sql, words, "{sql_type}");
    }
    let of_ours = "SELECT count(DISTINCT enumtypid) FROM pg_enum";
    assert_eq!(fixture.count(of_ours).await, 6, "every SQL enum is compared above");
}

#[tokio::test]
async fn the_sql_table_holds_the_chart() {
    let fixture = Fixture::new().await;
    let sql = "SELECT from_state, to_state FROM job_state_transitions ORDER BY 1, 2";
    let in_sql: Vec<(JobState, JobState)> = sqlx::query_as(sql).fetch_all(&fixture.pool).await.unwrap();
    let mut chart = TRANSITIONS.to_vec();
    chart.sort();
    assert_eq!(in_sql, chart);
}

/// The moves in the table between the `job-states` marks of a page.
fn charted(page: &str) -> Option<Vec<(JobState, JobState)>> {
    let (_, rest) = page.split_once("<!-- job-states -->")?;
    let (table, _) = rest.split_once("<!-- /job-states -->").expect("the mark is closed");
    let rows = table.lines().filter(|line| line.starts_with('|')).skip(2);
    let mut chart: Vec<_> = rows
        .map(|row| {
            let mut cells = row.split('|').skip(1).map(|cell| cell.trim().trim_matches('`').parse().unwrap());
            (cells.next().unwrap(), cells.next().unwrap())
        })
        .collect();
    chart.sort();
    Some(chart)
}

#[test]
fn the_pages_show_the_chart() {
    let mut chart = TRANSITIONS.to_vec();
    chart.sort();
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    let migrations = std::fs::read_to_string(format!("{root}/migrations/README.md")).unwrap();
    assert_eq!(charted(&migrations), Some(chart.clone()));
    // The front page may show the chart too; where it does, it has to be this one.
    let front_page = std::fs::read_to_string(format!("{root}/README.md")).unwrap_or_default();
    if let Some(shown) = charted(&front_page) {
        assert_eq!(shown, chart);
    }
}

/// A job that has come to `state` by the catalog's own methods.
async fn job_in(fixture: &Fixture, state: JobState) -> JobId {
    let worker_id = fixture.worker().await;
    let job_id = fixture.submit_one(&format!("{state}-{worker_id}")).await;
    if state == JobState::Available {
        return job_id;
    }
    let claimed = fixture.claim_one(job_id, worker_id).await;
    let catalog = &fixture.catalog;
    match state {
        JobState::Available | JobState::Running => {}
        JobState::Retryable => {
            catalog.fail_if_leased(claimed.lease, &failure(ErrorClass::Infra, true)).await.unwrap().unwrap();
        }
        JobState::Discarded => {
            catalog.fail_if_leased(claimed.lease, &failure(ErrorClass::Input, false)).await.unwrap().unwrap();
        }
        JobState::Completed => {
            let answers = catalog.complete_if_leased(&[completed(&claimed, worker_id)]).await.unwrap();
            answers[0].unwrap();
        }
        JobState::Cancelled => {
            catalog.cancel_job_if_not_final(job_id).await.unwrap().unwrap();
        }
    }
    assert_eq!(fixture.state(job_id).await, state);
    job_id
}

/// Moves a job to `state` by a plain statement that satisfies every CHECK, so that only the chart can refuse it.
fn force(state: JobState) -> String {
    let is = |wanted: JobState, value: &str| {
        if state == wanted { value.to_owned() } else { "NULL".to_owned() }
    };
    let finalized_at = if state.is_final() { "now()" } else { "NULL" };
    format!(
        "UPDATE jobs SET state = '{state}', finalized_at = {finalized_at}, scheduled_at = {scheduled_at},
             leased_by = {leased_by}, lease_expires_at = {lease_expires_at}, image_id = {image_id},
             attempt = 1, lease_generation = lease_generation + 1,
             error_class = 'bug', error_message = 'forced', can_retry_help = false
         WHERE job_id = $1",
        scheduled_at = is(JobState::Retryable, "now()"),
        leased_by = is(JobState::Running, "(SELECT worker_id FROM workers LIMIT 1)"),
        lease_expires_at = is(JobState::Running, "now()"),
        image_id = is(JobState::Completed, "job_id"),
    )
}

#[tokio::test]
async fn postgres_lets_through_what_the_chart_has_and_nothing_else() {
    let fixture = Fixture::new().await;
    for &from in JobState::ALL {
        let job_id = job_in(&fixture, from).await;
        for &to in JobState::ALL {
            let mut transaction = fixture.pool.begin().await.unwrap();
            let forced = sqlx::query(&force(to)).bind(job_id).execute(&mut *transaction).await;
            if from.is_final() {
                assert_eq!(rule_of(forced.expect_err("final")), "jobs_final_absorbs", "{from} -> {to}");
            } else if from != to && !from.may_become(to) {
                assert_eq!(rule_of(forced.expect_err("not charted")), "jobs_transition", "{from} -> {to}");
            } else if to == JobState::Completed {
                // The move is charted; what is missing is the image.
                assert_eq!(rule_of(forced.expect_err("no image")), "jobs_image_fkey", "{from} -> {to}");
            } else {
                assert_eq!(forced.expect("charted").rows_affected(), 1, "{from} -> {to}");
            }
        }
    }
}

#[tokio::test]
async fn nothing_changes_a_job_that_is_final() {
    let fixture = Fixture::new().await;
    for &state in JobState::ALL.iter().filter(|state| state.is_final()) {
        let job_id = job_in(&fixture, state).await;
        for change in ["published_at = now()", "error_message = 'x'", "band = 'low'", "max_attempts = 9"] {
            let sql = format!("UPDATE jobs SET {change} WHERE job_id = '{job_id}'");
            assert_eq!(fixture.refusal(&sql).await, "jobs_final_absorbs", "{state}: {change}");
        }
    }
}

#[tokio::test]
async fn a_released_job_can_go_all_the_way_again() {
    let fixture = Fixture::new().await;
    let worker_id = fixture.worker().await;
    let job_id = fixture.submit_one("again").await;
    for _ in 0..5 {
        let claimed = fixture.claim_one(job_id, worker_id).await;
        assert_eq!(claimed.attempt, 1, "released attempts are given back");
        let released = fixture.catalog.release_if_leased(&[claimed.lease], LeaseReturn::MessageSettled).await;
        assert_eq!(released.unwrap(), [job_id]);
    }
    let claimed = fixture.claim_one(job_id, worker_id).await;
    assert_eq!(claimed.lease.lease_generation, 6);
    fixture.catalog.complete_if_leased(&[completed(&claimed, worker_id)]).await.unwrap()[0].unwrap();
    let outcomes = ["preempted", "preempted", "preempted", "preempted", "preempted", "ok"];
    assert_eq!(fixture.outcomes(job_id).await, outcomes);
}
