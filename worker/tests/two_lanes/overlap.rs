//! That the two halves of two microbatches run at once, and how far the first gets ahead of the second.

use std::sync::{Arc, Barrier};

use serde_json::Value;
use worker::trace::Trace;

use crate::pipelines::{ScriptedPipeline, draw};
use crate::worker_under_test::{Event, Setup, WorkerUnderTest};

/// The second half of the first microbatch and the first half of the second wait for each other: one after the other they would
/// wait for ever.
#[tokio::test]
async fn a_microbatch_is_finished_while_the_next_is_denoised() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("trace.json");
    let mut worker = WorkerUnderTest::new(Setup::full_microbatches(2));
    worker.trace = Trace::to_file(&file).unwrap();
    worker.submit_many(0..4);
    let begun = Arc::new(Barrier::new(2));
    let ended = Arc::new(Barrier::new(2));
    let (begun_too, ended_too) = (begun.clone(), ended.clone());
    worker
        .start_scripted(move |log| {
            ScriptedPipeline::new(log, move |specs, _| {
                if specs[0].seed() == 2 {
                    begun.wait();
                    ended.wait();
                }
                Ok(draw(specs))
            })
            .finishing(move |seeds, _| {
                if seeds[0] == 0 {
                    begun_too.wait();
                    ended_too.wait();
                }
                Ok(())
            })
        })
        .await;
    worker.wait_for_acks(4).await;
    worker.drain().await.expect("a good end");
    worker.trace.close().expect("the trace is written");

    let events: Vec<Value> = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let spans =
        |name: &str| -> Vec<Value> { events.iter().filter(|event| event["name"] == name).cloned().collect() };
    let (generate, finish) = (spans("generate"), spans("finish"));
    assert_eq!((generate.len(), finish.len()), (2, 2));
    assert_ne!(generate[0]["tid"], finish[0]["tid"], "each thread has its own line");
    assert_ne!(generate[1]["args"]["microbatch"], finish[0]["args"]["microbatch"]);
    let from = |span: &Value| span["ts"].as_f64().unwrap();
    let to = |span: &Value| from(span) + span["dur"].as_f64().unwrap();
    assert!(from(&generate[1]) < to(&finish[0]) && from(&finish[0]) < to(&generate[1]), "{events:?}");
    assert!(to(&generate[0]) <= from(&finish[0]) + 0.01);
}

/// Each second half waits until the first thread is as far ahead as it may get, with one microbatch waiting and one in hand, and
/// then leaves it the processor often enough to begin another call, if it could. If none could wait, the test would hang;
/// if more could, some call would begin too early.
#[tokio::test]
async fn one_microbatch_waits_between_the_halves_and_no_other() {
    const MICROBATCHES: usize = 12;
    const CHANCES: usize = 20_000;
    let mut worker = WorkerUnderTest::new(Setup::full_microbatches(1));
    worker.submit_many(0..MICROBATCHES as u32);
    worker
        .start_scripted(|log| {
            let seen = log.clone();
            ScriptedPipeline::new(log, |specs, _| Ok(draw(specs))).finishing(move |_, _| {
                let ended = seen.count(|event| matches!(event, Event::FinishEnded(_)));
                let ahead = (ended + 3).min(MICROBATCHES);
                seen.wait_for_here(ahead, |event| matches!(event, Event::Denoised(_)));
                (0..CHANCES).for_each(|_| std::thread::yield_now());
                Ok(())
            })
        })
        .await;
    worker.wait_for_acks(MICROBATCHES).await;
    worker.drain().await.expect("a good end");
    let (mut called, mut ended) = (0, 0);
    for event in worker.log.events() {
        match event {
            Event::Called(_) => {
                called += 1;
                assert!(called <= ended + 3, "call {called} began after {ended} had been finished");
            }
            Event::FinishEnded(_) => ended += 1,
            _ => {}
        }
    }
    assert_eq!((called, ended), (MICROBATCHES, MICROBATCHES));
}
