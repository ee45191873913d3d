//! Jobs that kill, break or starve what draws them: the guilty is found, its neighbors complete and are never charged.

use std::time::{Duration, Instant};

use fleet_tests::{Fleet, Process, Servers};

const SOON: Duration = Duration::from_secs(240);

/// As a node pool does: a worker that ends is followed by another, until every job is final.
async fn keep_a_worker_until_all_final(fleet: &Fleet, options: &[&str]) -> (Process, usize) {
    let mut worker = fleet.solid_color_worker(20, options);
    let mut starts = 1;
    let open = "SELECT count(*) FROM jobs WHERE finalized_at IS NULL";
    let deadline = Instant::now() + SOON;
    let mut ticks = tokio::time::interval(Duration::from_millis(50));
    while fleet.count(open).await > 0 {
        ticks.tick().await;
        assert!(Instant::now() < deadline, "some jobs never end; {starts} workers were started");
        if !worker.runs() {
            worker = fleet.solid_color_worker(20, options);
            starts += 1;
        }
    }
    (worker, starts)
}

/// Seven jobs and one that misbehaves, in the middle.
fn seven_and(bad: &str) -> String {
    let good = "a prompt\n".repeat(4);
    format!("{good}{bad}\n{}", "a prompt\n".repeat(3))
}

async fn assert_the_innocent_completed_uncharged(fleet: &Fleet) {
    let innocent =
        "SELECT count(*) FROM jobs WHERE prompt = 'a prompt' AND state = 'completed' AND attempt = 1
                    AND error_class IS NULL";
    assert_eq!(fleet.count(innocent).await, 7);
}

#[tokio::test]
async fn f2_a_job_that_kills_its_workers_is_isolated_and_discarded() {
    let fleet = Fleet::new(Servers::shared()).await;
    fleet.submit(&seven_and("inject: abort"), &["--num-inference-steps", "2"]);
    let _serve = fleet.serve();
    let options = ["--max-microbatch", "8", "--max-wait-ms", "1000", "--lease-seconds", "3"];
    let (_worker, starts) = keep_a_worker_until_all_final(&fleet, &options).await;
    assert!(starts >= 4, "it did not kill its workers: {starts} starts");
    assert_the_innocent_completed_uncharged(&fleet).await;
    let found =
        "SELECT count(*) FROM jobs WHERE state = 'discarded' AND error_class = 'bug' AND losses_alone = 3
                 AND error_message LIKE 'its worker died or hung 3 times while it ran alone' AND attempt = 0";
    assert_eq!(fleet.count(found).await, 1);
    let errors = "SELECT count(*) FROM attempts WHERE outcome = 'error'";
    assert_eq!(fleet.count(errors).await, 0, "a crash is not a failure");
}

#[tokio::test]
async fn f11_a_panic_is_narrowed_down_and_charged_to_its_job_alone() {
    let fleet = Fleet::new(Servers::shared()).await;
    fleet.submit(&seven_and("inject: panic"), &["--num-inference-steps", "2", "--max-attempts", "1"]);
    let _serve = fleet.serve();
    let options = ["--max-microbatch", "8", "--max-wait-ms", "1000", "--lease-seconds", "30"];
    let (_worker, starts) = keep_a_worker_until_all_final(&fleet, &options).await;
    assert!(starts >= 4, "a panic has to end the process: {starts} starts");
    assert_the_innocent_completed_uncharged(&fleet).await;
    let found = "SELECT count(*) FROM jobs WHERE state = 'discarded' AND error_class = 'bug'
                 AND error_message = 'the pipeline panicked: a prompt asked for it'";
    assert_eq!(fleet.count(found).await, 1);
}

#[tokio::test]
async fn f11_numbers_that_are_not_finite_are_neither_safe_nor_flagged() {
    let fleet = Fleet::new(Servers::shared()).await;
    fleet.submit(&seven_and("inject: nan"), &["--num-inference-steps", "2", "--max-attempts", "1"]);
    let _serve = fleet.serve();
    let _worker = fleet.solid_color_worker(20, &["--max-microbatch", "8"]);
    fleet.await_all_final(SOON).await;
    assert_the_innocent_completed_uncharged(&fleet).await;
    let found = "SELECT count(*) FROM jobs WHERE state = 'discarded' AND error_class = 'non_finite' AND image_id IS NULL";
    assert_eq!(fleet.count(found).await, 1);
    let images = "SELECT count(*) FROM images JOIN jobs USING (job_id) WHERE prompt LIKE 'inject%'";
    assert_eq!(fleet.count(images).await, 0);
}

#[tokio::test]
async fn f12_short_memory_costs_no_attempt() {
    let fleet = Fleet::new(Servers::shared()).await;
    fleet.submit(&"inject: little memory\n".repeat(8), &["--num-inference-steps", "2"]);
    let _serve = fleet.serve();
    let worker = fleet.solid_color_worker(20, &["--max-microbatch", "8", "--max-wait-ms", "1000"]);
    fleet.await_all_final(SOON).await;
    let completed =
        "SELECT count(*) FROM jobs WHERE state = 'completed' AND attempt = 1 AND error_class IS NULL";
    assert_eq!(fleet.count(completed).await, 8);
    assert_eq!(fleet.count("SELECT count(*) FROM attempts WHERE outcome <> 'ok'").await, 0);
    assert!(worker.log().contains("its halves run again"), "memory was never short: {}", worker.log());
}

#[tokio::test]
async fn one_bad_machine_does_not_burn_a_queue() {
    let fleet = Fleet::new(Servers::shared()).await;
    fleet.submit(&"inject: no memory\n".repeat(12), &["--num-inference-steps", "2", "--max-attempts", "5"]);
    let _serve = fleet.serve();
    let mut worker = fleet.solid_color_worker(5, &["--max-microbatch", "1", "--unfit-after", "3"]);
    assert!(!worker.exit(SOON).await.success());
    assert_eq!(fleet.count("SELECT count(*) FROM attempts WHERE outcome = 'error'").await, 2);
    let unfit =
        "SELECT count(*) FROM workers WHERE is_unfit AND stop_reason LIKE '%3 jobs in a row failed alike%'";
    assert_eq!(fleet.count(unfit).await, 1);
    assert_eq!(fleet.jobs_in("running").await, 0, "what it held is handed back");
}
