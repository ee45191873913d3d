//! What is said to a microbatch while it runs, and what it says back: lost leases and stopping one way, steps done the
//! other.
//!
//! The engine's threads hold no lock and await nothing. They look into a microbatch's [`Control`] after each denoising step and
//! before they decode, so a word takes effect within one step. The words are written by the lease keeper (`lease.rs`), which
//! is the drain too, and only read by the engine's thread that has the microbatch; the progress is written by that
//! thread, and only read by the drain.

use std::ops::Range;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use schema::JobId;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// A word to a running microbatch.
#[derive(Debug, Clone, Copy)]
enum Word {
    /// This job's lease is gone: it was cancelled, or it lapsed and is somebody else's.
    LeaseLost(JobId),
    /// Stop all of it after the current step.
    Stop,
}

/// How far a microbatch has come.
#[derive(Debug, Clone, Copy, Default)]
pub struct Progress {
    /// Denoising steps behind it.
    pub steps_done: usize,
    /// Denoising steps in all; 0 before the first.
    pub num_steps: usize,
    /// Time since the pipeline was given the microbatch, at the end of the last step.
    pub elapsed: Duration,
}

impl Progress {
    /// Whether all denoising steps are done.
    pub fn is_over(&self) -> bool {
        self.num_steps > 0 && self.steps_done >= self.num_steps
    }

    /// How long the steps that are left will take at the mean speed so far; `None` before the first is done.
    pub fn remaining_steps(&self) -> Option<Duration> {
        let done = u32::try_from(self.steps_done).ok().filter(|done| *done > 0)?;
        let left = u32::try_from(self.num_steps.saturating_sub(self.steps_done)).ok()?;
        Some(self.elapsed / done * left)
    }
}

/// What a pipeline must do after a step.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict<'a> {
    /// Go on with the pictures that are not lost; one flag for each picture of the call.
    Continue {
        /// True where the picture is not wanted any more.
        lost: &'a [bool],
    },
    /// Do nothing more for any picture of the call.
    Stop,
}

/// The engine's end.
#[derive(Debug)]
pub struct Control {
    words: mpsc::Receiver<Word>,
    // Kept so that `words` is never disconnected: `wait` must not return at once because nobody is left to speak.
    _speaker: mpsc::Sender<Word>,
    progress: watch::Sender<Progress>,
    job_ids: Vec<JobId>,
    lost: Vec<bool>,
    stop: bool,
    window: Range<usize>,
    started: Instant,
    drain: CancellationToken,
    /// Cancelled when the engine must not be used any more.
    broken: CancellationToken,
}

/// The other end. Clones speak to the same microbatch.
#[derive(Debug, Clone)]
pub struct ControlHandle {
    words: mpsc::Sender<Word>,
    progress: watch::Receiver<Progress>,
}

/// The two ends for a microbatch of these jobs, in the order in which the pipeline is given them. Once `drain` is
/// cancelled the microbatch is not to be started; if it runs by then, it is for the lease keeper to stop it.
pub fn control(job_ids: Vec<JobId>, drain: CancellationToken) -> (ControlHandle, Control) {
    let (speaker, words) = mpsc::channel();
    let (progress, progress_receiver) = watch::channel(Progress::default());
    let handle = ControlHandle { words: speaker.clone(), progress: progress_receiver };
    let window = 0..job_ids.len();
    let lost = vec![false; job_ids.len()];
    let control = Control {
        words,
        _speaker: speaker,
        progress,
        job_ids,
        lost,
        stop: false,
        window,
        started: Instant::now(),
        drain,
        broken: CancellationToken::new(),
    };
    (handle, control)
}

impl ControlHandle {
    /// Tells the microbatch that this job's picture is not wanted any more.
    pub fn lease_lost(&self, job_id: JobId) {
        // The microbatch may have ended meanwhile; then nobody needs to hear it.
        let _ = self.words.send(Word::LeaseLost(job_id));
    }

    /// Tells the microbatch to stop after its current step, or not to start.
    pub fn stop(&self) {
        // As above.
        let _ = self.words.send(Word::Stop);
    }

    /// How far the microbatch is.
    pub fn progress(&self) -> Progress {
        *self.progress.borrow()
    }
}

impl Control {
    /// Whether the microbatch may still be started.
    pub fn may_start(&self) -> bool {
        !self.drain.is_cancelled()
    }

    /// Once `broken` is cancelled, the microbatch is to stop after its current step.
    pub fn stop_when(&mut self, broken: CancellationToken) {
        self.broken = broken;
    }

    /// Narrows the next calls to some of the microbatch's pictures and starts their clock.
    pub fn focus(&mut self, window: Range<usize>) {
        self.window = window;
        self.started = Instant::now();
    }

    /// To be called by the pipeline after each denoising step.
    pub fn after_step(&mut self, steps_done: usize, num_steps: usize) -> Verdict<'_> {
        self.progress.send_replace(Progress { steps_done, num_steps, elapsed: self.started.elapsed() });
        self.verdict()
    }

    /// What is to be done now. The engine asks before it starts a call, the pipeline after each step.
    pub fn verdict(&mut self) -> Verdict<'_> {
        while let Ok(word) = self.words.try_recv() {
            self.hear(word);
        }
        if self.stopped() {
            Verdict::Stop
        } else {
            Verdict::Continue { lost: &self.lost[self.window.clone()] }
        }
    }

    /// Lets time pass; returns early if the verdict becomes [`Verdict::Stop`].
    pub fn wait(&mut self, duration: Duration) {
        let deadline = Instant::now() + duration;
        while !self.stopped() {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { return };
            match self.words.recv_timeout(left) {
                Ok(word) => self.hear(word),
                Err(_) => return,
            }
        }
    }

    /// Whether the picture at this index of the whole microbatch is lost.
    pub fn is_lost(&self, index: usize) -> bool {
        self.lost[index]
    }

    fn hear(&mut self, word: Word) {
        match word {
            Word::Stop => self.stop = true,
            Word::LeaseLost(job_id) => {
                for (known, lost) in self.job_ids.iter().zip(&mut self.lost) {
                    *lost |= *known == job_id;
                }
            }
        }
    }

    fn stopped(&self) -> bool {
        self.stop || self.broken.is_cancelled() || self.lost[self.window.clone()].iter().all(|lost| *lost)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use schema::BatchId;

    fn jobs(count: u32) -> Vec<JobId> {
        let batch_id = BatchId::generate();
        (0..count).map(|ordinal| JobId::of(batch_id, ordinal)).collect()
    }

    #[test]
    fn a_lost_lease_marks_its_picture_alone() {
        let job_ids = jobs(3);
        let (handle, mut control) = control(job_ids.clone(), CancellationToken::new());
        handle.lease_lost(job_ids[1]);
        assert_eq!(control.after_step(1, 50), Verdict::Continue { lost: &[false, true, false] });
        control.focus(1..2);
        assert_eq!(control.verdict(), Verdict::Stop, "a call whose pictures are all lost stops");
    }

    #[test]
    fn waiting_ends_when_it_is_told_to_stop() {
        let (handle, mut control) = control(jobs(1), CancellationToken::new());
        let speaker = std::thread::spawn(move || handle.stop());
        let started = Instant::now();
        control.wait(Duration::from_secs(3600));
        speaker.join().expect("the speaker does not panic");
        assert!(started.elapsed() < Duration::from_secs(3000));
        assert_eq!(control.verdict(), Verdict::Stop);
    }

    #[test]
    fn waiting_lasts_its_time_after_the_last_speaker_is_gone() {
        let (handle, mut control) = control(jobs(1), CancellationToken::new());
        drop(handle);
        let started = Instant::now();
        control.wait(Duration::from_millis(30));
        assert!(started.elapsed() >= Duration::from_millis(30));
    }

    #[test]
    fn the_estimate_is_the_mean_step_times_the_steps_left() {
        let progress = Progress { steps_done: 10, num_steps: 50, elapsed: Duration::from_secs(5) };
        assert_eq!(progress.remaining_steps(), Some(Duration::from_secs(20)));
        assert_eq!(Progress::default().remaining_steps(), None);
    }
}
