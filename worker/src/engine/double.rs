//! A thread for each half: while the second finishes one microbatch, the first denoises the next.
//!
//! The hand-over has room for one, so besides what runs at most one denoised microbatch waits; the first thread stands still
//! when a second one would. What has to be run again comes back to the first thread, which then lets the second come to
//! rest before and after it: a call is taken apart with nothing beside it, as it would be on one thread, so that memory
//! that two microbatches wanted at once is neither's fault. Reports have a channel without a bound; there are never more
//! than microbatches handed over, so at most three.

use std::collections::VecDeque;
use std::sync::mpsc as std_mpsc;
use std::thread::{self, JoinHandle};

use futures::executor::block_on;
use tokio::sync::mpsc;
use tracing::warn;

use super::first_half::{FirstHalf, Step};
use super::running::{Poison, Running, close};
use super::second_half::SecondHalf;
use super::{EngineError, single};
use crate::microbatch::{Finished, Microbatch};
use crate::pipeline::{PipelineError, PrepareLane, StageTimes};

/// What the second thread says of a microbatch that it was given.
enum Report {
    /// It is handed on.
    Done,
    /// Something of it has to be run again.
    Again(Box<Running>),
}

/// The first thread's end of the second.
struct Lane {
    handed_over: mpsc::Sender<Running>,
    reports: mpsc::UnboundedReceiver<Report>,
    /// Microbatches handed over and not reported on.
    num_there: usize,
    /// Those that came back while others were waited for.
    back: VecDeque<Running>,
    thread: JoinHandle<()>,
}

/// What the first thread does next.
enum Next {
    New(Microbatch),
    Again(Running),
    End,
}

/// Works until nobody sends microbatches any more, or the engine is poisoned. On one thread if the second cannot be prepared.
pub(super) fn work(
    mut first_half: FirstHalf,
    mut microbatches: mpsc::Receiver<Microbatch>,
    finished: mpsc::Sender<Finished>,
) -> Result<(), EngineError> {
    let second_half =
        SecondHalf { trace: first_half.trace.clone(), poison: first_half.poison.clone(), is_beside: true };
    let mut lane = match Lane::start(second_half, first_half.prepare_lane(), finished.clone())? {
        Ok(lane) => lane,
        Err(error) => {
            let error = format!("{:#}", anyhow::Error::new(error));
            warn!(error, "Nothing can be decoded beside denoising; one is done after the other");
            return single::work(first_half, microbatches, &finished);
        }
    };
    loop {
        let running = match lane.next(&mut microbatches, &first_half.poison)? {
            Next::New(microbatch) => match first_half.begin(microbatch, true, &finished) {
                Some(running) => running,
                None => continue,
            },
            Next::Again(mut running) => {
                lane.come_to_rest()?;
                running.has_company = false;
                first_half.take_apart(&mut running);
                running
            }
            Next::End => break,
        };
        let has_company = running.has_company;
        lane.hand_over(denoise(&mut first_half, running))?;
        if !has_company {
            lane.come_to_rest()?;
        }
    }
    lane.come_to_rest()?;
    for mut running in lane.back.drain(..) {
        running.give_up_the_rest();
        running.hand_on(&finished);
    }
    let why = first_half.poison.why();
    if why.is_some() {
        close(microbatches, &finished);
    }
    lane.end()?;
    why.map_or(Ok(()), |why| Err(EngineError::Poisoned(why)))
}

/// Does the first half of all calls that are left of a microbatch.
fn denoise(first_half: &mut FirstHalf, mut running: Running) -> Running {
    loop {
        match first_half.denoise_next(&mut running) {
            Step::NoCall => return running,
            Step::Done { from, pictures, is_denoised } => {
                let times = match running.denoised.last() {
                    Some(last) if is_denoised => last.denoised.times,
                    _ => StageTimes::default(),
                };
                first_half.tell(&running, from, pictures, times);
            }
            Step::GivenUp => {}
        }
    }
}

impl Lane {
    /// Starts the second thread and waits until it is prepared; the inner error says why it could not be.
    fn start(
        second_half: SecondHalf,
        prepare: PrepareLane,
        finished: mpsc::Sender<Finished>,
    ) -> Result<Result<Self, PipelineError>, EngineError> {
        let (handed_over, mut received) = mpsc::channel::<Running>(1);
        let (report, reports) = mpsc::unbounded_channel();
        let (prepared_sender, prepared) = std_mpsc::sync_channel(1);
        let work = move || {
            let ready = prepare();
            let is_ready = ready.is_ok();
            // The first thread waits for it.
            let _ = prepared_sender.send(ready);
            while is_ready && let Some(mut running) = received.blocking_recv() {
                second_half.finish(&mut running);
                let answer = if running.is_over() {
                    running.hand_on(&finished);
                    Report::Done
                } else {
                    Report::Again(Box::new(running))
                };
                // The first thread hears it, unless it died; then nobody can run anything again.
                let _ = report.send(answer);
            }
        };
        let thread = thread::Builder::new().name("decoder".to_owned()).spawn(work);
        let thread = thread.map_err(EngineError::Spawn)?;
        let ready = prepared.recv().map_err(|_| EngineError::Died)?;
        Ok(ready.map(|()| Self { handed_over, reports, num_there: 0, back: VecDeque::new(), thread }))
    }

    /// What came back goes before what is new. The end is when neither can come any more, or the engine is poisoned.
    fn next(
        &mut self,
        microbatches: &mut mpsc::Receiver<Microbatch>,
        poison: &Poison,
    ) -> Result<Next, EngineError> {
        while poison.why().is_none() {
            if let Some(running) = self.back.pop_front() {
                return Ok(Next::Again(running));
            }
            let report = block_on(async {
                tokio::select! {
                    biased;
                    report = self.reports.recv() => Ok(report),
                    microbatch = microbatches.recv() => Err(microbatch),
                }
            });
            match report {
                Ok(report) => self.heard(report)?,
                Err(Some(microbatch)) => return Ok(Next::New(microbatch)),
                Err(None) => {
                    self.come_to_rest()?;
                    if self.back.is_empty() {
                        break;
                    }
                }
            }
        }
        Ok(Next::End)
    }

    /// Waits for room.
    fn hand_over(&mut self, running: Running) -> Result<(), EngineError> {
        self.handed_over.blocking_send(running).map_err(|_| EngineError::Died)?;
        self.num_there += 1;
        Ok(())
    }

    /// Waits until the second thread has nothing left.
    fn come_to_rest(&mut self) -> Result<(), EngineError> {
        while self.num_there > 0 {
            let report = self.reports.blocking_recv();
            self.heard(report)?;
        }
        Ok(())
    }

    fn heard(&mut self, report: Option<Report>) -> Result<(), EngineError> {
        let report = report.ok_or(EngineError::Died)?;
        self.num_there -= 1;
        match report {
            Report::Done => {}
            Report::Again(running) => self.back.push_back(*running),
        }
        Ok(())
    }

    /// Lets the second thread end.
    fn end(self) -> Result<(), EngineError> {
        drop(self.handed_over);
        self.thread.join().map_err(|_| EngineError::Died)
    }
}
