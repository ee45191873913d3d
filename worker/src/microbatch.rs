//! What the stages hand to each other: an entry, then a claimed picture in a microbatch, then its outcome. The delivery
//! tag rides along all the way, and only the last stage that knows the job's fate spends it.

use std::time::Instant;

use schema::{ClaimedJob, JobMessage, Lease, MicrobatchId, PriorityBand};

use crate::control::Control;
use crate::pipeline::{GeneratedImage, PipelineError, StageTimes};
use crate::queue::DeliveryTag;

/// A readable message on its way to the batcher.
#[derive(Debug)]
pub struct Entry {
    /// Which job to look at.
    pub message: JobMessage,
    /// The band of the queue it came from.
    pub band: PriorityBand,
    /// Settles it.
    pub tag: DeliveryTag,
    /// When it came.
    pub arrived: Instant,
}

/// A job that this worker has claimed, and the delivery that told of it.
#[derive(Debug)]
pub struct Picture {
    /// The claimed row.
    pub job: ClaimedJob,
    /// Settles the delivery.
    pub tag: DeliveryTag,
}

/// Jobs that go to the engine together.
#[derive(Debug)]
pub struct Microbatch {
    /// As the attempts' rows name it.
    pub microbatch_id: MicrobatchId,
    /// At least one.
    pub pictures: Vec<Picture>,
    /// When its claim was answered.
    pub claimed: Instant,
    /// What is said to it while it runs; its indices are those of `pictures`.
    pub control: Control,
}

/// How one picture's attempt ended in the engine.
#[derive(Debug)]
pub enum Outcome {
    /// Drawn.
    Image(GeneratedImage),
    /// Given up because the lease was gone; the job is somebody else's business now.
    LeaseLost,
    /// Given up because the worker is shutting down; the job goes back unharmed.
    Stopped,
    /// Failed.
    Failed(PipelineError),
    /// Was in the call that broke the engine: this picture or a neighbor is the reason, or the device. The job goes back
    /// as lost with its worker, and is not charged.
    Suspected,
}

/// A picture that the engine is done with.
#[derive(Debug)]
pub struct FinishedPicture {
    /// The job and its delivery.
    pub picture: Picture,
    /// How it ended.
    pub outcome: Outcome,
    /// The stages of the call that it was part of.
    pub times: StageTimes,
}

/// A microbatch that the engine is done with.
#[derive(Debug)]
pub struct Finished {
    /// As the attempts' rows name it.
    pub microbatch_id: MicrobatchId,
    /// All its pictures.
    pub pictures: Vec<FinishedPicture>,
}

impl FinishedPicture {
    /// The job's lease.
    pub fn lease(&self) -> Lease {
        self.picture.job.lease
    }
}
