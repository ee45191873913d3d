//! One thread for both halves, call by call.

use tokio::sync::mpsc;

use super::EngineError;
use super::first_half::{FirstHalf, Step};
use super::running::close;
use super::second_half::SecondHalf;
use crate::microbatch::{Finished, Microbatch};
use crate::pipeline::StageTimes;

/// Works until nobody sends microbatches any more, or the engine is poisoned.
pub(super) fn work(
    mut first_half: FirstHalf,
    mut microbatches: mpsc::Receiver<Microbatch>,
    finished: &mpsc::Sender<Finished>,
) -> Result<(), EngineError> {
    let poison = first_half.poison.clone();
    let second_half =
        SecondHalf { trace: first_half.trace.clone(), poison: poison.clone(), is_beside: false };
    while let Some(microbatch) = microbatches.blocking_recv() {
        let Some(mut running) = first_half.begin(microbatch, false, finished) else { continue };
        loop {
            match first_half.denoise_next(&mut running) {
                Step::NoCall => break,
                Step::Done { from, pictures, is_denoised: false } => {
                    first_half.tell(&running, from, pictures, StageTimes::default());
                }
                Step::Done { .. } => second_half.finish(&mut running),
                Step::GivenUp => {}
            }
            first_half.take_apart(&mut running);
        }
        running.hand_on(finished);
        if let Some(why) = poison.why() {
            close(microbatches, finished);
            return Err(EngineError::Poisoned(why));
        }
    }
    Ok(())
}
