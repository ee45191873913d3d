//! F5 and F14: a Postgres that goes away at the worst moments.

use std::sync::Arc;
use std::time::Duration;

use fleet_tests::{Fleet, Link, Mode, Servers, Wall};
use nix::sys::signal::Signal;

const SOON: Duration = Duration::from_secs(180);
const SMALL: [&str; 6] = ["--num-inference-steps", "4", "--width", "64", "--height", "64"];
const WORKER: [&str; 4] = ["--max-microbatch", "2", "--lease-seconds", "10"];

/// Waits until a statement with `text` in it waits for a lock.
async fn await_waiting(fleet: &Fleet, text: &str) {
    let sql = format!(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
         AND wait_event_type = 'Lock' AND query LIKE '%{text}%'"
    );
    let waiting = || fleet.count(&sql);
    fleet_tests::eventually("a statement to wait", SOON, waiting, |waiting| *waiting > 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_whose_answer_is_lost_is_asked_about_and_not_repeated() {
    let fleet = Fleet::new(Servers::shared()).await;
    let link = Link::to(&fleet, Wall::Postgres).await;
    let batch = fleet.submit("one\ntwo\n", &SMALL);
    let _serve = fleet.serve();
    let worker = fleet.solid_color_worker_with(&[link.env()], 500, &WORKER);
    fleet.await_count("both to be claimed", "SELECT count(*) FROM attempts", 2, SOON).await;
    // The rows are held until the worker has sent its statement and the way back is broken.
    let mut hold = fleet.pool().begin().await.unwrap();
    sqlx::query("SELECT FROM jobs FOR UPDATE").execute(&mut *hold).await.unwrap();
    await_waiting(&fleet, "INSERT INTO images").await;
    link.set(Mode::HoldAnswers);
    hold.commit().await.unwrap();
    // The rows are committed, and the worker does not know.
    fleet.await_count("the commit", "SELECT count(*) FROM images", 2, SOON).await;
    link.cut();
    link.heal();
    fleet.await_all_final(SOON).await;
    // It asked again, heard that its own lease had recorded them, and acknowledged: nothing was drawn twice.
    worker.says("Completed 2 pictures", SOON).await;
    fleet.assert_nothing_lost_nothing_twice(&batch, 2, 0).await;
    assert_eq!(fleet.count("SELECT count(*) FROM attempts").await, 2);
    assert_eq!(fleet.count("SELECT count(*) FROM attempts WHERE outcome <> 'ok'").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_whose_answer_is_lost_lapses_and_the_job_is_drawn_all_the_same() {
    let fleet = Fleet::new(Servers::shared()).await;
    let link = Link::to(&fleet, Wall::Postgres).await;
    let worker =
        fleet.solid_color_worker_with(&[link.env()], 20, &["--max-microbatch", "2", "--lease-seconds", "3"]);
    worker.says("Consuming from the broker", SOON).await;
    let batch = fleet.submit("one\ntwo\n", &SMALL);
    let mut hold = fleet.pool().begin().await.unwrap();
    sqlx::query("SELECT FROM jobs FOR UPDATE").execute(&mut *hold).await.unwrap();
    let _serve = fleet.serve_with(&[], &["--republish-after", "4"]);
    await_waiting(&fleet, "INSERT INTO attempts").await;
    link.set(Mode::HoldAnswers);
    hold.commit().await.unwrap();
    fleet.await_running(SOON).await;
    link.cut();
    link.heal();
    fleet.await_all_final(SOON).await;
    fleet.assert_nothing_lost_nothing_twice(&batch, 2, 0).await;
    let lost = "SELECT count(*) FROM attempts WHERE outcome = 'lost'";
    assert!(fleet.count(lost).await >= 1, "nobody knew of that lease, so it lapsed");
    assert_eq!(
        fleet.count("SELECT count(*) FROM jobs WHERE attempt <> 1").await,
        0,
        "and it cost the jobs nothing"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_may_crash_under_load() {
    let fleet = Fleet::new(Arc::new(Servers::start())).await;
    let batch = fleet.submit(&"a prompt\n".repeat(60), &SMALL);
    let mut serve = fleet.serve_with(&[], &["--republish-after", "5", "--watermark", "8"]);
    let mut worker = fleet.solid_color_worker(60, &WORKER);
    for seen in [4, 20] {
        let done = || fleet.jobs_in("completed");
        fleet_tests::eventually("more pictures", SOON, done, |done| *done >= seen).await;
        fleet.servers().restart_postgres(SOON).await;
    }
    fleet.await_all_final(SOON).await;
    fleet.assert_nothing_lost_nothing_twice(&batch, 60, 0).await;
    assert_eq!(
        fleet.count("SELECT count(*) FROM attempts WHERE outcome = 'error'").await,
        0,
        "no job's fault"
    );
    assert_eq!(fleet.count("SELECT count(*) FROM jobs WHERE attempt <> 1").await, 0);
    for process in [&mut worker, &mut serve] {
        process.signal(Signal::SIGTERM);
        assert!(process.exit(SOON).await.success(), "{}", process.log());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_submission_whose_connection_breaks_half_way_writes_nothing() {
    let fleet = Fleet::new(Servers::shared()).await;
    let link = Link::to(&fleet, Wall::Postgres).await;
    let prompts =
        "a prompt that is long enough to fill some packets before the connection breaks\n".repeat(4000);
    let file = fleet.write("long.txt", &prompts);
    let submit = |env: Option<(&str, String)>| {
        let mut command = fleet.command("darkroom");
        command.args(["submit", file.to_str().unwrap(), "--model", fleet.model(), "--json"]);
        command.args(["--principal", fleet_tests::fleet::PRINCIPAL, "--idempotency-key", "monday"]);
        command.envs(env);
        fleet.spawn("darkroom submit", command)
    };
    link.cut_after(200_000);
    let mut broken = submit(Some(link.env()));
    assert_eq!(broken.exit(SOON).await.code(), Some(1), "{}", broken.log());
    let open =
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'COPY%'
                AND state <> 'idle'";
    fleet.await_count("the transaction to be rolled back", open, 0, SOON).await;
    assert_eq!(fleet.count("SELECT count(*) FROM batches").await, 0);
    assert_eq!(fleet.count("SELECT count(*) FROM jobs").await, 0, "all or nothing");
    let mut again = submit(None);
    assert!(again.exit(SOON).await.success(), "{}", again.log());
    assert_eq!(fleet.count("SELECT count(*) FROM jobs").await, 4000);
}
