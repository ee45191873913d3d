//! How close a worker in a fleet comes to what its pipeline does alone: one shipped worker on real servers, its engine's own time
//! from its trace.
//!
//! The ratio is the engine's time in calls over the time from its first call to the end of its last, with work waiting
//! throughout. What is missing to 1 is waiting for claims, messages or room.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde::Serialize;

use crate::fleet::Fleet;
use crate::servers::Servers;
use crate::trace_file::{self, EngineShare, Span};

const DEADLINE: Duration = Duration::from_secs(600);

/// What draws.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pipeline {
    /// Plain colors, so long a picture.
    SolidColor {
        /// Milliseconds a picture.
        milliseconds: u32,
    },
    /// The checkpoint that the fleet has registered, on the CPU.
    Checkpoint,
}

/// One measurement's settings.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Case {
    /// What draws.
    pub pipeline: Pipeline,
    /// The most pictures in a microbatch.
    pub microbatch: u32,
    /// Pixels of a side; the model's own if there is none.
    pub pixels: Option<u32>,
    /// Denoising steps.
    pub steps: u32,
    /// Pictures.
    pub jobs: u32,
}

/// One measurement.
#[derive(Debug, Clone, Serialize)]
pub struct Measured {
    /// Its settings.
    pub case: Case,
    /// Pictures a second within calls.
    pub bare_rate: f64,
    /// Pictures a second from the first call to the last one's end.
    pub rate: f64,
    /// The second over the first.
    pub ratio: f64,
    /// The longest the engine's thread was without a call, in milliseconds.
    pub longest_gap_ms: f64,
    /// Medians of the stages' lengths in milliseconds, in the order of a job's life.
    pub stages_ms: Vec<(String, f64)>,
}

const STAGES: [&str; 8] =
    ["consume", "claim", "wait for engine", "generate", "encode", "put", "complete", "ack"];

/// Runs one worker over `case` and reads its trace.
///
/// # Panics
/// When a part of the fleet fails.
pub async fn measure(fleet: &Fleet, case: Case) -> Measured {
    let Case { microbatch, steps, jobs, .. } = case;
    let steps = steps.to_string();
    let mut options = vec!["--num-inference-steps", &steps];
    let pixels = case.pixels.map(|pixels| pixels.to_string());
    if let Some(pixels) = &pixels {
        options.extend(["--width", pixels, "--height", pixels]);
    }
    fleet.submit(&"a red circle\n".repeat(jobs as usize), &options);
    let _scheduler = fleet.serve();
    let trace = fleet.folder().join("trace.json");
    let microbatch = microbatch.to_string();
    let worker = ["--max-microbatch", &microbatch, "--trace", trace.to_str().expect("UTF-8")];
    let mut worker = match case.pipeline {
        Pipeline::SolidColor { milliseconds } => fleet.solid_color_worker(milliseconds, &worker),
        Pipeline::Checkpoint => fleet.worker(&worker),
    };
    fleet.await_all_final(DEADLINE).await;
    worker.signal(Signal::SIGTERM);
    worker.exit(DEADLINE).await;
    let spans = trace_file::read(&trace);
    report(case, &spans)
}

fn report(case: Case, spans: &[Span]) -> Measured {
    let share: EngineShare = trace_file::engine_share(spans);
    let calls: Vec<&Span> = spans.iter().filter(|span| span.name == "generate").collect();
    let gaps = calls.windows(2).map(|pair| pair[1].from - pair[0].to);
    Measured {
        case,
        bare_rate: share.bare_rate(),
        rate: share.bare_rate() * share.ratio(),
        ratio: share.ratio(),
        longest_gap_ms: gaps.fold(0.0, f64::max) * 1e3,
        stages_ms: STAGES.map(|stage| (stage.to_owned(), trace_file::median_of(spans, stage) * 1e3)).to_vec(),
    }
}

/// Measures the cases one after the other, each on a fleet of its own; `folder` is the checkpoint to draw with.
pub async fn run(cases: &[Case], folder: &std::path::Path, tell: impl Fn(&str)) -> Vec<Measured> {
    let servers = Arc::new(Servers::start());
    let mut all = Vec::new();
    for &case in cases {
        let fleet = Fleet::with_checkpoint(servers.clone(), folder).await;
        let measured = measure(&fleet, case).await;
        tell(&measured.to_string());
        all.push(measured);
    }
    all
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Case { pipeline, microbatch, jobs, .. } = self.case;
        match pipeline {
            Pipeline::SolidColor { milliseconds } => write!(f, "solid-color {milliseconds:3} ms")?,
            Pipeline::Checkpoint => write!(f, "checkpoint        ")?,
        }
        write!(
            f,
            "  microbatch {microbatch:2}  {jobs:5} pictures  bare {:7.2}/s  worker {:7.2}/s  ratio {:.3}  longest gap {:6.1} ms ",
            self.bare_rate, self.rate, self.ratio, self.longest_gap_ms
        )?;
        for (stage, milliseconds) in &self.stages_ms {
            write!(f, " {stage} {milliseconds:.1}")?;
        }
        Ok(())
    }
}
