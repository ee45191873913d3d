//! The thread that owns the model, and the one beside it that may finish what it has denoised.
//!
//! Microbatches come through a channel of capacity one, so exactly one waits while one runs, and nothing async ever holds
//! a tensor. A call has two halves (`pipeline.rs`). By default the engine's thread does both, one after the other
//! (`engine/single.rs`); with [`Lanes::Two`] a second thread finishes one microbatch while the first denoises the next, and at most
//! one waits between them (`engine/double.rs`). What becomes of a picture is the same either way (`engine/running.rs`).
//!
//! A call that fails is taken apart before anybody is blamed: out of memory or an error of the whole call runs
//! the halves again, so that one bad job does not cost its neighbors their attempts. A job that failed before runs
//! alone. A panic or a device fault poisons the engine: the pictures of that call go back as suspects, all others unharmed,
//! and the process ends. A picture that panics alone is known to be the reason, and fails.

mod double;
mod first_half;
mod running;
mod second_half;
mod single;

use std::panic::{AssertUnwindSafe, catch_unwind};

use tokio::sync::{mpsc, oneshot};

use self::first_half::FirstHalf;
use self::running::panicked;
use crate::microbatch::{Finished, Microbatch};
use crate::pipeline::{PipelineError, PipelineIdentity, PipelineLoader};
use crate::trace::Trace;

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
    #[error("a thread of the engine died")]
    Died,
}

/// Which threads do the two halves of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lanes {
    /// One, one half after the other.
    One,
    /// One for each half, so that a microbatch is finished while the next is denoised.
    Two,
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
    pub async fn load(load: PipelineLoader, lanes: Lanes, trace: Trace) -> Result<Self, EngineError> {
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
                        let first_half = FirstHalf::new(pipeline, trace);
                        match lanes {
                            Lanes::One => single::work(first_half, microbatch_receiver, &finished_sender),
                            Lanes::Two => double::work(first_half, microbatch_receiver, finished_sender),
                        }
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
