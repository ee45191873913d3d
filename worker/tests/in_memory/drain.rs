//! Shutting down: what fits is finished, what does not goes back, nothing is charged and nothing is lost.

use std::time::Duration;

use schema::{JobState, LeaseReturn};
use worker::run::StopReason;

use crate::pipelines::{Gate, ScriptedPipeline, until_stopped};
use crate::worker_under_test::{Event, PATIENCE, Setup, WorkerUnderTest};

#[tokio::test]
async fn what_runs_is_finished_if_it_fits_and_what_waits_goes_back() {
    let mut worker = WorkerUnderTest::new(Setup::full_microbatches(2));
    let gate = Gate::default();
    let passed = gate.clone();
    let jobs = worker.submit_many(0..9);
    worker
        .start_scripted(move |log| {
            ScriptedPipeline::new(log, move |specs, control| Ok(passed.pass(specs, control)))
        })
        .await;
    // One microbatch runs, one waits claimed, and the rest are messages.
    worker.log.wait_for(2, |event| matches!(event, Event::Claimed(_))).await;
    worker.log.wait_for(1, |event| matches!(event, Event::Called(_))).await;
    worker.shutdown.drain.cancel();
    worker.log.wait_for(1, |event| *event == Event::ConsumingStopped).await;
    gate.open();
    assert_eq!(worker.drain().await.expect("a good end"), StopReason::Asked);
    for job_id in &jobs[..2] {
        assert_eq!(worker.state(*job_id), JobState::Completed);
    }
    for job_id in &jobs[2..] {
        let row = worker.row(*job_id);
        assert_eq!((row.state, row.attempt), (JobState::Available, 0), "given back with its attempt");
    }
    // The waiting microbatch: first the lease, then the message.
    for job_id in &jobs[2..4] {
        assert!(
            worker.log.position(&Event::Released(vec![2, 3]))
                < worker.log.position(&Event::Requeued(Some(*job_id)))
        );
    }
    // Whatever else was taken in is back in its queue, unclaimed.
    assert_eq!(worker.log.count(|event| matches!(event, Event::Claimed(_))), 2);
}

#[tokio::test]
async fn what_does_not_fit_stops_after_its_step() {
    // An endless microbatch and a minute of grace: only the estimate can stop it before the test's patience is over.
    let mut worker = WorkerUnderTest::new(Setup { grace: PATIENCE * 2, ..Setup::full_microbatches(2) });
    let jobs = worker.submit_many(0..2);
    worker
        .start_scripted(|log| ScriptedPipeline::new(log, |specs, control| Ok(until_stopped(specs, control))))
        .await;
    worker.log.wait_for(1, |event| matches!(event, Event::Called(_))).await;
    assert_eq!(worker.drain().await.expect("a good end"), StopReason::Asked);
    for job_id in jobs {
        let row = worker.row(job_id);
        assert_eq!((row.state, row.attempt), (JobState::Available, 0));
        assert_eq!(row.released_as, Some(LeaseReturn::MessageRequeued));
    }
}

#[tokio::test]
async fn a_second_signal_stops_even_what_would_fit() {
    // So much grace that nothing but the second signal ends it in the test's time.
    let mut worker = WorkerUnderTest::new(Setup { grace: PATIENCE * 100, ..Setup::default() });
    let jobs = worker.submit_many(0..1);
    let closed = Gate::default();
    worker
        .start_scripted(move |log| {
            ScriptedPipeline::new(log, move |specs, control| Ok(closed.pass(specs, control)))
        })
        .await;
    worker.log.wait_for(1, |event| matches!(event, Event::Called(_))).await;
    worker.shutdown.drain.cancel();
    worker.log.wait_for(1, |event| *event == Event::ConsumingStopped).await;
    worker.shutdown.hasten.cancel();
    worker.drain().await.expect("a good end");
    assert_eq!(worker.state(jobs[0]), JobState::Available);
}

#[tokio::test]
async fn the_end_of_the_grace_period_stops_what_was_thought_to_fit() {
    let mut worker = WorkerUnderTest::new(Setup { grace: Duration::from_secs(2), ..Setup::default() });
    let jobs = worker.submit_many(0..1);
    let closed = Gate::default();
    worker
        .start_scripted(move |log| {
            ScriptedPipeline::new(log, move |specs, control| Ok(closed.pass(specs, control)))
        })
        .await;
    worker.log.wait_for(1, |event| matches!(event, Event::Called(_))).await;
    worker.drain().await.expect("a good end");
    assert_eq!(worker.state(jobs[0]), JobState::Available);
}

#[tokio::test]
async fn after_a_lost_connection_released_jobs_ask_to_be_published_again() {
    let mut worker = WorkerUnderTest::new(Setup::full_microbatches(2));
    let jobs = worker.submit_many(0..2);
    worker
        .start_scripted(|log| ScriptedPipeline::new(log, |specs, control| Ok(until_stopped(specs, control))))
        .await;
    worker.log.wait_for(1, |event| matches!(event, Event::Called(_))).await;
    worker.disconnect();
    worker.drain().await.expect("a good end");
    for job_id in jobs {
        assert_eq!(worker.row(job_id).released_as, Some(LeaseReturn::MessageSettled));
    }
}

#[tokio::test]
async fn an_idle_worker_drains_at_once() {
    let mut worker = WorkerUnderTest::new(Setup::default());
    worker.start_solid_color(Duration::ZERO).await;
    assert_eq!(worker.drain().await.expect("a good end"), StopReason::Asked);
}
