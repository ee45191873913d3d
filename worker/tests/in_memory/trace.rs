//! What the trace tells: that the engine never waits for a claim while there is work, that exactly one microbatch waits while
//! one runs, and that each goes through its stages in their order.

use std::time::{Duration, Instant};

use serde_json::Value;
use worker::trace::Trace;

use crate::pipelines::{ScriptedPipeline, draw};
use crate::worker_under_test::{PATIENCE, Setup, WorkerUnderTest};

const MICROBATCHES: u64 = 6;

/// A span as the file tells it, in microseconds.
#[derive(Debug, Clone)]
struct Span {
    name: String,
    microbatch: String,
    from: f64,
    to: f64,
}

/// The spans of a trace file, those of begin and end events joined.
fn spans(text: &str) -> Vec<Span> {
    let events: Vec<Value> = serde_json::from_str(text).expect("a closed trace is a JSON array");
    let text_of = |event: &Value, field: &str| event[field].as_str().unwrap_or_default().to_owned();
    let time = |event: &Value| event["ts"].as_f64().expect("a time");
    let mut spans = Vec::new();
    for event in &events {
        let to = match event["ph"].as_str() {
            Some("X") => time(event) + event["dur"].as_f64().expect("a duration"),
            Some("b") => {
                let same = |other: &&Value| {
                    other["ph"] == "e" && other["id"] == event["id"] && other["name"] == event["name"]
                };
                time(events.iter().find(same).expect("what begins ends"))
            }
            _ => continue,
        };
        let (name, microbatch) = (text_of(event, "name"), text_of(&event["args"], "microbatch"));
        spans.push(Span { name, microbatch, from: time(event), to });
    }
    spans
}

#[tokio::test]
async fn the_next_microbatch_is_claimed_while_one_runs_and_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("trace.json");
    let mut worker = WorkerUnderTest::new(Setup::full_microbatches(2));
    worker.trace = Trace::to_file(&file).unwrap();
    worker.submit_many(0..2 * MICROBATCHES as u32);
    // A microbatch ends only when the next one is claimed. So the order is not a matter of speed: a worker that claims
    // when its engine is idle hangs in the first.
    let (metrics, mut calls) = (worker.metrics.clone(), 0);
    let script = move |log| {
        ScriptedPipeline::new(log, move |specs, control| {
            calls += 1;
            let started = Instant::now();
            while metrics.microbatches.get() < MICROBATCHES.min(calls + 1) {
                assert!(started.elapsed() < PATIENCE, "nothing was claimed while microbatch {calls} ran");
                control.wait(Duration::from_millis(1));
            }
            Ok(draw(specs))
        })
    };
    worker.start_scripted(script).await;
    worker.wait_for_acks(2 * MICROBATCHES as usize).await;
    worker.drain().await.expect("a good end");
    worker.trace.close().expect("the trace is written");

    let text = std::fs::read_to_string(&file).unwrap();
    assert!(!text.contains("picture 1"), "a prompt is in the trace");
    let spans = spans(&text);
    let named = |name: &str| spans.iter().filter(|span| span.name == name).cloned().collect::<Vec<_>>();
    let (claims, calls) = (named("claim"), named("generate"));
    assert_eq!((claims.len() as u64, calls.len() as u64), (MICROBATCHES, MICROBATCHES));
    for (claim, call) in claims[1..].iter().zip(&calls) {
        assert!(claim.to <= call.to, "the engine had to wait: {claim:?} after {call:?}");
    }
    for (claim, call) in claims[2..].iter().zip(&calls) {
        assert!(claim.from >= call.to, "two microbatches wait: {claim:?} during {call:?}");
    }
    let order = ["consume", "claim", "wait for engine", "generate", "encode", "put", "complete", "ack"];
    for call in &calls {
        let mut before: f64 = 0.0;
        for name in order {
            let own = spans.iter().filter(|span| span.name == name && span.microbatch == call.microbatch);
            let own: Vec<&Span> = own.collect();
            let of_each_picture = matches!(name, "encode" | "put");
            assert_eq!(own.len(), if of_each_picture { 2 } else { 1 }, "{name} of {}", call.microbatch);
            let (from, to) = own
                .iter()
                .fold((f64::MAX, f64::MAX), |(from, to), span| (from.min(span.from), to.min(span.to)));
            assert!(from + 0.01 >= before, "{name} of {} began at {from} before {before}", call.microbatch);
            // The first picture may be stored before the second is encoded.
            before = to;
        }
    }
}
