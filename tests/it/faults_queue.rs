//! F4, F7 and F8: a broker that loses everything, says everything ten times, or has no room.

use std::sync::Arc;
use std::time::Duration;

use fleet_tests::{Broker, Fleet, Servers};
use schema::PriorityBand;

const SOON: Duration = Duration::from_secs(180);
const SMALL: [&str; 6] = ["--num-inference-steps", "4", "--width", "64", "--height", "64"];
const WORKER: [&str; 4] = ["--max-microbatch", "2", "--lease-seconds", "3"];
const SERVE: [&str; 2] = ["--republish-after", "3"];

#[tokio::test(flavor = "multi_thread")]
async fn deleted_queues_are_made_and_filled_again() {
    let fleet = Fleet::new(Servers::shared()).await;
    let broker = Broker::of(&fleet).await;
    let batch = fleet.submit(&"a prompt\n".repeat(40), &SMALL);
    let _serve = fleet.serve_with(&[], &SERVE);
    let _worker = fleet.solid_color_worker(100, &WORKER);
    let done = || fleet.jobs_in("completed");
    fleet_tests::eventually("the first pictures", SOON, done, |done| *done >= 4).await;
    for &band in PriorityBand::ALL {
        broker.delete(&fleet.queue(band)).await;
    }
    assert!(fleet.jobs_in("completed").await < 40, "the queues went too late to matter");
    fleet.await_all_final(SOON).await;
    fleet.assert_nothing_lost_nothing_twice(&batch, 40, 0).await;
    assert_eq!(fleet.count("SELECT count(*) FROM jobs WHERE attempt <> 1").await, 0);
}

/// What RabbitMQ 3.10 is left with when its dead-letter supervisor gives up in the middle of a declaration: the queue is
/// there for all who ask, and nobody behind it answers.
#[tokio::test(flavor = "multi_thread")]
async fn a_queue_whose_process_is_gone_for_good_is_made_anew() {
    let fleet = Fleet::new(Arc::new(Servers::start())).await;
    let _serve = fleet.serve_with(&[], &SERVE);
    let _worker = fleet.solid_color_worker(20, &WORKER);
    fleet.submit("before\n", &SMALL);
    fleet.await_all_final(SOON).await;
    let queue = fleet.queue(PriorityBand::Normal);
    fleet.servers().stop_queue_process(&queue);
    let batch = fleet.submit(&"a prompt\n".repeat(6), &SMALL);
    // Nothing else is kept waiting.
    let high = fleet.submit("another queue\n", &[&SMALL[..], &["--priority", "high"]].concat());
    fleet.await_all_final(SOON).await;
    fleet.assert_nothing_lost_nothing_twice(&batch, 6, 0).await;
    fleet.assert_nothing_lost_nothing_twice(&high, 1, 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn purged_messages_are_published_again() {
    let fleet = Fleet::new(Servers::shared()).await;
    let broker = Broker::of(&fleet).await;
    let batch = fleet.submit(&"a prompt\n".repeat(10), &SMALL);
    let _serve = fleet.serve_with(&[], &SERVE);
    let published = "SELECT count(*) FROM jobs WHERE published_at IS NOT NULL";
    fleet.await_count("all messages to be published", published, 10, SOON).await;
    assert_eq!(broker.purge(&fleet.queue(PriorityBand::Normal)).await, 10);
    let _worker = fleet.solid_color_worker(20, &WORKER);
    fleet.await_all_final(SOON).await;
    fleet.assert_nothing_lost_nothing_twice(&batch, 10, 0).await;
    assert_eq!(fleet.count("SELECT count(*) FROM attempts").await, 10);
}

/// Everything that is recorded about jobs, attempts and images, as one number.
async fn record(fleet: &Fleet) -> i64 {
    fleet
        .count(
            "SELECT hashtextextended(string_agg(line, '|' ORDER BY line), 0) FROM (
                 SELECT jobs::text AS line FROM jobs UNION ALL SELECT attempts::text FROM attempts
                 UNION ALL SELECT images::text FROM images) AS lines",
        )
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_delivered_ten_times_change_nothing() {
    let fleet = Fleet::new(Servers::shared()).await;
    let broker = Broker::of(&fleet).await;
    let queue = fleet.queue(PriorityBand::Normal);
    // Declares the queues.
    let mut worker = fleet.solid_color_worker(20, &WORKER);
    let exists = || broker.ready(&queue);
    fleet_tests::eventually("the queue", SOON, exists, Option::is_some).await;
    let batch = fleet.submit(&"a prompt\n".repeat(4), &SMALL);
    let unwanted = fleet.submit("never mind\n", &SMALL);
    fleet.darkroom(&["cancel", &unwanted]).succeeded();
    let mut messages = fleet.messages(&batch).await;
    messages.extend(fleet.messages(&unwanted).await);

    // While they are available, cancelled, running and completed, all mixed: no scheduler has published anything.
    for round in 0..10 {
        messages.rotate_left(round % 5);
        for message in &messages {
            broker.publish(&queue, message).await;
        }
    }
    fleet.await_all_final(SOON).await;
    assert_eq!(
        fleet.count("SELECT count(*) FROM attempts").await,
        4,
        "one attempt a job, none of the cancelled"
    );
    assert_eq!(fleet.jobs_in("cancelled").await, 1);
    fleet.assert_nothing_lost_nothing_twice(&batch, 4, 0).await;

    // Long after.
    let before = record(&fleet).await;
    for _ in 0..10 {
        messages.reverse();
        for message in &messages {
            broker.publish(&queue, message).await;
        }
    }
    let drained = || broker.ready(&queue);
    fleet_tests::eventually("the queue to be drained", SOON, drained, |ready| *ready == Some(0)).await;
    assert_eq!(record(&fleet).await, before, "late messages change nothing");
    let _serve = fleet.serve();
    broker.assert_all_spent(&fleet, &mut worker, &SMALL, SOON).await;
    assert_eq!(fleet.count("SELECT count(*) FROM attempts").await, 5, "the last job's is the only new one");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_without_memory_or_disk_makes_the_relay_wait_and_nothing_else() {
    let fleet = Fleet::new(Arc::new(Servers::start())).await;
    let serve = fleet.serve_with(&[], &SERVE);
    let _worker = fleet.solid_color_worker(20, &WORKER);
    fleet.submit("one\n", &SMALL);
    fleet.await_all_final(SOON).await;
    let unpublished = "SELECT count(*) FROM jobs WHERE state = 'available' AND published_at IS NULL";
    for (full, roomy) in [
        (&["set_disk_free_limit", "50000GB"][..], &["set_disk_free_limit", "200MB"][..]),
        (&["set_vm_memory_high_watermark", "0.00001"], &["set_vm_memory_high_watermark", "0.9"]),
    ] {
        let told = serve.log().matches("The broker blocks publishers").count();
        fleet.servers().rabbitmqctl(full);
        // Accepted without the broker.
        let batch = fleet.submit("two\nthree\n", &SMALL);
        let blocked = || async { serve.log().matches("The broker blocks publishers").count() };
        fleet_tests::eventually("the alarm", SOON, blocked, |now| *now > told).await;
        assert_eq!(fleet.count(unpublished).await, 2, "{full:?}: the backlog waits in Postgres");
        fleet.servers().rabbitmqctl(roomy);
        fleet.await_all_final(SOON).await;
        fleet.assert_nothing_lost_nothing_twice(&batch, 2, 0).await;
    }
    assert_eq!(fleet.count("SELECT count(*) FROM attempts WHERE outcome <> 'ok'").await, 0);
}
