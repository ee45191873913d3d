//! The one thread that owns the model.
//!
//! Microbatches come through a channel of capacity one, so exactly one waits while one runs, and nothing async ever holds
//! a tensor. A call that fails is taken apart before anybody is blamed: out of memory or an error of the whole call runs
//! the halves again, so that one bad job does not cost its neighbors their attempts. A job that failed before runs
//! alone. A panic or a device fault poisons the engine: the pictures of that call go back as suspects, all others unharmed,
//! and the process ends. A picture that panics alone is known to be the reason, and fails.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use schema::{MicrobatchId, MicrobatchKey, ValidJobSpec};
use tokio::sync::{mpsc, oneshot};
use tracing::{error, info, warn};

use crate::control::{Control, Verdict};
use crate::microbatch::{Finished, FinishedPicture, Microbatch, Outcome, Picture};
use crate::pipeline::{
    Generated, PictureOutcome, Pipeline, PipelineError, PipelineIdentity, PipelineLoader, StageTimes,
};
use crate::trace::{Span, Stage, Trace};

/// Why the engine ended before it was told to.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The operating system gave no thread.
    #[error("the engine's thread could not be started")]
    Spawn(#[source] std::io::Error),
    /// The model could not be loaded.
    #[error("the pipeline could not be loaded")]
    Load(#[source] PipelineError),
    /// The pipeline failed so that it must not be used again.
    #[error("the engine is poisoned")]
    Poisoned(#[source] PipelineError),
    /// The engine's own code panicked.
    #[error("the engine's thread died")]
    Died,
}

/// A running engine, as the rest of the worker sees it.
#[derive(Debug)]
pub struct Engine {
    /// What its pictures depend on.
    pub identity: PipelineIdentity,
    /// Takes microbatches; has room for one while another runs. Closed when the engine is poisoned.
    pub microbatches: mpsc::Sender<Microbatch>,
    /// Gives back every picture that was taken in, whatever happened to it. Closed when the thread has ended.
    pub finished: mpsc::Receiver<Finished>,
    /// How the thread ended.
    pub ended: EngineEnd,
}

/// The thread's last word.
#[derive(Debug)]
pub struct EngineEnd(Option<oneshot::Receiver<Result<(), EngineError>>>);

impl EngineEnd {
    /// Waits until the thread has ended: well, when nobody sends microbatches any more. Once told, an error is not told
    /// again.
    pub async fn wait(&mut self) -> Result<(), EngineError> {
        let Some(receiver) = &mut self.0 else { return Ok(()) };
        let end = receiver.await.unwrap_or(Err(EngineError::Died));
        self.0 = None;
        end
    }
}

impl Engine {
    /// Starts the thread and waits until it has loaded the pipeline. `trace` is told of each call.
    pub async fn load(load: PipelineLoader, trace: Trace) -> Result<Self, EngineError> {
        let (microbatches, microbatch_receiver) = mpsc::channel(1);
        let (finished_sender, finished) = mpsc::channel(1);
        let (loaded_sender, loaded) = oneshot::channel();
        let (ended_sender, ended) = oneshot::channel();
        let thread = move || {
            let end =
                match catch_unwind(AssertUnwindSafe(load)).unwrap_or_else(|panic| Err(panicked(&*panic))) {
                    Ok(pipeline) => {
                        // Nobody waits for the identity only when the worker is ending already.
                        let _ = loaded_sender.send(pipeline.identity().clone());
                        EngineThread { pipeline, limits: HashMap::new(), trace }
                            .work(microbatch_receiver, &finished_sender)
                    }
                    Err(load_error) => Err(EngineError::Load(load_error)),
                };
            // As above.
            let _ = ended_sender.send(end);
        };
        std::thread::Builder::new().name("engine".to_owned()).spawn(thread).map_err(EngineError::Spawn)?;
        let mut ended = EngineEnd(Some(ended));
        match loaded.await {
            Ok(identity) => Ok(Self { identity, microbatches, finished, ended }),
            Err(_) => Err(ended.wait().await.err().unwrap_or(EngineError::Died)),
        }
    }
}

/// What of a key decides how much memory a picture takes.
type MemoryClass = (u32, u32, bool);

struct EngineThread {
    pipeline: Box<dyn Pipeline>,
    /// The most pictures a call may have, where more ran out of memory before.
    limits: HashMap<MemoryClass, usize>,
    trace: Trace,
}

type Slot = Option<(Outcome, StageTimes)>;

impl EngineThread {
    fn work(
        mut self,
        mut microbatches: mpsc::Receiver<Microbatch>,
        finished: &mpsc::Sender<Finished>,
    ) -> Result<(), EngineError> {
        while let Some(microbatch) = microbatches.blocking_recv() {
            self.trace.span(Span {
                stage: Stage::WaitForEngine,
                microbatch_id: microbatch.microbatch_id,
                picture: None,
                pictures: microbatch.pictures.len(),
                from: microbatch.claimed,
                to: Instant::now(),
            });
            if !microbatch.control.may_start() {
                hand_on(finished, stopped(microbatch));
                continue;
            }
            let (done, poison) = self.run(microbatch);
            hand_on(finished, done);
            if let Some(poison) = poison {
                error!(error = format!("{:#}", anyhow::Error::new(poison.clone())), "The engine is poisoned");
                // Take no more, and give back what already waits.
                microbatches.close();
                while let Some(waiting) = microbatches.blocking_recv() {
                    hand_on(finished, stopped(waiting));
                }
                return Err(EngineError::Poisoned(poison));
            }
        }
        Ok(())
    }

    fn run(&mut self, microbatch: Microbatch) -> (Finished, Option<PipelineError>) {
        let Microbatch { microbatch_id, pictures, mut control, .. } = microbatch;
        let mut slots: Vec<Slot> = pictures.iter().map(|_| None).collect();
        let mut poison = None;
        let mut calls = self.calls(&pictures);
        while let Some(call) = calls.pop_front() {
            control.focus(call.clone());
            if poison.is_some() || control.verdict() == Verdict::Stop {
                give_up(&mut slots, call, &control);
                continue;
            }
            let specs: Vec<&ValidJobSpec> =
                pictures[call.clone()].iter().map(|picture| &picture.job.spec).collect();
            match self.generate(microbatch_id, &specs, &mut control) {
                Ok(generated) => fill(&mut slots, call, generated, &control),
                Err(failure) if call.len() > 1 && !failure.is_poisonous() => {
                    self.learn(&failure, specs[0].microbatch_key(), call.len());
                    warn!(
                        microbatch.id = %microbatch_id,
                        batch.size = call.len(),
                        error = format!("{:#}", anyhow::Error::new(failure)),
                        "A call of {} pictures failed; its halves run again", call.len()
                    );
                    let middle = call.start + call.len() / 2;
                    calls.push_front(middle..call.end);
                    calls.push_front(call.start..middle);
                }
                Err(failure) => {
                    // A device that fails does so whatever it is given: even alone the picture need not be the reason.
                    let is_proof = call.len() == 1 && !matches!(failure, PipelineError::Device { .. });
                    for slot in &mut slots[call] {
                        let outcome =
                            if is_proof { Outcome::Failed(failure.clone()) } else { Outcome::Suspected };
                        *slot = Some((outcome, StageTimes::default()));
                    }
                    poison = failure.is_poisonous().then_some(failure);
                }
            }
        }
        let pictures = pictures.into_iter().zip(slots).map(|(picture, slot)| {
            let (outcome, times) = slot.unwrap_or((Outcome::Stopped, StageTimes::default()));
            FinishedPicture { picture, outcome, times }
        });
        (Finished { microbatch_id, pictures: pictures.collect() }, poison)
    }

    fn generate(
        &mut self,
        microbatch_id: MicrobatchId,
        specs: &[&ValidJobSpec],
        control: &mut Control,
    ) -> Result<Generated, PipelineError> {
        let from = Instant::now();
        let call = AssertUnwindSafe(|| self.pipeline.generate(specs, control));
        let generated = catch_unwind(call).unwrap_or_else(|panic| Err(panicked(&*panic)));
        let times = generated.as_ref().map(|generated| generated.times).unwrap_or_default();
        let (stage, pictures, to) = (Stage::Generate, specs.len(), Instant::now());
        self.trace.generated(Span { stage, microbatch_id, picture: None, pictures, from, to }, times);
        generated
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

fn give_up(slots: &mut [Slot], call: Range<usize>, control: &Control) {
    for index in call {
        let outcome = if control.is_lost(index) { Outcome::LeaseLost } else { Outcome::Stopped };
        slots[index] = Some((outcome, StageTimes::default()));
    }
}

fn fill(slots: &mut [Slot], call: Range<usize>, generated: Generated, control: &Control) {
    for (index, picture) in call.zip(generated.pictures) {
        let outcome = match picture {
            PictureOutcome::Finished(image) => Outcome::Image(image),
            PictureOutcome::Dropped if control.is_lost(index) => Outcome::LeaseLost,
            PictureOutcome::Dropped => Outcome::Stopped,
            PictureOutcome::Failed(failure) => Outcome::Failed(failure),
        };
        slots[index] = Some((outcome, generated.times));
    }
}

fn stopped(microbatch: Microbatch) -> Finished {
    let pictures = microbatch.pictures.into_iter().map(|picture| FinishedPicture {
        picture,
        outcome: Outcome::Stopped,
        times: StageTimes::default(),
    });
    Finished { microbatch_id: microbatch.microbatch_id, pictures: pictures.collect() }
}

fn hand_on(finished: &mpsc::Sender<Finished>, done: Finished) {
    // A full channel is back-pressure: the pictures before these are not stored yet. A closed one means that the process
    // is ending and its leases will lapse; the dropped tags say so in the log.
    let _ = finished.blocking_send(done);
}

fn panicked(panic: &(dyn std::any::Any + Send)) -> PipelineError {
    let message = panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_owned());
    PipelineError::Panicked { message }
}
