//! The second half of measured calls on a thread of its own.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread;

use anyhow::Context as _;

use super::measure::{Begun, Call};
use crate::diffusion::cuda::use_own_stream;
use crate::diffusion::{ComputeDevice, Finisher};

/// A thread that finishes calls, one after the other, with room for one that waits: as a worker has with `--overlap-decode on`.
/// It lives as long as this does, since a GPU's libraries take memory and time for each new stream.
pub struct DecodeLane {
    hand_over: SyncSender<(Arc<Finisher>, Begun)>,
    finished: Receiver<anyhow::Result<Call>>,
}

impl DecodeLane {
    /// Starts the thread, on a GPU on a stream of its own.
    pub fn start(device: ComputeDevice) -> anyhow::Result<Self> {
        let (hand_over, received) = mpsc::sync_channel::<(Arc<Finisher>, Begun)>(1);
        let (send, finished) = mpsc::channel();
        let (ready_sender, ready) = mpsc::channel();
        let work = move || {
            // It is waited for below.
            let _ = ready_sender.send(use_own_stream(device));
            for (finisher, begun) in received {
                // Without a listener the command has failed already.
                let _ = send.send(begun.finish(&finisher));
            }
        };
        thread::Builder::new().name("decoder".to_owned()).spawn(work)?;
        ready.recv().context(LANE_DIED)?.context("nothing can be decoded beside denoising")?;
        Ok(Self { hand_over, finished })
    }

    /// Waits for room.
    pub(super) fn hand_over(&self, finisher: Arc<Finisher>, begun: Begun) -> anyhow::Result<()> {
        self.hand_over.send((finisher, begun)).ok().context(LANE_DIED)
    }

    pub(super) fn receive(&self) -> anyhow::Result<Call> {
        self.finished.recv().context(LANE_DIED)?
    }

    pub(super) fn try_receive(&self) -> Option<anyhow::Result<Call>> {
        self.finished.try_recv().ok()
    }
}

const LANE_DIED: &str = "the thread that decodes died";
