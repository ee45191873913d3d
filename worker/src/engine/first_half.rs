//! From a microbatch to denoised calls: what the thread does that owns the pipeline.

use std::collections::{HashMap, VecDeque};
use std::mem;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use schema::{MicrobatchKey, ValidJobSpec};
use tokio::sync::mpsc;
use tracing::{info, warn};

use super::running::{DenoisedCall, Poison, Running, hand_back, panicked};
use crate::microbatch::{Finished, Microbatch, Picture};
use crate::pipeline::{Pipeline, PipelineError, PrepareLane, StageTimes};
use crate::trace::{Span, Stage, Trace};

/// What of a key decides how much memory a picture takes.
type MemoryClass = (u32, u32, bool);

/// See the module.
pub(super) struct FirstHalf {
    pipeline: Box<dyn Pipeline>,
    /// The most pictures a call may have, where more ran out of memory before.
    limits: HashMap<MemoryClass, usize>,
    pub trace: Trace,
    pub poison: Poison,
}

/// How a call was denoised.
pub(super) enum Step {
    /// There was none left.
    NoCall,
    /// It is denoised, or it failed and the microbatch knows.
    Done {
        /// When it began.
        from: Instant,
        /// Its pictures.
        pictures: usize,
        /// Whether its second half is left.
        is_denoised: bool,
    },
    /// It was given up.
    GivenUp,
}

impl FirstHalf {
    pub(super) fn new(pipeline: Box<dyn Pipeline>, trace: Trace) -> Self {
        Self { pipeline, limits: HashMap::new(), trace, poison: Poison::default() }
    }

    pub(super) fn prepare_lane(&self) -> PrepareLane {
        self.pipeline.prepare_lane()
    }

    /// Begins a microbatch, or hands it back if it may not be started any more.
    pub(super) fn begin(
        &self,
        microbatch: Microbatch,
        has_company: bool,
        finished: &mpsc::Sender<Finished>,
    ) -> Option<Running> {
        self.trace.span(Span {
            stage: Stage::WaitForEngine,
            microbatch_id: microbatch.microbatch_id,
            picture: None,
            pictures: microbatch.pictures.len(),
            from: microbatch.claimed,
            to: Instant::now(),
        });
        if !microbatch.control.may_start() {
            hand_back(microbatch, finished);
            return None;
        }
        let calls = self.calls(&microbatch.pictures);
        Some(Running::new(microbatch, calls, has_company, &self.poison))
    }

    /// Denoises the next call.
    pub(super) fn denoise_next(&mut self, running: &mut Running) -> Step {
        let Some(call) = running.calls.pop_front() else { return Step::NoCall };
        if !running.go_on_with(&call) {
            return Step::GivenUp;
        }
        let specs: Vec<&ValidJobSpec> =
            running.pictures[call.clone()].iter().map(|picture| &picture.job.spec).collect();
        let (from, pictures) = (Instant::now(), specs.len());
        let control = &mut running.control;
        let denoise = AssertUnwindSafe(|| self.pipeline.denoise(&specs, control));
        let denoised = catch_unwind(denoise).unwrap_or_else(|panic| Err(panicked(&*panic)));
        let is_denoised = denoised.is_ok();
        match denoised {
            // It was on the device when that failed in the other thread's hands; who is to blame, nobody knows.
            Ok(_) if self.poison.is_of_the_device() => running.suspect(call),
            Ok(denoised) => {
                running.denoised.push(DenoisedCall { call, denoised, from, to: Instant::now() });
            }
            Err(failure) => running.fail(call, failure),
        }
        Step::Done { from, pictures, is_denoised }
    }

    /// Notes that until now a call of so many `pictures` was denoised, or failed at that.
    pub(super) fn tell(&self, running: &Running, from: Instant, pictures: usize, times: StageTimes) {
        let microbatch_id = running.microbatch_id;
        let span =
            Span { stage: Stage::Generate, microbatch_id, picture: None, pictures, from, to: Instant::now() };
        self.trace.generated(span, times);
    }

    /// Makes calls of what failed: halves, or once more the same.
    pub(super) fn take_apart(&mut self, running: &mut Running) {
        for (call, failure) in mem::take(&mut running.failed).into_iter().rev() {
            if call.len() == 1 {
                running.calls.push_front(call);
                continue;
            }
            self.learn(&failure, running.pictures[call.start].job.spec.microbatch_key(), call.len());
            warn!(
                microbatch.id = %running.microbatch_id,
                batch.size = call.len(),
                error = format!("{:#}", anyhow::Error::new(failure)),
                "A call of {} pictures failed; its halves run again", call.len()
            );
            let middle = call.start + call.len() / 2;
            running.calls.push_front(middle..call.end);
            running.calls.push_front(call.start..middle);
        }
    }

    /// Cuts a microbatch into calls: neighbors of one key, no more than fit, and those that failed before alone. The claimed
    /// row decides about the key, not the message.
    fn calls(&self, pictures: &[Picture]) -> VecDeque<Range<usize>> {
        let mut calls: VecDeque<Range<usize>> = VecDeque::new();
        for (index, picture) in pictures.iter().enumerate() {
            let key = picture.job.spec.microbatch_key();
            let limit = self.limits.get(&memory_class(key)).copied().unwrap_or(usize::MAX);
            let alone = |picture: &Picture| picture.job.attempt > 1;
            match calls.back_mut() {
                Some(call)
                    if pictures[call.start].job.spec.microbatch_key() == key
                        && call.len() < limit
                        && !alone(picture)
                        && !alone(&pictures[call.start]) =>
                {
                    call.end = index + 1;
                }
                _ => calls.push_back(index..index + 1),
            }
        }
        calls
    }

    fn learn(&mut self, failure: &PipelineError, key: MicrobatchKey, batch_size: usize) {
        if matches!(failure, PipelineError::OutOfMemory { .. }) {
            let limit = batch_size / 2;
            self.limits.insert(memory_class(key), limit);
            info!(microbatch.key = %key, batch.size = limit, "From now on at most {limit} pictures of {key} in a call");
        }
    }
}

fn memory_class(key: MicrobatchKey) -> MemoryClass {
    (key.width, key.height, key.classifier_free_guidance)
}
