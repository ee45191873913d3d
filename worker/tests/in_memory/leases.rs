//! Leases that are lost: by cancelling, by rescue, while running and at the last moment.

use schema::{JobState, PriorityBand};

use crate::pipelines::{Gate, ScriptedPipeline, until_one_is_lost};
use crate::worker_under_test::{Event, Setup, WorkerUnderTest};

#[tokio::test]
async fn a_cancelled_job_is_dropped_and_its_neighbors_go_on() {
    let mut worker = WorkerUnderTest::new(Setup::full_microbatches(4));
    let jobs = worker.submit_many(0..4);
    worker
        .start_scripted(|log| {
            ScriptedPipeline::new(log, |specs, control| Ok(until_one_is_lost(specs, control)))
        })
        .await;
    worker.log.wait_for(1, |event| matches!(event, Event::Called(_))).await;
    worker.catalog.cancel(jobs[2]);
    worker.wake_up.send(()).await.expect("the worker listens");
    worker.wait_for_acks(4).await;
    worker.drain().await.expect("a good end");
    assert_eq!(worker.state(jobs[2]), JobState::Cancelled);
    assert_eq!(worker.log.count(|event| *event == Event::Stored(2)), 0, "nothing of it is stored");
    for job_id in [jobs[0], jobs[1], jobs[3]] {
        assert_eq!(worker.state(job_id), JobState::Completed);
    }
    assert_eq!(worker.metrics.leases_lost.get(), 1);
}

#[tokio::test]
async fn a_cancellation_without_a_notice_is_seen_at_the_next_tick() {
    let mut worker = WorkerUnderTest::new(Setup::full_microbatches(2));
    let jobs = worker.submit_many(0..2);
    worker
        .start_scripted(|log| {
            ScriptedPipeline::new(log, |specs, control| Ok(until_one_is_lost(specs, control)))
        })
        .await;
    worker.log.wait_for(1, |event| matches!(event, Event::Called(_))).await;
    worker.catalog.cancel(jobs[0]);
    worker.wait_for_acks(2).await;
    worker.drain().await.expect("a good end");
    assert_eq!(worker.state(jobs[0]), JobState::Cancelled);
    assert_eq!(worker.state(jobs[1]), JobState::Completed);
}

#[tokio::test]
async fn a_microbatch_that_is_lost_whole_ends_early() {
    let mut worker = WorkerUnderTest::new(Setup::full_microbatches(2));
    let jobs = worker.submit_many(0..2);
    worker
        .start_scripted(|log| {
            ScriptedPipeline::new(log, |specs, control| Ok(crate::pipelines::until_stopped(specs, control)))
        })
        .await;
    worker.log.wait_for(1, |event| matches!(event, Event::Called(_))).await;
    jobs.iter().for_each(|job_id| worker.catalog.cancel(*job_id));
    worker.wait_for_acks(2).await;
    worker.drain().await.expect("a good end");
    assert_eq!(worker.metrics.released.get(), 0);
    assert!(jobs.iter().all(|job_id| worker.state(*job_id) == JobState::Cancelled));
}

#[tokio::test]
async fn a_late_writer_changes_nothing() {
    let mut worker = WorkerUnderTest::new(Setup::default());
    let job_id = worker.submit(0, PriorityBand::Normal);
    let gate = Gate::default();
    let passed = gate.clone();
    worker
        .start_scripted(move |log| {
            ScriptedPipeline::new(log, move |specs, control| Ok(passed.pass(specs, control)))
        })
        .await;
    worker.log.wait_for(1, |event| matches!(event, Event::Called(_))).await;
    // Rescued and claimed by another worker, which the guard tells by the generation.
    worker.catalog.rescue(job_id);
    worker.catalog.update(job_id, |row| {
        (row.state, row.attempt) = (JobState::Running, 1);
        row.lease_generation += 1;
    });
    gate.open();
    worker.wait_for_acks(1).await;
    worker.drain().await.expect("a good end");
    let row = worker.row(job_id);
    assert_eq!((row.state, row.lease_generation), (JobState::Running, 2));
    assert!(row.image.is_none());
    assert_eq!(worker.metrics.leases_lost.get(), 1);
}
