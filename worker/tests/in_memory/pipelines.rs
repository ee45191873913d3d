//! Pipelines that do what a test needs at the moment it needs it.
#![allow(dead_code, reason = "each test program uses its own part of this")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use schema::ValidJobSpec;
use worker::control::{Control, Verdict};
use worker::pipeline::{
    Denoised, Generated, GeneratedImage, PictureOutcome, Pipeline, PipelineError, PipelineIdentity, Source,
    StageTimes,
};

use crate::worker_under_test::{Event, EventLog, PATIENCE};

/// A script: what becomes of each call.
type Script =
    Box<dyn FnMut(&[&ValidJobSpec], &mut Control) -> Result<Vec<PictureOutcome>, PipelineError> + Send>;

/// What the second half of each call does, besides giving what the first half drew.
type FinishScript = Arc<dyn Fn(&[u32], &mut Control) -> Result<(), PipelineError> + Send + Sync>;

pub struct ScriptedPipeline {
    identity: PipelineIdentity,
    script: Script,
    finish: FinishScript,
    log: EventLog,
}

impl ScriptedPipeline {
    pub fn new(
        log: EventLog,
        script: impl FnMut(&[&ValidJobSpec], &mut Control) -> Result<Vec<PictureOutcome>, PipelineError>
        + Send
        + 'static,
    ) -> Self {
        let text = |text: &str| text.to_owned();
        let identity = PipelineIdentity {
            name: text("scripted"),
            device: text("cpu"),
            dtype: text("f32"),
            noise_dtype: text("cpu-f32"),
        };
        Self { identity, script: Box::new(script), finish: Arc::new(|_, _| Ok(())), log }
    }

    /// Says what the second halves do; they are given their seeds.
    pub fn finishing(
        self,
        finish: impl Fn(&[u32], &mut Control) -> Result<(), PipelineError> + Send + Sync + 'static,
    ) -> Self {
        Self { finish: Arc::new(finish), ..self }
    }
}

impl Pipeline for ScriptedPipeline {
    fn identity(&self) -> &PipelineIdentity {
        &self.identity
    }

    fn denoise(&mut self, specs: &[&ValidJobSpec], control: &mut Control) -> Result<Denoised, PipelineError> {
        let seeds: Vec<u32> = specs.iter().map(|spec| spec.seed()).collect();
        self.log.push(Event::Called(seeds.clone()));
        let pictures = (self.script)(specs, control)?;
        self.log.push(Event::Denoised(seeds.clone()));
        let (finish, log) = (self.finish.clone(), self.log.clone());
        let finish = move |control: &mut Control| {
            log.push(Event::Finishing(seeds.clone()));
            let finished = finish(&seeds, control);
            log.push(Event::FinishEnded(seeds));
            finished?;
            Ok(Generated { pictures, times: StageTimes::default() })
        };
        Ok(Denoised { times: StageTimes::default(), finish: Box::new(finish) })
    }
}

/// Small pictures of the right size, all drawn.
pub fn draw(specs: &[&ValidJobSpec]) -> Vec<PictureOutcome> {
    specs.iter().map(|spec| PictureOutcome::Finished(picture(spec))).collect()
}

pub fn picture(spec: &ValidJobSpec) -> GeneratedImage {
    GeneratedImage {
        width: spec.width(),
        height: spec.height(),
        rgb: vec![spec.seed() as u8; (spec.width() * spec.height() * 3) as usize],
        has_nsfw_concept: Some(false),
        concept_scores: vec![-0.25],
        special_care_scores: vec![],
        prompt_truncated: false,
        dtype: "f32".to_owned(),
        recipe: spec.recipe(),
        engine: None,
    }
}

/// Whatever lies below a pipeline's error.
pub fn source(text: &'static str) -> Source {
    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Text(&'static str);
    Arc::new(Text(text))
}

pub fn out_of_memory(batch_size: usize) -> PipelineError {
    PipelineError::OutOfMemory { batch_size, source: source("full") }
}

/// More steps than any test has time for.
const ENDLESS: usize = 1_000_000_000;

/// Takes tiny steps of a schedule that never ends until the verdict is what `is_awaited` waits for; answers the flags.
fn step_until(
    control: &mut Control,
    count: usize,
    is_awaited: impl Fn(&Verdict<'_>) -> bool,
) -> Option<Vec<bool>> {
    let started = Instant::now();
    for step in 1.. {
        let verdict = control.after_step(step, ENDLESS);
        if is_awaited(&verdict) {
            return match verdict {
                Verdict::Continue { lost } => Some(lost.to_vec()),
                Verdict::Stop => None,
            };
        }
        assert!(started.elapsed() < PATIENCE, "nothing was said to a microbatch of {count}");
        control.wait(Duration::from_millis(1));
    }
    unreachable!("the loop has no end")
}

/// Runs until a lease is lost, then draws the others.
pub fn until_one_is_lost(specs: &[&ValidJobSpec], control: &mut Control) -> Vec<PictureOutcome> {
    let lost = step_until(control, specs.len(), |verdict| match verdict {
        Verdict::Continue { lost } => lost.contains(&true),
        Verdict::Stop => true,
    });
    let lost = lost.unwrap_or_else(|| vec![true; specs.len()]);
    let outcome = |(spec, lost): (&&ValidJobSpec, bool)| {
        if lost { PictureOutcome::Dropped } else { PictureOutcome::Finished(picture(spec)) }
    };
    specs.iter().zip(lost).map(outcome).collect()
}

/// Runs until it is told to stop.
pub fn until_stopped(specs: &[&ValidJobSpec], control: &mut Control) -> Vec<PictureOutcome> {
    step_until(control, specs.len(), |verdict| *verdict == Verdict::Stop);
    specs.iter().map(|_| PictureOutcome::Dropped).collect()
}

/// A gate that a test opens.
#[derive(Clone, Default)]
pub struct Gate(Arc<AtomicBool>);

impl Gate {
    pub fn open(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Reports the first of two steps, waits for the gate, and draws; unless it is stopped meanwhile.
    pub fn pass(&self, specs: &[&ValidJobSpec], control: &mut Control) -> Vec<PictureOutcome> {
        let started = Instant::now();
        while !self.0.load(Ordering::SeqCst) {
            if control.after_step(1, 2) == Verdict::Stop {
                return specs.iter().map(|_| PictureOutcome::Dropped).collect();
            }
            assert!(started.elapsed() < PATIENCE, "the gate was not opened");
            control.wait(Duration::from_millis(1));
        }
        control.after_step(2, 2);
        draw(specs)
    }
}
