//! First stage: takes deliveries of one band, reads them, and passes entries on.
//!
//! Unreadable messages go to the dead letters here and nowhere else. When the worker drains, what the broker had handed
//! over already goes back to its queue.

use schema::{JobMessage, PriorityBand};
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::error;

use crate::backoff::Chain;
use crate::metrics::Metrics;
use crate::microbatch::Entry;
use crate::queue::{Acknowledger, Delivery, Queue, Requeue};

/// One band's consumer.
#[derive(Debug)]
pub struct Consumer<Q> {
    /// Where the deliveries come from.
    pub queue: Arc<Q>,
    /// Settles those that go no further.
    pub acknowledger: Acknowledger<Q>,
    /// The band.
    pub band: PriorityBand,
    /// Counts.
    pub metrics: Arc<Metrics>,
}

impl<Q: Queue> Consumer<Q> {
    /// Consumes until `drain` is cancelled and the deliveries that were under way by then are back in their queue.
    pub async fn run(self, entries: mpsc::Sender<Entry>, drain: CancellationToken) {
        while let Some(delivery) = self.queue.next(self.band).await {
            self.metrics.deliveries.increment();
            self.metrics.touch();
            if drain.is_cancelled() {
                self.acknowledger.nack(delivery.tag, Requeue::Yes).await;
                continue;
            }
            let Some(entry) = self.read(delivery).await else { continue };
            // Waits while the batcher has no room; the broker's prefetch then holds the rest back.
            if let Err(mpsc::error::SendError(entry)) = entries.send(entry).await {
                self.acknowledger.nack(entry.tag, Requeue::Yes).await;
            }
        }
    }

    async fn read(&self, delivery: Delivery) -> Option<Entry> {
        match JobMessage::decode(&delivery.body) {
            Ok(message) => {
                Some(Entry { message, band: self.band, tag: delivery.tag, arrived: Instant::now() })
            }
            Err(error) => {
                self.metrics.unreadable.increment();
                error!(
                    size_bytes = delivery.body.len(),
                    error = %Chain(&error),
                    "A message in band {} is unreadable and goes to the dead letters", self.band
                );
                self.acknowledger.nack(delivery.tag, Requeue::No).await;
                None
            }
        }
    }
}
