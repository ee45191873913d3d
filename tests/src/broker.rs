//! The test's own hand on the broker: messages and queues without the scheduler or a worker.

use std::time::Duration;

use lapin::options::{
    BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions, QueueDeleteOptions, QueuePurgeOptions,
};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use nix::sys::signal::Signal;
use schema::{JobMessage, PriorityBand, job_queue};
use sqlx::FromRow;

use crate::fleet::Fleet;
use crate::process::Process;
use crate::waiting::eventually;

/// A connection to a fleet's broker.
pub struct Broker {
    connection: Connection,
}

#[derive(FromRow)]
struct JobRow {
    job_id: uuid::Uuid,
    key: String,
}

impl Broker {
    /// Connects.
    pub async fn of(fleet: &Fleet) -> Broker {
        let uri = &fleet.servers().addresses().amqp_url;
        let connecting = Connection::connect(uri, ConnectionProperties::default());
        Broker { connection: connecting.await.expect("the broker answers") }
    }

    /// Connects if the broker answers now.
    pub async fn try_of(fleet: &Fleet) -> Option<Broker> {
        let uri = &fleet.servers().addresses().amqp_url;
        let connecting = Connection::connect(uri, ConnectionProperties::default());
        let connected = tokio::time::timeout(Duration::from_secs(5), connecting).await;
        connected.ok()?.ok().map(|connection| Broker { connection })
    }

    /// The channel that one question is asked on: a refused one closes its channel.
    async fn channel(&self) -> Channel {
        self.connection.create_channel().await.expect("a channel")
    }

    /// Publishes one message and waits until the broker has it.
    pub async fn publish(&self, queue: &str, body: &[u8]) {
        let channel = self.channel().await;
        channel.confirm_select(ConfirmSelectOptions::default()).await.expect("confirms");
        let persistent = BasicProperties::default().with_delivery_mode(2);
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let sent = channel.basic_publish("".into(), queue.into(), options, body, persistent).await;
        let confirmed = sent.expect("the message can be sent").await.expect("a confirm");
        assert!(confirmed.is_ack() && confirmed.take_message().is_none(), "{queue} took the message");
    }

    /// How many messages are ready in `queue`; `None` if there is no such queue.
    pub async fn ready(&self, queue: &str) -> Option<u32> {
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let declared = self.channel().await.queue_declare(queue.into(), passive, FieldTable::default()).await;
        declared.ok().map(|queue| queue.message_count())
    }

    /// Deletes `queue` with all that is in it.
    pub async fn delete(&self, queue: &str) {
        let deleted = self.channel().await.queue_delete(queue.into(), QueueDeleteOptions::default()).await;
        deleted.expect("a queue can be deleted");
    }

    /// The same, if it is there and the broker stays long enough to do it.
    pub async fn try_delete(&self, queue: &str) {
        if let Ok(channel) = self.connection.create_channel().await {
            // Gone is gone, whoever did it.
            let _ = channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await;
        }
    }

    /// Empties `queue`; returns how many messages that were.
    pub async fn purge(&self, queue: &str) -> u32 {
        let purged = self.channel().await.queue_purge(queue.into(), QueuePurgeOptions::default()).await;
        purged.expect("a queue can be purged")
    }

    /// Shows that no message of `fleet`'s normal band is left anywhere: a job that comes last is done, the one worker
    /// gives back what it still holds, and the queue is empty.
    pub async fn assert_all_spent(
        &self,
        fleet: &Fleet,
        worker: &mut Process,
        options: &[&str],
        deadline: Duration,
    ) {
        fleet.submit("the last one\n", options);
        fleet.await_all_final(deadline).await;
        worker.signal(Signal::SIGTERM);
        assert!(worker.exit(deadline).await.success(), "{}", worker.log());
        let queue = fleet.queue(PriorityBand::Normal);
        eventually("no message", deadline, || self.ready(&queue), |ready| *ready == Some(0)).await;
    }
}

impl Fleet {
    /// The queue of its model in `band`.
    pub fn queue(&self, band: PriorityBand) -> String {
        job_queue(&self.model().parse().expect("a model's name"), band).name
    }

    /// The messages that the relay would publish for a batch's jobs, in their order.
    pub async fn messages(&self, batch_id: &str) -> Vec<Vec<u8>> {
        let sql = "SELECT job_id, width || 'x' || height || '/' || num_inference_steps || '/' || noise_scheduler || '/'
                       || CASE WHEN guidance_scale > 1 THEN 'cfg' ELSE 'plain' END AS key
                   FROM jobs WHERE batch_id = $1::uuid ORDER BY ordinal";
        let rows: Vec<JobRow> =
            sqlx::query_as(sql).bind(batch_id).fetch_all(self.pool()).await.expect("jobs can be read");
        let message = |row: JobRow| JobMessage {
            microbatch_limit: None,
            job_id: row.job_id.to_string().parse().expect("a job's id"),
            microbatch_key: row.key.parse().expect("a microbatch key"),
        };
        rows.into_iter().map(|row| message(row).encode()).collect()
    }
}
