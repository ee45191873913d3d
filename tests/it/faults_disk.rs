//! F8: servers whose disk is full, as they say it themselves. (The broker's alarm is in `faults_queue`, an S3 that answers
//! as a full MinIO does in `faults_s3`; a worker writes no files.)

use std::sync::Arc;
use std::time::Duration;

use fleet_tests::{Fleet, Servers, full_disk};
use nix::sys::signal::Signal;

const SOON: Duration = Duration::from_secs(180);
const SMALL: [&str; 6] = ["--num-inference-steps", "4", "--width", "64", "--height", "64"];
const WORKER: [&str; 4] = ["--max-microbatch", "2", "--lease-seconds", "10"];
/// Less than any picture has.
const FEW_BYTES: i64 = 100;
/// What Postgres says when it can write only a part of a page.
const NO_ROOM: &str = "could not extend file";

/// No attempt was spent on anything but a picture.
async fn assert_unharmed(fleet: &Fleet, attempts: i64) {
    assert_eq!(fleet.count("SELECT count(*) FROM attempts").await, attempts, "one attempt a job");
    assert_eq!(fleet.count("SELECT count(*) FROM attempts WHERE outcome <> 'ok'").await, 0);
    assert_eq!(fleet.count("SELECT count(*) FROM jobs WHERE attempt <> 1").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_under_postgres_costs_time_and_nothing_else() {
    let fleet = Fleet::new(Arc::new(Servers::start())).await;
    let _serve = fleet.serve();

    // Pictures can be drawn and not recorded.
    full_disk::fill_postgres(fleet.servers(), fleet.pool(), &["images"]).await;
    let drawn = fleet.submit(&"a prompt\n".repeat(4), &SMALL);
    let mut worker = fleet.solid_color_worker(20, &WORKER);
    worker.says("Cannot record pictures now", SOON).await;
    assert!(worker.log().contains(NO_ROOM), "{}", worker.log());
    assert_eq!(fleet.count("SELECT count(*) FROM images").await, 0, "nothing is recorded");
    assert_eq!(fleet.jobs_in("completed").await, 0, "and nothing called done");
    full_disk::free_postgres(fleet.servers());
    fleet.await_all_final(SOON).await;
    fleet.assert_nothing_lost_nothing_twice(&drawn, 4, 0).await;
    assert_unharmed(&fleet, 4).await;

    // Nothing at all can be written: not claimed, not enqueued.
    worker.signal(Signal::SIGTERM);
    assert!(worker.exit(SOON).await.success(), "{}", worker.log());
    let waiting = fleet.submit(&"a prompt\n".repeat(4), &SMALL);
    let published = "SELECT count(*) FROM jobs WHERE state = 'available' AND published_at IS NOT NULL";
    fleet.await_count("the relay to be done with them", published, 4, SOON).await;
    full_disk::fill_postgres(fleet.servers(), fleet.pool(), &["images", "attempts", "jobs"]).await;
    let worker = fleet.solid_color_worker(20, &WORKER);
    worker.says("Cannot claim jobs now", SOON).await;
    assert!(worker.log().contains(NO_ROOM), "{}", worker.log());
    assert_eq!(fleet.jobs_in("available").await, 4, "nothing is claimed by half");
    assert_eq!(fleet.count("SELECT count(*) FROM attempts").await, 4, "and no attempt spent");
    let refused = fleet.try_submit("one\ntwo\n", &SMALL);
    assert_eq!(refused.code(), Some(1), "{}", refused.stdout());
    assert!(refused.stderr().contains(NO_ROOM), "{}", refused.stderr());
    assert_eq!(fleet.count("SELECT count(*) FROM batches").await, 2, "all or nothing");
    full_disk::free_postgres(fleet.servers());
    fleet.await_all_final(SOON).await;
    fleet.assert_nothing_lost_nothing_twice(&waiting, 4, 0).await;
    assert_unharmed(&fleet, 8).await;
    assert_eq!(fleet.count("SELECT count(*) FROM workers WHERE is_unfit").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_under_s3_costs_time_and_nothing_else() {
    let fleet = Fleet::new(Arc::new(Servers::start())).await;
    full_disk::fill_s3(fleet.servers(), FEW_BYTES);
    let _serve = fleet.serve();
    let batch = fleet.submit(&"a prompt\n".repeat(4), &SMALL);
    let worker = fleet.solid_color_worker(20, &WORKER);
    worker.says("Cannot store a picture now", SOON).await;
    assert_eq!(fleet.count("SELECT count(*) FROM images").await, 0, "nothing is recorded that is not there");
    assert_eq!(fleet.objects(&format!("v1/{batch}/")).await, Vec::<String>::new(), "nor is there half of it");
    full_disk::free_s3(fleet.servers());
    fleet.await_all_final(SOON).await;
    fleet.assert_nothing_lost_nothing_twice(&batch, 4, 0).await;
    assert_unharmed(&fleet, 4).await;
}
