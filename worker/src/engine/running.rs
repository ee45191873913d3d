//! A microbatch in the engine: which of its calls are to come, denoised or done, and what became of its pictures.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use schema::MicrobatchId;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::error;

use crate::control::{Control, Verdict};
use crate::microbatch::{Finished, FinishedPicture, Microbatch, Outcome, Picture};
use crate::pipeline::{Denoised, Generated, PictureOutcome, PipelineError, StageTimes};

type Slot = Option<(Outcome, StageTimes)>;

/// Whether the engine is poisoned, and by what. Written by whichever thread finds out first, read by all.
#[derive(Debug, Clone, Default)]
pub(super) struct Poison {
    why: Arc<OnceLock<PipelineError>>,
    spreads: CancellationToken,
}

impl Poison {
    fn set(&self, error: PipelineError) {
        if self.why.set(error.clone()).is_ok() {
            error!(error = format!("{:#}", anyhow::Error::new(error)), "The engine is poisoned");
        }
        self.spreads.cancel();
    }

    /// What was the first reason.
    pub(super) fn why(&self) -> Option<PipelineError> {
        self.why.get().cloned()
    }

    /// Whether the device is the reason, so that whatever was on it may be to blame.
    pub(super) fn is_of_the_device(&self) -> bool {
        matches!(self.why.get(), Some(PipelineError::Device { .. }))
    }
}

/// Some neighbors of a microbatch whose first half is done.
#[derive(Debug)]
pub(super) struct DenoisedCall {
    pub call: Range<usize>,
    pub denoised: Denoised,
    /// When its first half began and ended.
    pub from: Instant,
    pub to: Instant,
}

/// See the module. One thread has it at a time.
#[derive(Debug)]
pub(super) struct Running {
    pub microbatch_id: MicrobatchId,
    pub pictures: Vec<Picture>,
    pub control: Control,
    /// Calls that have not begun: ranges of `pictures`.
    pub calls: VecDeque<Range<usize>>,
    /// Calls of which the second half is left.
    pub denoised: Vec<DenoisedCall>,
    /// Calls that failed and are to be taken apart, or tried again with nothing beside them.
    pub failed: Vec<(Range<usize>, PipelineError)>,
    /// Whether other microbatches may be in the engine's hands meanwhile.
    pub has_company: bool,
    slots: Vec<Slot>,
    poison: Poison,
}

impl Running {
    pub(super) fn new(
        microbatch: Microbatch,
        calls: VecDeque<Range<usize>>,
        has_company: bool,
        poison: &Poison,
    ) -> Self {
        let Microbatch { microbatch_id, pictures, mut control, .. } = microbatch;
        control.stop_when(poison.spreads.clone());
        Self {
            microbatch_id,
            control,
            calls,
            denoised: Vec::new(),
            failed: Vec::new(),
            has_company,
            slots: pictures.iter().map(|_| None).collect(),
            pictures,
            poison: poison.clone(),
        }
    }

    /// Turns to a call; false, and the call is given up, if it is not to go on.
    pub(super) fn go_on_with(&mut self, call: &Range<usize>) -> bool {
        self.control.focus(call.clone());
        let goes_on = self.control.verdict() != Verdict::Stop;
        if !goes_on {
            self.give_up(call.clone());
        }
        goes_on
    }

    fn give_up(&mut self, call: Range<usize>) {
        for index in call {
            let outcome = if self.control.is_lost(index) { Outcome::LeaseLost } else { Outcome::Stopped };
            self.slots[index] = Some((outcome, StageTimes::default()));
        }
    }

    /// Gives up whatever is left of it.
    pub(super) fn give_up_the_rest(&mut self) {
        let denoised = std::mem::take(&mut self.denoised).into_iter().map(|denoised| denoised.call);
        let failed = std::mem::take(&mut self.failed).into_iter().map(|(call, _)| call);
        let rest: Vec<_> =
            std::mem::take(&mut self.calls).into_iter().chain(denoised).chain(failed).collect();
        rest.into_iter().for_each(|call| self.give_up(call));
    }

    /// Takes over what a call made.
    pub(super) fn fill(&mut self, call: Range<usize>, generated: Generated) {
        for (index, picture) in call.zip(generated.pictures) {
            let outcome = match picture {
                PictureOutcome::Finished(image) => Outcome::Image(image),
                PictureOutcome::Dropped if self.control.is_lost(index) => Outcome::LeaseLost,
                PictureOutcome::Dropped => Outcome::Stopped,
                PictureOutcome::Failed(failure) if self.is_for_want_of_room(&failure) => {
                    self.failed.push((index..index + 1, failure));
                    continue;
                }
                PictureOutcome::Failed(failure) => Outcome::Failed(failure),
            };
            self.slots[index] = Some((outcome, generated.times));
        }
    }

    /// Memory that another microbatch had meanwhile is not the picture's fault.
    fn is_for_want_of_room(&self, failure: &PipelineError) -> bool {
        self.has_company && matches!(failure, PipelineError::OutOfMemory { .. })
    }

    /// Decides what an error of a whole call means: that it is taken apart, that its one picture failed, or that the engine is
    /// poisoned.
    pub(super) fn fail(&mut self, call: Range<usize>, failure: PipelineError) {
        let poisons = failure.is_poisonous();
        if !poisons && (call.len() > 1 || self.is_for_want_of_room(&failure)) {
            self.failed.push((call, failure));
            return;
        }
        // A device that fails does so whatever it is given: even alone the picture need not be the reason.
        if call.len() == 1 && !matches!(failure, PipelineError::Device { .. }) {
            self.slots[call.start] = Some((Outcome::Failed(failure.clone()), StageTimes::default()));
        } else {
            self.suspect(call);
        }
        if poisons {
            self.poison.set(failure);
        }
    }

    /// Notes that a call was in the engine's hands when it was poisoned.
    pub(super) fn suspect(&mut self, call: Range<usize>) {
        for slot in &mut self.slots[call] {
            *slot = Some((Outcome::Suspected, StageTimes::default()));
        }
    }

    /// Whether nothing is left to do for it.
    pub(super) fn is_over(&self) -> bool {
        self.calls.is_empty() && self.denoised.is_empty() && self.failed.is_empty()
    }

    /// Hands it on with what became of its pictures.
    pub(super) fn hand_on(self, finished: &mpsc::Sender<Finished>) {
        let pictures = self.pictures.into_iter().zip(self.slots).map(|(picture, slot)| {
            let (outcome, times) = slot.unwrap_or((Outcome::Stopped, StageTimes::default()));
            FinishedPicture { picture, outcome, times }
        });
        send(finished, Finished { microbatch_id: self.microbatch_id, pictures: pictures.collect() });
    }
}

/// Hands on a microbatch that was not begun.
pub(super) fn hand_back(microbatch: Microbatch, finished: &mpsc::Sender<Finished>) {
    let pictures = microbatch.pictures.into_iter().map(|picture| FinishedPicture {
        picture,
        outcome: Outcome::Stopped,
        times: StageTimes::default(),
    });
    send(finished, Finished { microbatch_id: microbatch.microbatch_id, pictures: pictures.collect() });
}

fn send(finished: &mpsc::Sender<Finished>, done: Finished) {
    // A full channel is back-pressure: the pictures before these are not stored yet. A closed one means that the process
    // is ending and its leases will lapse; the dropped tags say so in the log.
    let _ = finished.blocking_send(done);
}

/// Takes no more, and gives back what already waits.
pub(super) fn close(mut microbatches: mpsc::Receiver<Microbatch>, finished: &mpsc::Sender<Finished>) {
    microbatches.close();
    while let Some(waiting) = microbatches.blocking_recv() {
        hand_back(waiting, finished);
    }
}

/// A panic as the pipeline's error.
pub(super) fn panicked(panic: &(dyn std::any::Any + Send)) -> PipelineError {
    let message = panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_owned());
    PipelineError::Panicked { message }
}
