//! What `darkroom doctor` tries out on the broker: a queue of its own with the arguments of our job queues, which is
//! removed at the end, and by the broker after a minute if we do not live to do it.
use lapin::options::{
    BasicAckOptions, BasicGetOptions, BasicNackOptions, QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::FieldTable;
use lapin::{Channel, ErrorKind};
use schema::{PriorityBand, QueueArgument, QueueDeclaration, job_queue};
use serde::Serialize;
use tracing::debug;
use uuid::Uuid;

use super::{AmqpQueue, answer, declare_queue, is_not_found};
use crate::queue::{OutgoingMessage, PublishOutcome, Queue, QueueError};

/// The broker removes an unused queue after so many milliseconds. A quorum queue cannot be exclusive or auto-deleted.
const EXPIRES_MS: i64 = 60_000;

/// What came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueProbe {
    /// What became of a message for the probe's queue.
    pub published: PublishOutcome,
    /// Whether a message that was given back came again.
    pub comes_again: bool,
    /// What became of a message for a queue that is not there.
    pub to_a_missing_queue: PublishOutcome,
}

/// How a queue on the broker compares with how we declare it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum DeclaredQueue {
    /// There is none yet.
    Absent,
    /// It is as we declare it.
    Same,
    /// It was declared otherwise; the broker's words.
    Differs(String),
}

impl AmqpQueue {
    /// Declares a queue as a job queue is, and sends a message round.
    ///
    /// # Errors
    /// If the broker cannot be asked, or refuses to declare the queue.
    pub async fn probe(&self) -> Result<QueueProbe, QueueError> {
        let link = self.link()?;
        let id = Uuid::now_v7();
        let model = "doctor".parse().expect("lower-case letters are a model's name");
        let mut declaration = job_queue(&model, PriorityBand::Low);
        declaration.name = format!("darkroom-doctor.{id}");
        declaration.arguments.push(("x-expires", QueueArgument::Integer(EXPIRES_MS)));
        let channel = answer("declare a probe queue", async {
            let channel = link.connection.create_channel().await?;
            declare_queue(&channel, &declaration).await?;
            Ok(channel)
        });
        let channel = link.report_if_broken(channel.await)?;
        let probed = self.send_round(&channel, &declaration.name).await;
        let removed = answer("remove the probe queue", async {
            channel.queue_delete(declaration.name.as_str().into(), QueueDeleteOptions::default()).await?;
            channel.close(200, "OK".into()).await
        });
        if let Err(error) = removed.await {
            debug!(error = error.to_string(), "The probe queue is left to expire");
        }
        probed
    }

    async fn send_round(&self, channel: &Channel, name: &str) -> Result<QueueProbe, QueueError> {
        let message = [OutgoingMessage { body: b"darkroom doctor".to_vec(), traceparent: None }];
        let outcome =
            |outcomes: Vec<PublishOutcome>| outcomes.into_iter().next().unwrap_or(PublishOutcome::Unknown);
        let published = outcome(self.publish(name, &message).await?);
        let get = || channel.basic_get(name.into(), BasicGetOptions::default());
        let comes_again = answer("get a message twice", async {
            let Some(first) = get().await? else { return Ok(false) };
            let requeue = BasicNackOptions { multiple: false, requeue: true };
            channel.basic_nack(first.delivery.delivery_tag, requeue).await?;
            let Some(second) = get().await? else { return Ok(false) };
            channel.basic_ack(second.delivery.delivery_tag, BasicAckOptions::default()).await?;
            Ok(second.delivery.data == message[0].body)
        })
        .await?;
        let missing = format!("{name}.missing");
        let to_a_missing_queue = outcome(self.publish(&missing, &message).await?);
        Ok(QueueProbe { published, comes_again, to_a_missing_queue })
    }

    /// Compares the queue on the broker with `declaration`, without making it.
    ///
    /// # Errors
    /// If the broker cannot be asked.
    pub async fn compare(&self, declaration: &QueueDeclaration) -> Result<DeclaredQueue, QueueError> {
        let link = self.link()?;
        let compared = answer("compare a queue", async {
            // Either question closes its channel if the answer is no.
            let channel = link.connection.create_channel().await?;
            let (name, options) =
                (declaration.name.as_str().into(), QueueDeclareOptions::durable().passive());
            match channel.queue_declare(name, options, FieldTable::default()).await {
                Ok(_) => {}
                Err(error) if is_not_found(&error) => return Ok(DeclaredQueue::Absent),
                Err(error) => return Err(error),
            }
            match declare_queue(&channel, declaration).await {
                Ok(()) => channel.close(200, "OK".into()).await.map(|()| DeclaredQueue::Same),
                Err(error) => match error.kind() {
                    ErrorKind::ProtocolError(refused) => {
                        Ok(DeclaredQueue::Differs(refused.get_message().to_string()))
                    }
                    _ => Err(error),
                },
            }
        });
        link.report_if_broken(compared.await)
    }
}
