//! The dead-letter recorder: moves messages that nobody could read from the broker into a table.
//!
//! The broker keeps each message until its row is committed. A crash in between brings it again, and then its row counts
//! one too many.
use anyhow::Result;
use schema::PgCatalog;
use serde::Serialize;
use tracing::warn;

use crate::amqp::AmqpQueue;

/// Messages in one statement.
const LIMIT: usize = 100;

/// What one run did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DeadLetterReport {
    /// Messages that are rows now, and no longer in the broker.
    pub recorded: u64,
}

/// Records every dead letter there is. Safe to run twice, and by two schedulers at once.
///
/// # Errors
/// If the catalog or the broker cannot be asked; what is not recorded stays where it is.
pub async fn run_once(catalog: &PgCatalog, queue: &AmqpQueue) -> Result<DeadLetterReport> {
    // Taking and giving back counts as a delivery, of which the broker may allow only 20.
    catalog.ping().await?;
    let mut report = DeadLetterReport::default();
    loop {
        let taken = queue.take_dead_letters(LIMIT).await?;
        let count = taken.letters().len();
        if let Err(error) = catalog.record_dead_letters(taken.letters()).await {
            taken.give_back().await;
            return Err(error.into());
        }
        for letter in taken.letters() {
            warn!(
                queue.name = letter.queue,
                reason = letter.reason,
                size_bytes = letter.body.len(),
                "Nobody could read a message; it is in the table dead_letters"
            );
        }
        taken.ack().await?;
        report.recorded += count as u64;
        if count < LIMIT {
            return Ok(report);
        }
    }
}
