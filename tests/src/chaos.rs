//! Chaos: a fleet under load while everything breaks, and then the promises are checked.
//!
//! [`plan`] draws the faults from a seed, [`crew`] keeps the processes, [`strikes`] carries the faults out, [`batches`]
//! submits and cancels meanwhile, [`report`] says what came of it. [`run`] puts them together: it breaks things for a
//! while, heals everything, waits until all jobs are final, and asks the [`checker`].

pub mod batches;
pub mod crew;
pub mod diagnosis;
pub mod plan;
pub mod report;
pub mod strikes;

use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::PgPool;
use tokio::task::JoinSet;
use tokio::time::{interval, sleep_until};

use crate::checker::{self, FinalJobs, Violation};
use crate::fleet::Fleet;
use crate::servers::Servers;

use batches::Submissions;
use crew::Crew;
use plan::{Seeded, Strike};
use report::{Report, Tally};

/// After everything is healed, so long may the fleet take to end its work.
const RECOVERY: Duration = Duration::from_secs(300);
/// How often a line says how it goes.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);
/// How often the final jobs are noted, to be compared at the end.
const LEDGER_INTERVAL: Duration = Duration::from_secs(10);
/// How long a question to a database that may be away is repeated.
const ASK_LIMIT: Duration = Duration::from_secs(120);

/// Breaks a fleet for `length` as `seed` says, telling `tell` how it goes and went.
pub async fn run(seed: u64, length: Duration, tell: impl Fn(&str) + Send + Sync + 'static) -> Report {
    let tell = Arc::new(tell);
    let strikes = plan::draw(seed, length);
    tell(&format!("chaos for {} s: {} faults drawn from CHAOS_SEED={seed}", length.as_secs(), strikes.len()));
    let fleet = Arc::new(Fleet::new(Arc::new(Servers::start())).await);
    let crew = Arc::new(Crew::start(fleet.clone()).await);
    let tally = Arc::new(Tally::default());
    let submissions = Arc::new(Submissions::new(fleet.clone(), Seeded::new(seed ^ 1)));

    let started = Instant::now();
    let mut helpers = JoinSet::new();
    helpers.spawn(tend(crew.clone()));
    helpers.spawn(progress(fleet.clone(), tally.clone(), started, length, tell.clone()));
    let ledger = tokio::spawn(keep_ledger(fleet.clone(), started + length));
    let submitting = tokio::spawn(submissions.clone().run(started + length));
    strike_all(&crew, &tally, strikes, started, tell.clone()).await;
    sleep_until((started + length).into()).await;

    tell("healing everything");
    crew.heal().await;
    submitting.await.expect("the submissions do not panic");
    let ledger = ledger.await.expect("the ledger does not panic");
    let healed = Instant::now();
    while ask(|| open_jobs(fleet.pool())).await > 0 && healed.elapsed() < RECOVERY {
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    let recovery = healed.elapsed();
    if recovery >= RECOVERY {
        tell(&format!("the fleet does not end its work\n{}", diagnosis::take(&crew).await));
    }
    // The helpers have no more to do; the crew ends in order, so that nothing is written while the judge reads.
    helpers.shutdown().await;
    crew.stop().await;

    let mut violations = ask(|| checker::violations(fleet.pool())).await;
    let now = ask(|| checker::final_jobs(fleet.pool())).await;
    violations.extend(checker::changed_since(&ledger, &now));
    violations.extend(unkept(&fleet, &submissions).await);
    let bucket = checker::check_bucket(&fleet).await.expect("the database answers");
    violations.extend(bucket.violations.iter().cloned());
    let account = ask(|| checker::account(fleet.pool())).await;
    let discarded = ask(|| report::discarded(fleet.pool())).await;
    let report =
        Report { seed, account, bucket, violations, discarded, faults: tally.counts(), recovery, length };
    // Before the fleet goes: removing its objects takes a while.
    tell(&report.to_string());
    if !report.is_clean() {
        tell(&format!("the logs are kept in {}", keep_logs(&fleet, seed).display()));
    }
    report
}

/// Carries the plan out. Faults that last overlap with the next ones.
async fn strike_all(
    crew: &Arc<Crew>,
    tally: &Arc<Tally>,
    strikes: Vec<Strike>,
    started: Instant,
    tell: Arc<impl Fn(&str) + Send + Sync + 'static>,
) {
    let mut under_way = JoinSet::new();
    for strike in strikes {
        sleep_until((started + strike.at).into()).await;
        tell(&format!("{:6.1} s  {}", started.elapsed().as_secs_f64(), strike.fault));
        tally.count(&strike.fault);
        let crew = crew.clone();
        under_way.spawn(async move { strikes::strike(&crew, strike.fault).await });
        while let Some(done) = under_way.try_join_next() {
            done.expect("a strike does not panic");
        }
    }
    while let Some(done) = under_way.join_next().await {
        done.expect("a strike does not panic");
    }
}

/// Starts what has ended, as a container runtime does.
async fn tend(crew: Arc<Crew>) {
    let mut ticks = interval(Duration::from_secs(1));
    loop {
        ticks.tick().await;
        crew.restart_ended().await;
    }
}

async fn progress(
    fleet: Arc<Fleet>,
    tally: Arc<Tally>,
    started: Instant,
    length: Duration,
    tell: Arc<impl Fn(&str) + Send + Sync + 'static>,
) {
    let mut ticks = interval(PROGRESS_INTERVAL);
    let mut before = 0;
    ticks.tick().await;
    loop {
        ticks.tick().await;
        let sql = "SELECT count(*), count(*) FILTER (WHERE finalized_at IS NOT NULL) FROM jobs";
        let (jobs, ended): (i64, i64) = ask(|| sqlx::query_as(sql).fetch_one(fleet.pool())).await;
        let rate = (ended - before) as f64 / PROGRESS_INTERVAL.as_secs_f64();
        before = ended;
        let elapsed = started.elapsed();
        let eta = match length.checked_sub(elapsed) {
            Some(left) => format!("{} s of chaos to go", left.as_secs()),
            None if rate > 0.0 => format!("{:.0} s to the last job", (jobs - ended) as f64 / rate),
            None => "waiting for the last jobs".to_owned(),
        };
        let faults: u64 = tally.counts().values().sum();
        tell(&format!(
            "{:6.1} s  {ended} of {jobs} jobs final, {rate:.1}/s, {faults} faults; {eta}",
            elapsed.as_secs_f64()
        ));
    }
}

/// Notes every job as it stood when it was first seen to be final.
async fn keep_ledger(fleet: Arc<Fleet>, until: Instant) -> FinalJobs {
    let mut ledger = FinalJobs::new();
    let mut ticks = interval(LEDGER_INTERVAL);
    while Instant::now() < until {
        ticks.tick().await;
        for (job_id, record) in ask(|| checker::final_jobs(fleet.pool())).await {
            ledger.entry(job_id).or_insert(record);
        }
    }
    ledger
}

async fn open_jobs(pool: &PgPool) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar("SELECT count(*) FROM jobs WHERE finalized_at IS NULL").fetch_one(pool).await
}

/// P1: each batch that was acknowledged is there, once, with all its jobs, and no other.
async fn unkept(fleet: &Fleet, submissions: &Submissions) -> Vec<Violation> {
    let sql = "SELECT idempotency_key, batch_id::text, job_count::bigint FROM batches";
    let there: Vec<(String, String, i64)> = ask(|| sqlx::query_as(sql).fetch_all(fleet.pool())).await;
    let acknowledged = submissions.acknowledged();
    let violation = |what: &str, subject: &str| Violation {
        promise: "P1".to_owned(),
        what: what.to_owned(),
        subject: subject.to_owned(),
    };
    let missing = acknowledged.iter().filter(|batch| !there.contains(batch));
    let mut violations: Vec<_> =
        missing.map(|(_, batch_id, _)| violation("an acknowledged batch is missing", batch_id)).collect();
    let extra = there.iter().filter(|batch| !acknowledged.contains(batch));
    violations.extend(extra.map(|(_, batch_id, _)| violation("a batch is there a second time", batch_id)));
    violations
}

/// Repeats a question until the database answers.
///
/// # Panics
/// When it does not for two minutes.
pub async fn ask<T, F>(mut question: impl FnMut() -> F) -> T
where
    F: Future<Output = Result<T, sqlx::Error>>,
{
    let started = Instant::now();
    loop {
        match question().await {
            Ok(answer) => return answer,
            Err(error) => assert!(started.elapsed() < ASK_LIMIT, "the database does not answer: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Copies the processes' logs to where they outlive the run.
fn keep_logs(fleet: &Fleet, seed: u64) -> std::path::PathBuf {
    let kept = std::env::temp_dir().join(format!("darkroom-chaos-{seed}"));
    std::fs::create_dir_all(&kept).expect("the temporary folder can be written");
    for entry in std::fs::read_dir(fleet.folder()).expect("the logs can be listed").flatten() {
        if entry.path().extension().is_some_and(|extension| extension == "log") {
            std::fs::copy(entry.path(), kept.join(entry.file_name())).expect("a log can be copied");
        }
    }
    kept
}
