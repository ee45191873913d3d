//! F1, F13, F14: a process killed at each arrow of a job's life. Nothing is lost, nothing is made twice.

use std::time::Duration;

use fleet_tests::{Broker, Fleet, Servers};
use schema::PriorityBand;

const SOON: Duration = Duration::from_secs(120);
const SMALL: [&str; 6] = ["--num-inference-steps", "4", "--width", "64", "--height", "64"];
const WORKER: [&str; 4] = ["--max-microbatch", "2", "--lease-seconds", "3"];
/// So many jobs has the batch of each of these tests.
const JOBS: usize = 6;

fn kill_point(name: &str) -> [(&'static str, String); 1] {
    [("FAILPOINTS", format!("{name}=return"))]
}

/// What a worker that was killed at some point left behind.
#[derive(Debug, PartialEq, Eq)]
struct Left {
    /// Jobs that it holds.
    running: i64,
    /// Objects that it stored.
    objects: usize,
    /// Jobs that it completed.
    completed: i64,
    /// Attempts that have to be given up as lost.
    lost: i64,
}

/// Kills a worker at `point` with a microbatch of two, looks at what it left, and lets another worker end the batch.
async fn a_worker_killed_at(point: &str, left: Left) {
    let fleet = Fleet::new(Servers::shared()).await;
    let batch = fleet.submit(&"a prompt\n".repeat(JOBS), &SMALL);
    let _serve = fleet.serve_with(&[], &["--republish-after", "5"]);
    let options = ["--max-wait-ms", "5000"];
    let mut killed = fleet.solid_color_worker_with(&kill_point(point), 20, &[&WORKER[..], &options].concat());
    killed.aborted(SOON).await;
    let found = Left {
        running: fleet.count("SELECT count(*) FROM attempts WHERE outcome IS NULL OR outcome = 'lost'").await,
        objects: fleet.objects(&format!("v1/{batch}/")).await.len(),
        completed: fleet.jobs_in("completed").await,
        lost: left.lost,
    };
    assert_eq!(found, left, "at {point}");
    let _worker = fleet.solid_color_worker(20, &WORKER);
    fleet.await_all_final(SOON).await;
    assert_eq!(fleet.jobs_in("completed").await as usize, JOBS);
    // The same pixels have the same key, so that a twin leaves no second object.
    fleet.assert_nothing_lost_nothing_twice(&batch, JOBS, 0).await;
    let lost = "SELECT count(*) FROM attempts WHERE outcome = 'lost'";
    assert_eq!(fleet.count(lost).await, left.lost, "at {point}");
    let attempts = "SELECT count(*) FROM attempts WHERE outcome NOT IN ('ok', 'lost')";
    assert_eq!(fleet.count(attempts).await, 0, "a crash is no error of the job");
    assert_eq!(fleet.count("SELECT count(*) FROM jobs WHERE attempt <> 1").await, 0, "and costs it nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn before_the_claim() {
    let left = Left { running: 0, objects: 0, completed: 0, lost: 0 };
    a_worker_killed_at("claimer::before_claim", left).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn between_claim_and_drawing() {
    let left = Left { running: 2, objects: 0, completed: 0, lost: 2 };
    a_worker_killed_at("claimer::after_claim", left).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn between_drawing_and_storing() {
    // The next two are claimed while the first two are drawn; whether they already are at this moment is chance.
    let fleet = Fleet::new(Servers::shared()).await;
    let batch = fleet.submit("one\ntwo\n", &SMALL);
    let _serve = fleet.serve();
    let mut killed = fleet.solid_color_worker_with(&kill_point("completer::before_store"), 20, &WORKER);
    killed.aborted(SOON).await;
    assert_eq!(fleet.objects(&format!("v1/{batch}/")).await.len(), 0);
    let _worker = fleet.solid_color_worker(20, &WORKER);
    fleet.await_all_final(SOON).await;
    fleet.assert_nothing_lost_nothing_twice(&batch, 2, 0).await;
}

/// As [`a_worker_killed_at`], with two jobs only, so that nothing else is under way.
async fn a_completer_killed_at(point: &str, stored: usize, completed: i64) {
    let fleet = Fleet::new(Servers::shared()).await;
    let batch = fleet.submit("one\ntwo\n", &SMALL);
    let _serve = fleet.serve();
    let wait = ["--max-wait-ms", "5000"];
    let mut killed = fleet.solid_color_worker_with(&kill_point(point), 20, &[&WORKER[..], &wait].concat());
    killed.aborted(SOON).await;
    assert_eq!(fleet.objects(&format!("v1/{batch}/")).await.len(), stored, "objects at {point}");
    assert_eq!(fleet.jobs_in("completed").await, completed, "completed at {point}");
    // What was not acknowledged comes back.
    let broker = Broker::of(&fleet).await;
    let queue = fleet.queue(PriorityBand::Normal);
    let ready = || broker.ready(&queue);
    fleet_tests::eventually("unacknowledged messages", SOON, ready, |ready| *ready >= Some(2)).await;
    let mut worker = fleet.solid_color_worker(20, &WORKER);
    fleet.await_all_final(SOON).await;
    fleet.assert_nothing_lost_nothing_twice(&batch, 2, 0).await;
    let lost = "SELECT count(*) FROM attempts WHERE outcome = 'lost'";
    assert_eq!(fleet.count(lost).await, 2 - completed, "at {point}");
    let ok = "SELECT count(*) FROM attempts WHERE outcome = 'ok'";
    assert_eq!(fleet.count(ok).await, 2, "each picture is recorded once");
    broker.assert_all_spent(&fleet, &mut worker, &SMALL, SOON).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn between_storing_and_completing() {
    a_completer_killed_at("completer::after_store", 2, 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn between_completing_and_acknowledging() {
    a_completer_killed_at("completer::after_complete", 2, 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn after_acknowledging() {
    // The last thing that it did was to send the acknowledgement, which may not have left the process.
    let fleet = Fleet::new(Servers::shared()).await;
    let batch = fleet.submit("one\ntwo\n", &SMALL);
    let _serve = fleet.serve();
    let mut killed = fleet.solid_color_worker_with(&kill_point("completer::after_ack"), 20, &WORKER);
    killed.aborted(SOON).await;
    assert!(fleet.jobs_in("completed").await >= 1);
    let _worker = fleet.solid_color_worker(20, &WORKER);
    fleet.await_all_final(SOON).await;
    fleet.assert_nothing_lost_nothing_twice(&batch, 2, 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_killed_between_publishing_and_marking_publishes_again_and_nobody_minds() {
    let fleet = Fleet::new(Servers::shared()).await;
    let batch = fleet.submit(&"a prompt\n".repeat(JOBS), &SMALL);
    fleet.serve_with(&kill_point("relay::after_publish"), &[]).aborted(SOON).await;
    let broker = Broker::of(&fleet).await;
    let queue = fleet.queue(PriorityBand::Normal);
    assert_eq!(broker.ready(&queue).await, Some(JOBS as u32));
    assert_eq!(fleet.count("SELECT count(*) FROM jobs WHERE published_at IS NOT NULL").await, 0);
    let _serve = fleet.serve();
    let ready = || broker.ready(&queue);
    let twice = Some(2 * JOBS as u32);
    fleet_tests::eventually("every message twice", SOON, ready, |ready| *ready == twice).await;
    let mut worker = fleet.solid_color_worker(20, &WORKER);
    fleet.await_all_final(SOON).await;
    fleet.assert_nothing_lost_nothing_twice(&batch, JOBS, 0).await;
    assert_eq!(fleet.count("SELECT count(*) FROM attempts").await as usize, JOBS, "one attempt each");
    broker.assert_all_spent(&fleet, &mut worker, &SMALL, SOON).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_killed_after_marking_has_done_its_work() {
    let fleet = Fleet::new(Servers::shared()).await;
    let batch = fleet.submit(&"a prompt\n".repeat(JOBS), &SMALL);
    fleet.serve_with(&kill_point("relay::after_mark"), &[]).aborted(SOON).await;
    let marked = "SELECT count(*) FROM jobs WHERE published_at IS NOT NULL";
    assert_eq!(fleet.count(marked).await as usize, JOBS);
    // Nobody serves; the messages are enough.
    let _worker = fleet.solid_color_worker(20, &WORKER);
    fleet.await_all_final(SOON).await;
    fleet.assert_nothing_lost_nothing_twice(&batch, JOBS, 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_submission_killed_before_its_commit_has_written_nothing() {
    let fleet = Fleet::new(Servers::shared()).await;
    let key = [&SMALL[..], &["--idempotency-key", "monday"]].concat();
    submit_killed_at("submit::before_commit", &fleet, &key).await;
    // Postgres notices within moments that the connection is gone.
    let open =
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in%'";
    fleet.await_count("the transaction to be rolled back", open, 0, SOON).await;
    assert_eq!(fleet.count("SELECT count(*) FROM batches").await, 0);
    assert_eq!(fleet.count("SELECT count(*) FROM jobs").await, 0);
    let again = fleet.try_submit("one\ntwo\n", &key).succeeded().json();
    assert_eq!(again["replayed"], false);
    assert_eq!(fleet.count("SELECT count(*) FROM jobs").await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_submission_killed_before_its_answer_is_answered_when_it_is_repeated() {
    let fleet = Fleet::new(Servers::shared()).await;
    let key = [&SMALL[..], &["--idempotency-key", "monday"]].concat();
    submit_killed_at("submit::after_commit", &fleet, &key).await;
    assert_eq!(fleet.count("SELECT count(*) FROM jobs").await, 2, "it was written");
    let again = fleet.try_submit("one\ntwo\n", &key).succeeded().json();
    assert_eq!(again["replayed"], true);
    assert_eq!(fleet.count("SELECT count(*) FROM batches").await, 1);
    assert_eq!(fleet.count("SELECT count(*) FROM jobs").await, 2);
}

async fn submit_killed_at(point: &str, fleet: &Fleet, options: &[&str]) {
    let file = fleet.write("killed.txt", "one\ntwo\n");
    let mut command = fleet.command("darkroom");
    command.args(["submit", file.to_str().unwrap(), "--model", fleet.model(), "--json"]);
    command.args(["--principal", fleet_tests::fleet::PRINCIPAL]).args(options).envs(kill_point(point));
    fleet.spawn("darkroom submit", command).aborted(SOON).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_schedulers_one_may_be_killed_at_any_time() {
    let fleet = Fleet::new(Servers::shared()).await;
    let batch = fleet.submit(&"a prompt\n".repeat(40), &SMALL);
    // A low watermark keeps both busy until the end.
    let serve = ["--watermark", "4", "--republish-after", "5"];
    let mut killed = fleet.serve_with(&[], &serve);
    let _other = fleet.serve_with(&[], &serve);
    let _worker = fleet.solid_color_worker(30, &WORKER);
    let done = || fleet.jobs_in("completed");
    fleet_tests::eventually("the first pictures", SOON, done, |done| *done >= 4).await;
    killed.kill();
    fleet.await_all_final(SOON).await;
    fleet.assert_nothing_lost_nothing_twice(&batch, 40, 0).await;
    assert_eq!(fleet.count("SELECT count(*) FROM attempts WHERE outcome <> 'ok'").await, 0);
}
