//! F15 and F17: processes that stop, politely or in the middle of a word.

use std::time::{Duration, Instant};

use fleet_tests::{Fleet, Servers};
use nix::sys::signal::Signal;

const SOON: Duration = Duration::from_secs(120);
const SMALL: [&str; 6] = ["--num-inference-steps", "4", "--width", "64", "--height", "64"];
const WORKER: [&str; 4] = ["--max-microbatch", "2", "--lease-seconds", "3"];
/// What a worker says when it finds that somebody else has its job.
const FENCED: &str = "The lease of a job was lost";

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_wakes_up_past_its_lease_records_nothing() {
    let fleet = Fleet::new(Servers::shared()).await;
    let batch = fleet.submit("a prompt\n", &SMALL);
    let _serve = fleet.serve();
    // Held between storing and completing, so that recording is the next thing it does when it wakes up.
    let env = [
        ("FAILPOINTS", "completer::after_store=1*sleep(3000)".to_owned()),
        ("DARKROOM_LOG", "worker=debug".to_owned()),
    ];
    let zombie = fleet.solid_color_worker_with(&env, 20, &WORKER);
    let prefix = format!("v1/{batch}/");
    let objects = || fleet.objects(&prefix);
    fleet_tests::eventually("the object", SOON, objects, |objects| objects.len() == 1).await;
    zombie.freeze().await;
    let lost = "SELECT count(*) FROM attempts WHERE outcome = 'lost'";
    fleet.await_count("the lease to lapse", lost, 1, SOON).await;
    let mut heir = fleet.solid_color_worker(20, &WORKER);
    fleet.await_all_final(SOON).await;
    let owner = "SELECT images.lease_generation FROM images";
    assert_eq!(fleet.count(owner).await, 2, "the heir's picture counts");
    let before = fleet.count("SELECT hashtextextended(string_agg(jobs::text, ''), 0) FROM jobs").await;
    zombie.thaw();
    zombie.says(FENCED, SOON).await;
    let after = fleet.count("SELECT hashtextextended(string_agg(jobs::text, ''), 0) FROM jobs").await;
    assert_eq!(before, after, "the late writer changed nothing");
    fleet.assert_nothing_lost_nothing_twice(&batch, 1, 0).await;
    // It is no worse for it: alone, it does the next job.
    heir.kill();
    let next = fleet.submit("another\n", &SMALL);
    fleet.await_all_final(SOON).await;
    fleet.assert_nothing_lost_nothing_twice(&next, 1, 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_frozen_while_it_draws_drops_what_is_no_longer_its_own() {
    let fleet = Fleet::new(Servers::shared()).await;
    let batch = fleet.submit("one\ntwo\n", &SMALL);
    let _serve = fleet.serve();
    let env = [("DARKROOM_LOG", "worker=debug".to_owned())];
    let zombie = fleet.solid_color_worker_with(&env, 2000, &WORKER);
    fleet.await_running(SOON).await;
    let held = fleet.jobs_in("running").await;
    zombie.freeze().await;
    let lost = "SELECT count(*) FROM attempts WHERE outcome = 'lost'";
    fleet.await_count("the leases to lapse", lost, held, SOON).await;
    let _heir = fleet.solid_color_worker(20, &WORKER);
    let done = || fleet.jobs_in("completed");
    fleet_tests::eventually("the heir to draw them", SOON, done, |done| *done >= held).await;
    zombie.thaw();
    zombie.says(FENCED, SOON).await;
    fleet.await_all_final(SOON).await;
    fleet.assert_nothing_lost_nothing_twice(&batch, 2, 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_scheduler_holds_nothing_up_when_there_is_another() {
    let fleet = Fleet::new(Servers::shared()).await;
    let serve = ["--watermark", "4", "--republish-after", "5"];
    let frozen = fleet.serve_with(&[], &serve);
    let _worker = fleet.solid_color_worker(30, &WORKER);
    let first = fleet.submit(&"a prompt\n".repeat(20), &SMALL);
    let done = || fleet.jobs_in("completed");
    fleet_tests::eventually("the first pictures", SOON, done, |done| *done >= 2).await;
    frozen.freeze().await;
    let _other = fleet.serve_with(&[], &serve);
    // If it was frozen in its turn to publish, the turn ends when its connection does, so the jobs wait for that or for
    // the thaw; everything else of the other scheduler goes on.
    let second = fleet.submit("another\n", &["--priority", "high"]);
    frozen.thaw();
    fleet.await_all_final(SOON).await;
    fleet.assert_nothing_lost_nothing_twice(&first, 20, 0).await;
    fleet.assert_nothing_lost_nothing_twice(&second, 1, 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_hurries_a_worker_that_has_time_left() {
    let fleet = Fleet::new(Servers::shared()).await;
    let batch = fleet.submit(&"a prompt\n".repeat(6), &["--num-inference-steps", "600", "--width", "64"]);
    let _serve = fleet.serve();
    // A microbatch takes a minute, and the grace period is longer: the first signal lets it go on.
    let options = ["--max-microbatch", "2", "--grace-seconds", "600"];
    let mut worker = fleet.solid_color_worker(30_000, &options);
    // Before the first step nobody knows how long it takes.
    let under_way =
        "SELECT (count(*) > 0)::int::bigint FROM attempts WHERE started_at < now() - interval '3 seconds'";
    fleet.await_count("a microbatch under way", under_way, 1, SOON).await;
    worker.signal(Signal::SIGTERM);
    worker.says("A signal asks the worker to", SOON).await;
    worker.says("Draining", SOON).await;
    assert!(worker.runs(), "it finishes what is begun: {}", worker.log());
    let asked = Instant::now();
    worker.signal(Signal::SIGTERM);
    assert!(worker.exit(SOON).await.success(), "{}", worker.log());
    assert!(asked.elapsed() < Duration::from_secs(25), "it was told to hurry");
    assert_eq!(fleet.jobs_in("available").await, 6);
    let otherwise = "SELECT count(*) FROM attempts WHERE outcome IS DISTINCT FROM 'preempted'";
    assert_eq!(fleet.count(otherwise).await, 0, "hurrying is not failing");
    assert_eq!(fleet.count("SELECT count(*) FROM jobs WHERE attempt <> 0").await, 0, "nothing is charged");
    let _worker = fleet.solid_color_worker(20, &[]);
    fleet.await_all_final(SOON).await;
    fleet.assert_nothing_lost_nothing_twice(&batch, 6, 0).await;
}
