//! Taking messages out of the dead-letter queue, so that they can be recorded before the broker forgets them.
use lapin::options::{BasicAckOptions, BasicGetOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel};
use schema::{DEAD_LETTER_QUEUE, DeadLetter};
use tracing::debug;

use super::{AmqpQueue, answer, is_not_found};
use crate::queue::QueueError;

/// Dead letters that the broker keeps for us until they are acknowledged. Dropping them gives them back.
#[derive(Debug)]
#[must_use]
pub struct TakenDeadLetters {
    letters: Vec<DeadLetter>,
    last_tag: u64,
    /// Of its own, so that giving up means closing it.
    channel: Channel,
}

impl AmqpQueue {
    /// Takes up to `limit` messages out of the dead-letter queue.
    ///
    /// # Errors
    /// If the broker cannot be asked; then it keeps them all.
    pub async fn take_dead_letters(&self, limit: usize) -> Result<TakenDeadLetters, QueueError> {
        let link = self.link()?;
        let taken = answer("take dead letters", async {
            let channel = link.connection.create_channel().await?;
            let mut taken = TakenDeadLetters { letters: Vec::new(), last_tag: 0, channel };
            while taken.letters.len() < limit {
                let got = taken.channel.basic_get(DEAD_LETTER_QUEUE.into(), BasicGetOptions::default()).await;
                let message = match got {
                    Ok(Some(message)) => message,
                    Ok(None) => break,
                    // Nobody has declared a queue yet.
                    Err(error) if is_not_found(&error) => break,
                    Err(error) => return Err(error),
                };
                let (queue, reason) = origin(&message.delivery.properties);
                taken.last_tag = message.delivery.delivery_tag;
                taken.letters.push(DeadLetter { queue, reason, body: message.delivery.data });
            }
            Ok(taken)
        });
        link.report_if_broken(taken.await)
    }
}

impl TakenDeadLetters {
    /// What was taken.
    pub fn letters(&self) -> &[DeadLetter] {
        &self.letters
    }

    /// Lets the broker forget them.
    ///
    /// # Errors
    /// If the broker cannot be told; then it hands them out again.
    pub async fn ack(self) -> Result<(), QueueError> {
        if self.letters.is_empty() {
            return Ok(());
        }
        answer("acknowledge dead letters", async {
            self.channel.basic_ack(self.last_tag, BasicAckOptions { multiple: true }).await?;
            // The broker answers it after the acknowledgement has arrived.
            self.channel.close(200, "OK".into()).await
        })
        .await
    }

    /// Lets the broker keep them.
    pub async fn give_back(self) {
        let closed = answer("give dead letters back", self.channel.close(200, "OK".into())).await;
        if let Err(error) = closed {
            debug!(
                error = error.to_string(),
                "The connection is gone, which gives dead letters back as well"
            );
        }
    }
}

/// The queue that a dead letter was given up in, and why: the latest entry of its `x-death` header.
fn origin(properties: &BasicProperties) -> (String, String) {
    let headers = properties.headers().as_ref();
    let death = headers.and_then(|headers| match headers.inner().get("x-death") {
        Some(AMQPValue::FieldArray(deaths)) => deaths.as_slice().first(),
        _ => None,
    });
    let text = |table: &FieldTable, name: &str| match table.inner().get(name) {
        Some(AMQPValue::LongString(text)) => text.to_string(),
        _ => "unknown".to_owned(),
    };
    match death {
        Some(AMQPValue::FieldTable(death)) => (text(death, "queue"), text(death, "reason")),
        _ => ("unknown".to_owned(), "unknown".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_death_tells_where_from_and_why() {
        let death = |queue: &str, reason: &str| {
            let mut table = FieldTable::default();
            table.insert("queue".into(), AMQPValue::LongString(queue.into()));
            table.insert("reason".into(), AMQPValue::LongString(reason.into()));
            AMQPValue::FieldTable(table)
        };
        let mut headers = FieldTable::default();
        let deaths = vec![death("darkroom.jobs.demo.low", "rejected"), death("older", "expired")];
        headers.insert("x-death".into(), AMQPValue::FieldArray(deaths.into()));
        let properties = BasicProperties::default().with_headers(headers);
        assert_eq!(origin(&properties), ("darkroom.jobs.demo.low".to_owned(), "rejected".to_owned()));
        let unknown = ("unknown".to_owned(), "unknown".to_owned());
        assert_eq!(origin(&BasicProperties::default()), unknown, "somebody published straight to it");
    }
}
