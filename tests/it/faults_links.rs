//! F3 and F10: each link between a process and a server broken alone, by a partition, a reset or silence.

use std::time::Duration;

use fleet_tests::{Fleet, Link, Mode, Servers, Wall};

const SOON: Duration = Duration::from_secs(180);
const SMALL: [&str; 6] = ["--num-inference-steps", "4", "--width", "64", "--height", "64"];
const WORKER: [&str; 4] = ["--max-microbatch", "2", "--lease-seconds", "3"];
const SERVE: [&str; 2] = ["--republish-after", "4"];
const LOST: &str = "SELECT count(*) FROM attempts WHERE outcome = 'lost'";
/// What a worker says when it finds that somebody else has its job.
const FENCED: &str = "The lease of a job was lost";

fn debug() -> (&'static str, String) {
    ("DARKROOM_LOG", "worker=debug".to_owned())
}

/// Mends the link to S3; then the batch of two completes, and no attempt was lost, failed or spent twice.
async fn assert_two_jobs_complete_unscathed_once_healed(fleet: &Fleet, link: &Link, batch: &str) {
    link.heal();
    fleet.await_all_final(SOON).await;
    fleet.assert_nothing_lost_nothing_twice(batch, 2, 0).await;
    assert_eq!(fleet.count("SELECT count(*) FROM attempts WHERE outcome <> 'ok'").await, 0);
    assert_eq!(fleet.count("SELECT count(*) FROM jobs WHERE attempt <> 1").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_cut_off_from_postgres_loses_its_jobs_and_its_late_words_count_for_nothing() {
    let fleet = Fleet::new(Servers::shared()).await;
    let link = Link::to(&fleet, Wall::Postgres).await;
    let batch = fleet.submit("one\ntwo\n", &SMALL);
    let _serve = fleet.serve_with(&[], &SERVE);
    let zombie = fleet.solid_color_worker_with(&[link.env(), debug()], 1000, &WORKER);
    fleet.await_running(SOON).await;
    link.set(Mode::Stall);
    let held = fleet.jobs_in("running").await;
    fleet.await_count("the leases to lapse", LOST, held, SOON).await;
    let mut heir = fleet.solid_color_worker(20, &WORKER);
    let done = || fleet.jobs_in("completed");
    fleet_tests::eventually("the heir to draw them", SOON, done, |done| *done >= held).await;
    // Now everything that it had to say in the meantime arrives.
    link.heal();
    zombie.says(FENCED, SOON).await;
    fleet.await_all_final(SOON).await;
    fleet.assert_nothing_lost_nothing_twice(&batch, 2, 0).await;
    heir.kill();
    let next = fleet.submit("another\n", &SMALL);
    fleet.await_all_final(SOON).await;
    fleet.assert_nothing_lost_nothing_twice(&next, 1, 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_cut_off_from_the_broker_records_what_it_holds_and_comes_back() {
    let fleet = Fleet::new(Servers::shared()).await;
    let link = Link::to(&fleet, Wall::Broker).await.with_query("heartbeat=2");
    let batch = fleet.submit(&"a prompt\n".repeat(6), &SMALL);
    let _serve = fleet.serve_with(&[], &SERVE);
    let cut_off = fleet.solid_color_worker_with(&[link.env(), debug()], 1000, &WORKER);
    fleet.await_running(SOON).await;
    link.set(Mode::Stall);
    // It needs no broker to finish what it has claimed.
    let done = || fleet.jobs_in("completed");
    fleet_tests::eventually("pictures without a broker", SOON, done, |done| *done >= 1).await;
    // Half-open: nobody told it, and it notices all the same.
    cut_off.says("The broker connection is given up", SOON).await;
    let mut other = fleet.solid_color_worker(20, &WORKER);
    fleet.await_all_final(SOON).await;
    fleet.assert_nothing_lost_nothing_twice(&batch, 6, 0).await;
    other.kill();
    link.heal();
    let next = fleet.submit("another\n", &SMALL);
    fleet.await_all_final(SOON).await;
    fleet.assert_nothing_lost_nothing_twice(&next, 1, 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_cut_off_from_s3_keeps_its_jobs_and_their_attempts() {
    let fleet = Fleet::new(Servers::shared()).await;
    let link = Link::to(&fleet, Wall::S3).await;
    let batch = fleet.submit("one\ntwo\n", &SMALL);
    let _serve = fleet.serve_with(&[], &SERVE);
    link.set(Mode::Stall);
    let _worker = fleet.solid_color_worker_with(&[link.env()], 20, &WORKER);
    fleet_tests::eventually("an upload to hang", SOON, || async { link.held() }, |held| *held > 0).await;
    // More than two leases long.
    let kept = "SELECT count(*) FROM jobs JOIN attempts USING (job_id, lease_generation)
                WHERE state = 'running' AND now() > attempts.started_at + interval '7 seconds'";
    let held = fleet.jobs_in("running").await;
    fleet.await_count("leases to be kept", kept, held, SOON).await;
    assert_eq!(fleet.count(LOST).await, 0);
    assert_eq!(fleet.count("SELECT count(*) FROM images").await, 0, "no row without its object");
    assert_two_jobs_complete_unscathed_once_healed(&fleet, &link, &batch).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_whose_store_refuses_connections_waits_and_burns_no_attempts() {
    let fleet = Fleet::new(Servers::shared()).await;
    let link = Link::to(&fleet, Wall::S3).await;
    let batch = fleet.submit("one\ntwo\n", &SMALL);
    let _serve = fleet.serve_with(&[], &SERVE);
    link.down();
    let worker = fleet.solid_color_worker_with(&[link.env()], 20, &WORKER);
    worker.says("Cannot store a picture now", SOON).await;
    assert_two_jobs_complete_unscathed_once_healed(&fleet, &link, &batch).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scheduler_cut_off_from_postgres_goes_on_when_it_is_back() {
    let fleet = Fleet::new(Servers::shared()).await;
    let link = Link::to(&fleet, Wall::Postgres).await;
    let _serve = fleet.serve_with(&[link.env()], &SERVE);
    let _worker = fleet.solid_color_worker(20, &WORKER);
    let first = fleet.submit("one\n", &SMALL);
    fleet.await_all_final(SOON).await;
    for fault in [Mode::Stall, Mode::Refuse] {
        link.set(fault);
        if fault == Mode::Refuse {
            link.cut();
        } else {
            fleet_tests::eventually("a statement to hang", SOON, || async { link.held() }, |held| *held > 0)
                .await;
        }
        let next = fleet.submit("two\nthree\n", &SMALL);
        link.heal();
        fleet.await_all_final(SOON).await;
        fleet.assert_nothing_lost_nothing_twice(&next, 2, 0).await;
    }
    fleet.assert_nothing_lost_nothing_twice(&first, 1, 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scheduler_cut_off_from_the_broker_goes_on_when_it_is_back() {
    let fleet = Fleet::new(Servers::shared()).await;
    let link = Link::to(&fleet, Wall::Broker).await.with_query("heartbeat=2");
    let serve = fleet.serve_with(&[link.env()], &SERVE);
    let _worker = fleet.solid_color_worker(20, &WORKER);
    let first = fleet.submit("one\n", &SMALL);
    fleet.await_all_final(SOON).await;
    link.set(Mode::Stall);
    // Half-open: the heartbeat tells.
    serve.says("Lost the broker", SOON).await;
    let second = fleet.submit("two\nthree\n", &SMALL);
    assert_eq!(fleet.jobs_in("available").await, 2, "the backlog is in Postgres meanwhile");
    link.heal();
    fleet.await_all_final(SOON).await;
    for _ in 0..3 {
        // A reset in the middle of whatever it does.
        link.cut();
        fleet.submit("four\n", &SMALL);
        fleet.await_all_final(SOON).await;
    }
    fleet.assert_nothing_lost_nothing_twice(&first, 1, 0).await;
    fleet.assert_nothing_lost_nothing_twice(&second, 2, 0).await;
    assert_eq!(fleet.jobs_in("completed").await, 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_fleet_recovers_by_itself_from_a_broker_that_is_away_for_twenty_seconds() {
    let fleet = Fleet::new(Servers::shared()).await;
    let (to_serve, to_worker) = (Link::to(&fleet, Wall::Broker).await, Link::to(&fleet, Wall::Broker).await);
    let batch = fleet.submit(&"a prompt\n".repeat(30), &SMALL);
    let mut serve = fleet.serve_with(&[to_serve.env()], &["--republish-after", "4", "--watermark", "6"]);
    let mut worker = fleet.solid_color_worker_with(&[to_worker.env()], 100, &WORKER);
    let done = || fleet.jobs_in("completed");
    fleet_tests::eventually("the first pictures", SOON, done, |done| *done >= 2).await;
    to_serve.down();
    to_worker.down();
    // The outage itself, not a wait for something.
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert!(serve.runs() && worker.runs(), "neither dies of it");
    assert!(fleet.jobs_in("completed").await < 30, "the outage came too late to matter");
    to_serve.heal();
    to_worker.heal();
    fleet.await_all_final(Duration::from_secs(60)).await;
    fleet.assert_nothing_lost_nothing_twice(&batch, 30, 0).await;
    assert_eq!(fleet.count("SELECT count(*) FROM jobs WHERE attempt <> 1").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn resets_of_a_workers_broker_connection_cost_nothing() {
    let fleet = Fleet::new(Servers::shared()).await;
    let link = Link::to(&fleet, Wall::Broker).await;
    let batch = fleet.submit(&"a prompt\n".repeat(30), &SMALL);
    let _serve = fleet.serve_with(&[], &SERVE);
    let _worker = fleet.solid_color_worker_with(&[link.env()], 100, &WORKER);
    for seen in [2, 8, 14] {
        let done = || fleet.jobs_in("completed");
        fleet_tests::eventually("more pictures", SOON, done, |done| *done >= seen).await;
        link.cut();
    }
    fleet.await_all_final(SOON).await;
    fleet.assert_nothing_lost_nothing_twice(&batch, 30, 0).await;
    assert_eq!(fleet.count("SELECT count(*) FROM attempts WHERE outcome <> 'ok'").await, 0);
}
