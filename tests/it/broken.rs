//! What breaks while a batch runs: nothing is lost and nothing is made twice.

use std::time::Duration;

use fleet_tests::{Fleet, Servers};
use nix::sys::signal::Signal;

const SOON: Duration = Duration::from_secs(120);

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_killed_in_the_middle_of_a_job_loses_and_doubles_nothing() {
    let fleet = Fleet::new(Servers::shared()).await;
    let batch = fleet.submit(&"a prompt\n".repeat(12), &["--num-inference-steps", "10"]);
    let _serve = fleet.serve();
    let options = ["--max-microbatch", "2", "--lease-seconds", "5"];
    let mut killed = fleet.solid_color_worker(60_000, &options);
    fleet.await_running(SOON).await;
    killed.kill();
    let _worker = fleet.solid_color_worker(20, &options);
    fleet.await_all_final(SOON).await;
    assert_eq!(fleet.jobs_in("completed").await, 12);
    // Its last claim may have been on its way when it died, so what it held is known only now.
    let by_the_killed = "SELECT count(*) FROM attempts
        WHERE worker_id = (SELECT worker_id FROM workers ORDER BY started_at LIMIT 1) AND outcome";
    let lost = fleet.count(&format!("{by_the_killed} = 'lost'")).await;
    assert!(lost > 0, "the worker held nothing when it was killed");
    let otherwise = fleet.count(&format!("{by_the_killed} IS DISTINCT FROM 'lost'")).await;
    assert_eq!(otherwise, 0, "each job that it held has a lost attempt");
    fleet.assert_nothing_lost_nothing_twice(&batch, 12, lost as usize).await;
    let charged = "SELECT count(*) FROM jobs WHERE attempt <> 1";
    assert_eq!(fleet.count(charged).await, 0, "a crash spends nothing of the retry budget");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_restart_loses_and_doubles_nothing() {
    let fleet = Fleet::new(std::sync::Arc::new(Servers::start())).await;
    let batch = fleet.submit(&"a prompt\n".repeat(40), &["--num-inference-steps", "10"]);
    let mut serve = fleet.serve();
    let mut worker = fleet.solid_color_worker(300, &["--max-microbatch", "2"]);
    let done = "SELECT count(*) FROM jobs WHERE state = 'completed'";
    fleet_tests::eventually("the first pictures", SOON, || fleet.count(done), |done| *done >= 4).await;
    let before = fleet.count(done).await;
    assert!(before < 40, "the broker has to break in the middle, but all was done");
    fleet.servers().restart_broker(SOON).await;
    fleet.await_all_final(SOON).await;
    assert_eq!(fleet.jobs_in("completed").await, 40);
    fleet.assert_nothing_lost_nothing_twice(&batch, 40, 0).await;
    // Both found their way back by themselves, and still know how to end.
    for process in [&mut worker, &mut serve] {
        process.signal(Signal::SIGTERM);
        assert!(process.exit(SOON).await.success(), "{}", process.log());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_told_to_stop_hands_its_jobs_back_unharmed() {
    let fleet = Fleet::new(Servers::shared()).await;
    let batch = fleet.submit(&"a prompt\n".repeat(6), &["--num-inference-steps", "50"]);
    let _serve = fleet.serve();
    let mut stopped = fleet.solid_color_worker(600_000, &["--max-microbatch", "2", "--grace-seconds", "5"]);
    fleet.await_running(SOON).await;
    stopped.signal(Signal::SIGTERM);
    assert!(stopped.exit(Duration::from_secs(30)).await.success(), "{}", stopped.log());
    assert_eq!(fleet.jobs_in("available").await, 6);
    let otherwise = "SELECT count(*) FROM attempts WHERE outcome IS DISTINCT FROM 'preempted'";
    assert_eq!(fleet.count(otherwise).await, 0, "shutting down is not failing");
    assert_eq!(
        fleet.count("SELECT count(*) FROM jobs WHERE attempt <> 0").await,
        0,
        "the attempt is given back"
    );
    let _worker = fleet.solid_color_worker(20, &[]);
    fleet.await_all_final(SOON).await;
    fleet.assert_nothing_lost_nothing_twice(&batch, 6, 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unreadable_messages_are_dead_lettered_and_block_nobody() {
    use lapin::options::{BasicPublishOptions, QueueDeclareOptions};
    use lapin::types::FieldTable;
    let fleet = Fleet::new(std::sync::Arc::new(Servers::start())).await;
    let _serve = fleet.serve();
    let mut worker = fleet.solid_color_worker(20, &[]);
    let first = fleet.submit("a prompt\n", &["--num-inference-steps", "2"]);
    fleet.await_all_final(SOON).await;
    let uri = &fleet.servers().addresses().amqp_url;
    let connection = lapin::Connection::connect(uri, lapin::ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let queue = format!("darkroom.jobs.{}.normal", fleet.model());
    // Garbage, a message of a version that is not written yet, and one of a job's that lacks a part.
    let unreadable = [&b"not a job"[..], br#"{"version":99,"work":[]}"#, br#"{"version":1}"#, &[0xff; 4000]];
    for body in unreadable {
        let persistent = lapin::BasicProperties::default().with_delivery_mode(2);
        let options = BasicPublishOptions::default();
        channel.basic_publish("".into(), queue.as_str().into(), options, body, persistent).await.unwrap();
    }
    // Through the dead-letter queue into a table, where people find them.
    let recorded =
        format!("SELECT coalesce(sum(seen_count), 0)::bigint FROM dead_letters WHERE queue = '{queue}'");
    fleet.await_count("the dead letters' rows", &recorded, unreadable.len() as i64, SOON).await;
    let dead = async || {
        let passive = QueueDeclareOptions { passive: true, ..Default::default() };
        let queue =
            channel.queue_declare("darkroom.dead".into(), passive, FieldTable::default()).await.unwrap();
        queue.message_count()
    };
    fleet_tests::eventually("the broker to forget it", SOON, dead, |count| *count == 0).await;
    let second = fleet.submit("another\n", &["--num-inference-steps", "2"]);
    fleet.await_all_final(SOON).await;
    for batch in [first, second] {
        fleet.assert_nothing_lost_nothing_twice(&batch, 1, 0).await;
    }
    worker.signal(Signal::SIGTERM);
    assert!(worker.exit(SOON).await.success());
}
