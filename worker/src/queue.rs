//! The wall towards the broker: what the worker asks of a queue, and the tag that settles a delivery exactly once.
//!
//! Deliveries are hints (the catalog holds the truth), so nothing here is needed for correctness of results; what is
//! needed is that a delivery is settled once and last. [`DeliveryTag`] is neither `Copy` nor `Clone` and is spent by
//! [`Queue::ack`] or [`Queue::nack`]: acking twice does not compile, and a tag that is dropped unsettled says so.

use std::fmt;
use std::future::Future;
use std::sync::Arc;

use schema::PriorityBand;
use tracing::{debug, warn};

use crate::metrics::Metrics;

/// One handing-over of a message to this worker.
#[derive(Debug)]
pub struct Delivery {
    /// Settles this delivery.
    pub tag: DeliveryTag,
    /// The message's bytes, not yet decoded.
    pub body: Vec<u8>,
    /// The W3C `traceparent` header, if the publisher sent one.
    pub traceparent: Option<String>,
    /// The broker's flag: this message was handed over before.
    pub redelivered: bool,
}

/// The right, and the duty, to settle one delivery.
#[must_use = "a delivery is settled by `Queue::ack` or `Queue::nack`"]
pub struct DeliveryTag {
    number: u64,
    settled: bool,
}

impl DeliveryTag {
    /// The tag of the delivery that its queue knows under `number`, unique within the process.
    pub fn new(number: u64) -> Self {
        Self { number, settled: false }
    }

    /// The number given to [`DeliveryTag::new`].
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Ends the tag's life without a warning. For implementations of [`Queue`] alone.
    pub fn spend(mut self) -> u64 {
        self.settled = true;
        self.number
    }
}

impl fmt::Debug for DeliveryTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeliveryTag({})", self.number)
    }
}

impl Drop for DeliveryTag {
    fn drop(&mut self) {
        if !self.settled {
            // Harmless for the results: the broker hands the message out again when the connection ends. But it is
            // a mistake of this program, and until then the delivery takes up prefetch.
            warn!(delivery.number = self.number, "A delivery was dropped without ack or nack");
        }
    }
}

/// Where a refused delivery goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Requeue {
    /// Back into its queue: we could not do, or not write down, what it asks for.
    Yes,
    /// To the dead letters: nobody can read it.
    No,
}

/// What became of an ack or nack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Settled {
    /// It was sent on the channel that the delivery came on.
    Sent,
    /// That channel is gone, so the broker has taken the delivery back and will hand it out again. The next claim
    /// finds the truth in the catalog; until then nothing is lost.
    Ineffective,
}

/// Why a delivery could not be settled.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The client library refused.
    #[error("the broker connection refused `{operation}`")]
    Refused {
        /// The AMQP method.
        operation: &'static str,
        /// The client library's error.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// One model's three band queues, as this worker sees them. Implementations rebuild lost connections by themselves.
pub trait Queue: Send + Sync + 'static {
    /// The next delivery of a band. Waits as long as it takes, through lost connections too; `None` after
    /// [`Queue::stop`], when what had been handed over before is used up. One caller per band.
    fn next(&self, band: PriorityBand) -> impl Future<Output = Option<Delivery>> + Send;

    /// The catalog has the truth about this delivery's job; the broker may forget it.
    fn ack(&self, tag: DeliveryTag) -> impl Future<Output = Result<Settled, QueueError>> + Send;

    /// Refuses a delivery.
    fn nack(
        &self,
        tag: DeliveryTag,
        requeue: Requeue,
    ) -> impl Future<Output = Result<Settled, QueueError>> + Send;

    /// Whether settling this delivery would still reach the broker.
    fn holds(&self, tag: &DeliveryTag) -> bool;

    /// Asks the broker for no more deliveries. Those handed over stay ours until they are settled.
    fn stop(&self) -> impl Future<Output = ()> + Send;
}

/// Settles deliveries for the stages: counts what had no effect, and logs what failed, since no stage can do more about it.
#[derive(Debug)]
pub struct Acknowledger<Q> {
    queue: Arc<Q>,
    metrics: Arc<Metrics>,
}

impl<Q> Clone for Acknowledger<Q> {
    fn clone(&self) -> Self {
        Self { queue: self.queue.clone(), metrics: self.metrics.clone() }
    }
}

impl<Q: Queue> Acknowledger<Q> {
    /// An acknowledger for this queue.
    pub fn new(queue: Arc<Q>, metrics: Arc<Metrics>) -> Self {
        Self { queue, metrics }
    }

    /// The catalog has the truth about this delivery's job; the broker may forget it.
    pub async fn ack(&self, tag: DeliveryTag) {
        let number = tag.number();
        self.report(number, self.queue.ack(tag).await);
    }

    /// Refuses a delivery.
    pub async fn nack(&self, tag: DeliveryTag, requeue: Requeue) {
        let number = tag.number();
        self.report(number, self.queue.nack(tag, requeue).await);
    }

    /// Whether settling would still reach the broker.
    pub fn holds(&self, tag: &DeliveryTag) -> bool {
        self.queue.holds(tag)
    }

    fn report(&self, number: u64, answer: Result<Settled, QueueError>) {
        self.metrics.settled.increment();
        match answer {
            Ok(Settled::Sent) => {}
            Ok(Settled::Ineffective) => {
                self.metrics.settled_ineffective.increment();
                debug!(
                    delivery.number = number,
                    "A delivery's channel is gone; the broker hands the message out again"
                );
            }
            Err(error) => {
                self.metrics.settled_ineffective.increment();
                let error = anyhow::Error::new(error);
                warn!(
                    delivery.number = number,
                    error = format!("{error:#}"),
                    "A delivery could not be settled"
                );
            }
        }
    }
}
