//! F6 and F14: an object store on its bad days. Attempts are not burned, and nothing half-written counts.

use std::time::Duration;

use fleet_tests::{Fleet, S3Fault, S3Front, Servers};

const SOON: Duration = Duration::from_secs(180);
const SMALL: [&str; 6] = ["--num-inference-steps", "4", "--width", "64", "--height", "64"];
const WORKER: [&str; 4] = ["--max-microbatch", "2", "--lease-seconds", "10"];

/// Draws a batch while `percent` of the requests meet `fault`, until `injected` have; then the store is healthy.
async fn a_batch_survives(fault: S3Fault, percent: u64, injected: u64) {
    let fleet = Fleet::new(Servers::shared()).await;
    let front = S3Front::start(&fleet.servers().addresses().aws_endpoint_url).await;
    let _serve = fleet.serve();
    front.set(fault, percent);
    let _worker = fleet.solid_color_worker_with(&[front.env()], 20, &WORKER);
    let batch = fleet.submit(&"a prompt\n".repeat(6), &SMALL);
    let met = || async { front.injected() };
    fleet_tests::eventually("the fault to be met", SOON, met, |met| *met >= injected).await;
    if percent == 100 {
        assert!(fleet.jobs_in("completed").await < 6, "{fault:?}: a store that never takes anything");
    }
    front.heal();
    fleet.await_all_final(SOON).await;
    fleet.assert_nothing_lost_nothing_twice(&batch, 6, 0).await;
    let burned = "SELECT count(*) FROM attempts WHERE outcome <> 'ok'";
    assert_eq!(fleet.count(burned).await, 0, "{fault:?} is not the jobs' fault");
    assert_eq!(fleet.count("SELECT count(*) FROM jobs WHERE attempt <> 1").await, 0, "{fault:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_in_five_requests_fails() {
    a_batch_survives(S3Fault::Status(500), 20, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_asks_to_slow_down() {
    a_batch_survives(S3Fault::Status(503), 100, 5).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_says_that_its_disks_are_full() {
    a_batch_survives(S3Fault::StorageFull, 100, 5).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_answers_late() {
    let fleet = Fleet::new(Servers::shared()).await;
    let front = S3Front::start(&fleet.servers().addresses().aws_endpoint_url).await;
    let _serve = fleet.serve();
    // Longer than a lease lasts without being extended.
    front.set(S3Fault::Delay(Duration::from_secs(5)), 100);
    let lease = ["--max-microbatch", "2", "--lease-seconds", "3"];
    let _worker = fleet.solid_color_worker_with(&[front.env()], 20, &lease);
    let batch = fleet.submit(&"a prompt\n".repeat(4), &SMALL);
    fleet.await_all_final(SOON).await;
    assert!(front.injected() >= 4);
    fleet.assert_nothing_lost_nothing_twice(&batch, 4, 0).await;
    assert_eq!(
        fleet.count("SELECT count(*) FROM attempts WHERE outcome <> 'ok'").await,
        0,
        "leases are kept"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn it_says_that_the_object_is_there_and_it_is_not() {
    a_batch_survives(S3Fault::Status(412), 100, 4).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_says_that_somebody_else_is_writing_it() {
    a_batch_survives(S3Fault::Status(409), 100, 4).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_break_off_half_way() {
    a_batch_survives(S3Fault::Truncate, 100, 4).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_arrive_with_a_wrong_byte() {
    a_batch_survives(S3Fault::Corrupt, 100, 4).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_are_done_and_the_answer_is_lost() {
    a_batch_survives(S3Fault::LoseAnswer, 100, 4).await;
}
