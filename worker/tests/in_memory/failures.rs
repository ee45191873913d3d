//! Servers that are away, and pipelines that fail in every way they can.

use std::sync::atomic::Ordering;

use schema::{ErrorClass, JobState, LeaseReturn, PriorityBand, ValidJobSpec};
use worker::engine::EngineError;
use worker::pipeline::{PictureOutcome, PipelineError};
use worker::run::RunError;

use crate::pipelines::{ScriptedPipeline, draw, out_of_memory, source};
use crate::worker_under_test::{Event, Setup, WorkerUnderTest};

fn has_seed(specs: &[&ValidJobSpec], seed: u32) -> bool {
    specs.iter().any(|spec| spec.seed() == seed)
}

#[tokio::test]
async fn servers_that_come_back_cost_no_attempt() {
    let mut worker = WorkerUnderTest::new(Setup::full_microbatches(2));
    let jobs = worker.submit_many(0..2);
    worker.store.failures_left.store(2, Ordering::SeqCst);
    worker.catalog.failures_left.store(2, Ordering::SeqCst);
    worker.start_scripted(|log| ScriptedPipeline::new(log, |specs, _| Ok(draw(specs)))).await;
    worker.wait_for_acks(2).await;
    worker.drain().await.expect("a good end");
    for job_id in jobs {
        let row = worker.row(job_id);
        assert_eq!((row.state, row.attempt), (JobState::Completed, 1));
        assert!(row.failure.is_none());
    }
    assert_eq!(worker.log.count(|event| *event == Event::CatalogFailed), 2);
    assert_eq!(worker.log.count(|event| *event == Event::StoreFailed), 2);
}

#[tokio::test]
async fn jobs_whose_pictures_cannot_be_stored_go_back_unharmed() {
    let mut worker = WorkerUnderTest::new(Setup::default());
    let job_id = worker.submit(0, PriorityBand::Normal);
    worker.store.failures_left.store(usize::MAX, Ordering::SeqCst);
    worker.start_scripted(|log| ScriptedPipeline::new(log, |specs, _| Ok(draw(specs)))).await;
    worker.log.wait_for(1, |event| *event == Event::StoreFailed).await;
    worker.shutdown.hasten.cancel();
    worker.drain().await.expect("a good end");
    let row = worker.row(job_id);
    assert_eq!((row.state, row.attempt), (JobState::Available, 0));
    assert!(
        worker.log.position(&Event::Released(vec![0])) < worker.log.position(&Event::Requeued(Some(job_id)))
    );
}

#[tokio::test]
async fn a_refused_row_does_not_take_its_neighbors_down() {
    let mut worker = WorkerUnderTest::new(Setup::full_microbatches(4));
    let jobs = worker.submit_many(0..4);
    *worker.catalog.refused_ordinal.lock().unwrap() = Some(1);
    worker.start_scripted(|log| ScriptedPipeline::new(log, |specs, _| Ok(draw(specs)))).await;
    worker.wait_for_acks(4).await;
    worker.drain().await.expect("a good end");
    let refused = worker.row(jobs[1]);
    assert_eq!(refused.state, JobState::Retryable);
    assert_eq!(refused.failure.expect("a failure").class, ErrorClass::Bug);
    for job_id in [jobs[0], jobs[2], jobs[3]] {
        assert_eq!(worker.state(job_id), JobState::Completed);
    }
}

#[tokio::test]
async fn an_error_of_a_whole_call_is_narrowed_down_to_its_job() {
    let mut worker = WorkerUnderTest::new(Setup::full_microbatches(4));
    let jobs = worker.submit_many(0..4);
    let fail = |specs: &[&ValidJobSpec]| {
        if has_seed(specs, 2) {
            Err(PipelineError::Input { source: source("no such thing") })
        } else {
            Ok(draw(specs))
        }
    };
    worker.start_scripted(move |log| ScriptedPipeline::new(log, move |specs, _| fail(specs))).await;
    worker.wait_for_acks(4).await;
    worker.drain().await.expect("a good end");
    let row = worker.row(jobs[2]);
    assert_eq!(row.state, JobState::Discarded);
    let failure = row.failure.expect("a failure");
    assert_eq!(failure.class, ErrorClass::Input);
    assert_eq!(failure.message, "the model cannot run this job: no such thing");
    for job_id in [jobs[0], jobs[1], jobs[3]] {
        let row = worker.row(job_id);
        assert_eq!((row.state, row.attempt), (JobState::Completed, 1));
    }
}

#[tokio::test]
async fn short_memory_halves_the_call_and_is_remembered() {
    let mut worker = WorkerUnderTest::new(Setup::full_microbatches(4));
    worker.submit_many(0..4);
    let fit = |specs: &[&ValidJobSpec]| {
        let batch_size = specs.len();
        if batch_size > 2 { Err(out_of_memory(batch_size)) } else { Ok(draw(specs)) }
    };
    worker.start_scripted(move |log| ScriptedPipeline::new(log, move |specs, _| fit(specs))).await;
    worker.wait_for_acks(4).await;
    worker.submit_many(4..8);
    worker.wait_for_acks(8).await;
    worker.drain().await.expect("a good end");
    let calls: Vec<usize> = worker
        .log
        .events()
        .iter()
        .filter_map(|event| match event {
            Event::Called(seeds) => Some(seeds.len()),
            _ => None,
        })
        .collect();
    assert_eq!(
        calls.iter().filter(|size| **size > 2).count(),
        1,
        "only the first call was too big: {calls:?}"
    );
    assert_eq!(worker.metrics.failed.get(), 0);
}

#[tokio::test]
async fn numbers_that_are_not_finite_fail_their_picture_alone() {
    let mut worker = WorkerUnderTest::new(Setup::full_microbatches(2));
    let jobs = worker.submit_many(0..2);
    let fail_first = |specs: &[&ValidJobSpec]| {
        let mut pictures = draw(specs);
        if let Some(index) = specs.iter().position(|spec| spec.seed() == 0) {
            let error = PipelineError::NonFinite { tensor: "latents".to_owned() };
            pictures[index] = PictureOutcome::Failed(error);
        }
        Ok(pictures)
    };
    worker.start_scripted(move |log| ScriptedPipeline::new(log, move |specs, _| fail_first(specs))).await;
    worker.wait_for_acks(2).await;
    worker.drain().await.expect("a good end");
    let row = worker.row(jobs[0]);
    assert_eq!(
        (row.state, row.failure.expect("a failure").class),
        (JobState::Retryable, ErrorClass::NonFinite)
    );
    assert_eq!(worker.state(jobs[1]), JobState::Completed);
}

#[tokio::test]
async fn a_job_that_failed_before_runs_alone() {
    let mut worker = WorkerUnderTest::new(Setup::full_microbatches(4));
    let jobs = worker.submit_many(0..4);
    worker.catalog.update(jobs[1], |row| row.attempt = 1);
    worker.start_scripted(|log| ScriptedPipeline::new(log, |specs, _| Ok(draw(specs)))).await;
    worker.wait_for_acks(4).await;
    worker.drain().await.expect("a good end");
    assert_eq!(worker.log.count(|event| *event == Event::Called(vec![1])), 1);
    let with_others =
        |event: &Event| matches!(event, Event::Called(seeds) if seeds.len() > 1 && seeds.contains(&1));
    assert_eq!(worker.log.count(with_others), 0);
}

#[tokio::test]
async fn a_panic_poisons_the_engine_and_gives_back_what_waits() {
    let mut worker = WorkerUnderTest::new(Setup::full_microbatches(4));
    let first = worker.submit_many(0..4);
    let second = worker.submit_many(4..8);
    let log = worker.log.clone();
    let fall = move || -> ! {
        // Not before the second microbatch is claimed and waits in the engine's channel.
        let started = std::time::Instant::now();
        while log.count(|event| matches!(event, Event::Claimed(_))) < 2 {
            assert!(started.elapsed() < crate::worker_under_test::PATIENCE);
            std::thread::yield_now();
        }
        panic!("a mistake in the model code")
    };
    worker.start_scripted(move |log| ScriptedPipeline::new(log, move |_, _| fall())).await;
    let ended = worker.ended().await;
    assert!(
        matches!(ended, Err(RunError::Engine(EngineError::Poisoned(PipelineError::Panicked { .. })))),
        "the process has to end with an error, but: {ended:?}"
    );
    for job_id in first {
        let row = worker.row(job_id);
        assert_eq!(
            (row.state, row.attempt),
            (JobState::Available, 0),
            "one of four is guilty, and not known yet"
        );
        assert_eq!(row.released_as, Some(LeaseReturn::Suspected));
        assert!(row.failure.is_none());
    }
    for job_id in second {
        let row = worker.row(job_id);
        assert_eq!((row.state, row.attempt), (JobState::Available, 0));
        assert_ne!(row.released_as, Some(LeaseReturn::Suspected), "it was not even begun");
    }
}

#[tokio::test]
async fn a_picture_that_panics_alone_is_charged() {
    let mut worker = WorkerUnderTest::new(Setup::full_microbatches(1));
    let job_id = worker.submit(0, PriorityBand::Normal);
    worker
        .start_scripted(|log| ScriptedPipeline::new(log, |_, _| panic!("a mistake in the model code")))
        .await;
    worker.ended().await.expect_err("the process has to end with an error");
    let row = worker.row(job_id);
    assert_eq!(row.state, JobState::Retryable);
    let failure = row.failure.expect("a failure");
    assert_eq!((failure.class, failure.can_retry_help), (ErrorClass::Bug, true));
    assert_eq!(failure.message, "the pipeline panicked: a mistake in the model code");
}

#[tokio::test]
async fn a_device_that_fails_charges_nobody() {
    let mut worker = WorkerUnderTest::new(Setup::full_microbatches(1));
    let job_id = worker.submit(0, PriorityBand::Normal);
    let fail = || PipelineError::Device { source: source("an illegal memory access") };
    worker.start_scripted(move |log| ScriptedPipeline::new(log, move |_, _| Err(fail()))).await;
    worker.ended().await.expect_err("the process has to end with an error");
    let row = worker.row(job_id);
    assert_eq!((row.state, row.attempt), (JobState::Available, 0));
    assert_eq!(row.released_as, Some(LeaseReturn::Suspected));
}

#[tokio::test]
async fn a_suspect_runs_alone_on_a_worker_that_holds_nothing_else() {
    let mut worker = WorkerUnderTest::new(Setup { max_microbatch: 2, ..Setup::default() });
    let jobs = worker.submit_many(0..2);
    let suspect = worker.catalog.insert(worker.batch_id, 2, worker.row(jobs[0]).spec);
    worker.catalog.update(suspect, |row| row.microbatch_limit = Some(1));
    worker.publish(suspect, PriorityBand::Normal);
    let more = worker.submit_many(3..5);
    worker.start_scripted(|log| ScriptedPipeline::new(log, |specs, _| Ok(draw(specs)))).await;
    worker.wait_for_acks(5).await;
    worker.drain().await.expect("a good end");
    for job_id in jobs.into_iter().chain(more).chain([suspect]) {
        assert_eq!(worker.state(job_id), JobState::Completed);
    }
    let events = worker.log.events();
    let claimed = worker.log.position(&Event::Claimed(vec![2]));
    let completed = worker.log.position(&Event::Completed(vec![2]));
    let held = |events: &[Event]| {
        events.iter().fold(0_i64, |held, event| match event {
            Event::Claimed(ordinals) => held + ordinals.len() as i64,
            Event::Acked(_) => held - 1,
            _ => held,
        })
    };
    assert_eq!(held(&events[..claimed]), 0, "something was held when the suspect was claimed: {events:?}");
    let between = &events[claimed + 1..completed];
    assert!(!between.iter().any(|event| matches!(event, Event::Claimed(_))), "claimed beside it: {events:?}");
}

#[tokio::test]
async fn a_message_from_before_the_loss_does_not_bring_a_suspect_into_company() {
    let mut worker = WorkerUnderTest::new(Setup::full_microbatches(2));
    let jobs = worker.submit_many(0..2);
    worker.catalog.update(jobs[1], |row| row.microbatch_limit = Some(1));
    worker.start_scripted(|log| ScriptedPipeline::new(log, |specs, _| Ok(draw(specs)))).await;
    worker.wait_for_acks(2).await;
    worker.drain().await.expect("a good end");
    assert_eq!(worker.state(jobs[0]), JobState::Completed);
    let row = worker.row(jobs[1]);
    assert_eq!((row.state, row.attempt), (JobState::Available, 0));
    assert_eq!(
        row.released_as,
        Some(LeaseReturn::MessageSettled),
        "the relay sends a message with the limit"
    );
}

#[tokio::test]
async fn a_worker_that_fails_job_after_job_alike_stops_and_hands_back() {
    let mut worker = WorkerUnderTest::new(Setup { unfit_after: 3, ..Setup::full_microbatches(1) });
    let jobs = worker.submit_many(0..6);
    worker.start_scripted(|log| ScriptedPipeline::new(log, |_, _| Err(out_of_memory(1)))).await;
    let ended = worker.ended().await;
    assert!(
        matches!(&ended, Err(RunError::Unfit { reason }) if reason.starts_with("3 jobs in a row")),
        "{ended:?}"
    );
    let states: Vec<JobState> = jobs.iter().map(|job_id| worker.state(*job_id)).collect();
    assert_eq!(states.iter().filter(|state| **state == JobState::Retryable).count(), 2, "{states:?}");
    assert_eq!(states.iter().filter(|state| **state == JobState::Available).count(), 4, "{states:?}");
}
