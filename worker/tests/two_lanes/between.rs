//! What goes wrong in one half, and what becomes of the microbatch in the other's hands and of the one between them.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};

use schema::{ErrorClass, JobState, LeaseReturn};
use worker::control::Verdict;
use worker::engine::EngineError;
use worker::pipeline::PipelineError;
use worker::run::{RunError, StopReason};

use crate::pipelines::{ScriptedPipeline, draw, out_of_memory, source, until_one_is_lost, until_stopped};
use crate::worker_under_test::{Event, Setup, WorkerUnderTest};

#[tokio::test]
async fn an_error_of_the_second_half_is_narrowed_down_to_its_job() {
    let mut worker = WorkerUnderTest::new(Setup::full_microbatches(4));
    let jobs = worker.submit_many(0..8);
    worker
        .start_scripted(|log| {
            ScriptedPipeline::new(log, |specs, _| Ok(draw(specs))).finishing(|seeds, _| {
                if seeds.contains(&1) {
                    Err(PipelineError::Bug { source: source("no such thing") })
                } else {
                    Ok(())
                }
            })
        })
        .await;
    worker.wait_for_acks(8).await;
    worker.drain().await.expect("a good end");
    for (ordinal, job_id) in jobs.into_iter().enumerate() {
        let row = worker.row(job_id);
        if ordinal == 1 {
            assert_eq!(row.state, JobState::Retryable);
            assert_eq!(row.failure.expect("a failure").class, ErrorClass::Bug);
        } else {
            assert_eq!((row.state, row.attempt), (JobState::Completed, 1), "job {ordinal}");
        }
    }
    let events = worker.log.events();
    let halves = worker.log.position(&Event::Called(vec![0, 1]));
    let narrowed = worker.log.position(&Event::FinishEnded(vec![1]));
    let others = |event: &&Event| matches!(event, Event::Called(seeds) | Event::Finishing(seeds) if seeds.iter().any(|seed| *seed > 3));
    let beside = events[halves..narrowed].iter().find(others);
    assert_eq!(beside, None, "what is taken apart has nothing beside it: {events:?}");
}

#[tokio::test]
async fn short_memory_in_the_second_half_halves_the_call_and_is_remembered() {
    let mut worker = WorkerUnderTest::new(Setup::full_microbatches(4));
    worker.submit_many(0..4);
    worker
        .start_scripted(|log| {
            ScriptedPipeline::new(log, |specs, _| Ok(draw(specs)))
                .finishing(|seeds, _| if seeds.len() > 2 { Err(out_of_memory(seeds.len())) } else { Ok(()) })
        })
        .await;
    worker.wait_for_acks(4).await;
    worker.submit_many(4..8);
    worker.wait_for_acks(8).await;
    worker.drain().await.expect("a good end");
    let too_large = worker.log.count(|event| matches!(event, Event::Called(seeds) if seeds.len() > 2));
    assert_eq!(too_large, 1, "only the first call was too big: {:?}", worker.log.events());
    assert_eq!(worker.metrics.failed.get(), 0);
}

#[tokio::test]
async fn memory_that_two_microbatches_wanted_at_once_is_neithers_fault() {
    let mut worker = WorkerUnderTest::new(Setup::full_microbatches(1));
    let jobs = worker.submit_many(0..2);
    let both = Arc::new(Barrier::new(2));
    let met = both.clone();
    let (num_running, tries) = (Arc::new(AtomicUsize::new(0)), AtomicUsize::new(0));
    let running = num_running.clone();
    worker
        .start_scripted(move |log| {
            ScriptedPipeline::new(log, move |specs, _| {
                num_running.fetch_add(1, Ordering::SeqCst);
                if specs[0].seed() == 1 {
                    both.wait();
                    // Until the other has failed.
                    both.wait();
                }
                num_running.fetch_sub(1, Ordering::SeqCst);
                Ok(draw(specs))
            })
            .finishing(move |seeds, _| {
                if seeds != [0] {
                    return Ok(());
                }
                if tries.fetch_add(1, Ordering::SeqCst) == 0 {
                    met.wait();
                }
                let is_full = running.load(Ordering::SeqCst) > 0;
                if is_full {
                    met.wait();
                    return Err(out_of_memory(1));
                }
                Ok(())
            })
        })
        .await;
    worker.wait_for_acks(2).await;
    worker.drain().await.expect("a good end");
    for job_id in jobs {
        let row = worker.row(job_id);
        assert_eq!((row.state, row.attempt), (JobState::Completed, 1));
    }
    assert_eq!(worker.metrics.failed.get(), 0);
    assert_eq!(worker.log.count(|event| *event == Event::Finishing(vec![0])), 2, "it was tried again");
}

#[tokio::test]
async fn a_picture_that_does_not_fit_alone_is_charged() {
    let mut worker = WorkerUnderTest::new(Setup::full_microbatches(1));
    let jobs = worker.submit_many(0..3);
    worker
        .start_scripted(|log| {
            ScriptedPipeline::new(log, |specs, _| Ok(draw(specs)))
                .finishing(|seeds, _| if seeds == [1] { Err(out_of_memory(1)) } else { Ok(()) })
        })
        .await;
    worker.wait_for_acks(3).await;
    worker.drain().await.expect("a good end");
    let row = worker.row(jobs[1]);
    assert_eq!(row.state, JobState::Retryable);
    assert_eq!(row.failure.expect("a failure").class, ErrorClass::OutOfMemory);
    assert_eq!((worker.state(jobs[0]), worker.state(jobs[2])), (JobState::Completed, JobState::Completed));
    assert_eq!(
        worker.log.count(|event| *event == Event::Called(vec![1])),
        2,
        "once more with nothing beside it"
    );
}

#[tokio::test]
async fn draining_finishes_what_is_in_both_hands_and_between() {
    let mut worker = WorkerUnderTest::new(Setup::full_microbatches(1));
    let jobs = worker.submit_many(0..6);
    let gate = Arc::new(Barrier::new(2));
    let opened = gate.clone();
    worker
        .start_scripted(move |log| {
            ScriptedPipeline::new(log, |specs, control| {
                control.after_step(1, 1);
                Ok(draw(specs))
            })
            .finishing(move |seeds, _| {
                if seeds == [0] {
                    gate.wait();
                }
                Ok(())
            })
        })
        .await;
    // One is being finished, one waits for it, one is denoised and cannot be handed over, one waits claimed.
    worker.log.wait_for(3, |event| matches!(event, Event::Denoised(_))).await;
    worker.log.wait_for(4, |event| matches!(event, Event::Claimed(_))).await;
    worker.shutdown.drain.cancel();
    worker.log.wait_for(1, |event| *event == Event::ConsumingStopped).await;
    tokio::task::spawn_blocking(move || opened.wait()).await.unwrap();
    assert_eq!(worker.drain().await.expect("a good end"), StopReason::Asked);
    for job_id in &jobs[..3] {
        assert_eq!(worker.state(*job_id), JobState::Completed);
    }
    for job_id in &jobs[3..] {
        let row = worker.row(*job_id);
        assert_eq!((row.state, row.attempt), (JobState::Available, 0), "given back with its attempt");
    }
}

#[tokio::test]
async fn what_is_cancelled_between_the_halves_is_not_finished() {
    let mut worker = WorkerUnderTest::new(Setup::full_microbatches(2));
    let jobs = worker.submit_many(0..6);
    let gate = Arc::new(AtomicBool::new(false));
    let opened = gate.clone();
    worker
        .start_scripted(move |log| {
            let seen = log.clone();
            ScriptedPipeline::new(log.clone(), move |specs, control| {
                if specs[0].seed() != 4 {
                    return Ok(draw(specs));
                }
                // The keeper tells microbatches in their order: what this one has heard, the one before was told.
                let drawn = until_one_is_lost(specs, control);
                opened.store(true, Ordering::SeqCst);
                seen.push(Event::CatalogFailed);
                Ok(drawn)
            })
            .finishing(move |seeds, _| {
                if seeds[0] == 0 {
                    log.wait_for_here(1, |event| *event == Event::CatalogFailed);
                    assert!(gate.load(Ordering::SeqCst));
                }
                Ok(())
            })
        })
        .await;
    worker.log.wait_for(1, |event| *event == Event::Called(vec![4, 5])).await;
    worker.log.wait_for(1, |event| *event == Event::Finishing(vec![0, 1])).await;
    for ordinal in [2, 3, 4] {
        worker.catalog.cancel(jobs[ordinal]);
    }
    worker.wake_up.send(()).await.expect("the worker listens");
    worker.wait_for_acks(6).await;
    worker.drain().await.expect("a good end");
    assert_eq!(worker.log.count(|event| *event == Event::Denoised(vec![2, 3])), 1);
    assert_eq!(worker.log.count(|event| *event == Event::Finishing(vec![2, 3])), 0);
    for ordinal in [0, 1, 5] {
        assert_eq!(worker.state(jobs[ordinal]), JobState::Completed, "job {ordinal}");
    }
    for ordinal in [2, 3, 4] {
        assert_eq!(worker.state(jobs[ordinal]), JobState::Cancelled, "job {ordinal}");
        assert_eq!(worker.log.count(|event| *event == Event::Stored(ordinal as u32)), 0);
    }
    assert_eq!(worker.metrics.leases_lost.get(), 3);
}

/// A worker of two microbatches of `size`: the second half of the first fails as `fail` says while the first half of the second goes
/// on until it is told to stop.
async fn after_a_poisoned_second_half(
    size: usize,
    fail: fn() -> PipelineError,
) -> (WorkerUnderTest, Vec<schema::JobId>, Result<StopReason, RunError>) {
    let mut worker = WorkerUnderTest::new(Setup::full_microbatches(size));
    let jobs = worker.submit_many(0..2 * size as u32);
    let second = size as u32;
    worker
        .start_scripted(move |log| {
            let seen = log.clone();
            ScriptedPipeline::new(log, move |specs, control| {
                Ok(if specs[0].seed() == second { until_stopped(specs, control) } else { draw(specs) })
            })
            .finishing(move |_, _| {
                seen.wait_for_here(1, |event| matches!(event, Event::Called(seeds) if seeds[0] == second));
                Err(fail())
            })
        })
        .await;
    let ended = worker.ended().await;
    (worker, jobs, ended)
}

#[tokio::test]
async fn a_panic_in_the_second_half_leaves_the_first_half_unharmed() {
    let (worker, jobs, ended) = after_a_poisoned_second_half(1, || panic!("a mistake in the decoder")).await;
    assert!(
        matches!(ended, Err(RunError::Engine(EngineError::Poisoned(PipelineError::Panicked { .. })))),
        "{ended:?}"
    );
    let row = worker.row(jobs[0]);
    assert_eq!(row.state, JobState::Retryable, "it was alone, so it is the reason");
    assert_eq!(row.failure.expect("a failure").message, "the pipeline panicked: a mistake in the decoder");
    let row = worker.row(jobs[1]);
    assert_eq!((row.state, row.attempt), (JobState::Available, 0));
    assert_ne!(row.released_as, Some(LeaseReturn::Suspected));
}

#[tokio::test]
async fn a_device_that_fails_in_one_half_makes_suspects_of_both() {
    let fail = || PipelineError::Device { source: source("an illegal memory access") };
    let (worker, jobs, ended) = after_a_poisoned_second_half(2, fail).await;
    assert!(matches!(ended, Err(RunError::Engine(EngineError::Poisoned(PipelineError::Device { .. })))));
    for job_id in jobs {
        let row = worker.row(job_id);
        assert_eq!((row.state, row.attempt), (JobState::Available, 0));
        assert_eq!(row.released_as, Some(LeaseReturn::Suspected), "whose kernel it was, nobody knows");
    }
}

#[tokio::test]
async fn a_panic_in_the_first_half_leaves_the_second_half_its_pictures() {
    let mut worker = WorkerUnderTest::new(Setup::full_microbatches(2));
    let jobs = worker.submit_many(0..4);
    worker
        .start_scripted(|log| {
            let seen = log.clone();
            ScriptedPipeline::new(log, move |specs, _| {
                if specs[0].seed() == 2 {
                    seen.wait_for_here(1, |event| *event == Event::Finishing(vec![0, 1]));
                    panic!("a mistake in the model code");
                }
                Ok(draw(specs))
            })
            // It ends after the panic, which it hears of.
            .finishing(|_, control| {
                while control.verdict() != Verdict::Stop {
                    std::thread::yield_now();
                }
                Ok(())
            })
        })
        .await;
    worker.ended().await.expect_err("the process has to end with an error");
    for job_id in &jobs[..2] {
        assert_eq!(worker.state(*job_id), JobState::Completed);
    }
    for job_id in &jobs[2..] {
        assert_eq!(worker.row(*job_id).released_as, Some(LeaseReturn::Suspected));
    }
}
