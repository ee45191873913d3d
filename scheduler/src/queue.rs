//! The wall to the broker: what the relay needs of it, and nothing else.
use std::future::Future;

use schema::QueueDeclaration;

/// A message on its way to a queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutgoingMessage {
    /// The encoded [`schema::JobMessage`].
    pub body: Vec<u8>,
    /// W3C trace context, sent as a header.
    pub traceparent: Option<String>,
}

/// What became of one published message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PublishOutcome {
    /// The broker holds it.
    Confirmed,
    /// No queue of that name exists: the broker sent it back.
    Returned,
    /// The queue is full or the broker could not store it.
    Refused,
    /// The connection broke before the broker's word came. It may or may not hold the message.
    Unknown,
    /// The connection stands and the broker said nothing in time. It may or may not hold the message.
    Silent,
}

/// Why the broker could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// There is no connection now; one is being built.
    #[error("the broker is not connected")]
    NotConnected,
    /// The broker takes no messages, because it is short of memory or disk.
    #[error("the broker blocks publishers: it is short of memory or disk")]
    Blocked,
    /// The broker did not answer in time.
    #[error("the broker did not answer within {seconds} s ({what})")]
    TimedOut {
        /// What it was asked.
        what: &'static str,
        /// How long we waited.
        seconds: u64,
    },
    /// The broker's own code failed over the question, and it closed the connection (AMQP's `INTERNAL_ERROR`).
    #[error("the broker has an internal error ({what})")]
    Crashed {
        /// What it was asked.
        what: &'static str,
    },
    /// The broker or the connection failed.
    #[error("the broker failed ({what}): {reason}")]
    Failed {
        /// What it was asked.
        what: &'static str,
        /// The protocol library's words. They repeat their causes, so the error itself would be told twice.
        reason: String,
    },
}

impl QueueError {
    /// Whether the supervisor already reported this state, so that reporting it again would only be noise.
    pub fn is_known_outage(&self) -> bool {
        matches!(self, Self::NotConnected | Self::Blocked)
    }

    /// Whether the queue that was asked about may be broken, while the broker is not.
    pub fn may_be_the_queue(&self) -> bool {
        matches!(self, Self::TimedOut { .. } | Self::Crashed { .. })
    }
}

/// A broker that holds queues.
pub trait Queue: Send + Sync {
    /// Makes `declaration`'s queue, and where its dead letters go, unless they are there.
    fn declare(&self, declaration: &QueueDeclaration) -> impl Future<Output = Result<(), QueueError>> + Send;

    /// Publishes `messages` to the queue `name` and waits for the broker's word on each; one outcome a message, in
    /// their order.
    fn publish(
        &self,
        name: &str,
        messages: &[OutgoingMessage],
    ) -> impl Future<Output = Result<Vec<PublishOutcome>, QueueError>> + Send;

    /// How many messages wait in the queue `name`, not counting those that a consumer holds; `None` if there is no
    /// such queue.
    fn ready_count(&self, name: &str) -> impl Future<Output = Result<Option<u32>, QueueError>> + Send;

    /// Removes the queue `name` with all that is in it, if it is there.
    fn delete(&self, name: &str) -> impl Future<Output = Result<(), QueueError>> + Send;
}
