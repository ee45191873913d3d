//! RabbitMQ behind the [`Queue`] wall; the only room that knows lapin.
//!
//! A supervisor task owns the connection. On any sign that it is gone, the task drops it and builds another, with
//! jittered backoff and a limit on every step; lapin's own recovery stays off, because it can wait forever. What was
//! published on a lost connection is [`PublishOutcome::Unknown`]: the relay publishes it again, and workers make
//! the second message harmless.
mod dead_letters;
mod greeting;
mod probe;

use std::sync::Arc;
use std::time::Duration;

pub use dead_letters::TakenDeadLetters;
use futures::StreamExt;
use lapin::options::{
    BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
    QueueDeleteOptions,
};
use lapin::protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError};
use lapin::types::{AMQPValue, FieldTable};
use lapin::uri::AMQPUri;
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties, ErrorKind, Event, ExchangeKind,
};
pub use probe::{DeclaredQueue, QueueProbe};
use rand::RngExt;
use schema::{
    BrokerVersion, QueueArgument, QueueDeclaration, TRACEPARENT_HEADER, dead_letter_exchange,
    dead_letter_queue,
};
use secrecy::{ExposeSecret, SecretString};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::queue::{OutgoingMessage, PublishOutcome, Queue, QueueError};

/// TCP, TLS, login and opening a channel, all together.
const CONNECT_LIMIT: Duration = Duration::from_secs(15);
/// One question and its answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(15);
/// All confirms of one `publish` call. A confirm takes milliseconds, or seconds while a quorum elects a leader.
const CONFIRM_LIMIT: Duration = Duration::from_secs(20);
/// Both sides give a silent connection up after twice this many seconds; the broker's default of 60 is slow to notice a
/// machine that is gone. A `heartbeat` in the URL wins.
const HEARTBEAT_SECONDS: u16 = 10;
/// Waits between attempts to connect double from the first to the last.
const BACKOFF: std::ops::Range<Duration> = Duration::from_millis(250)..Duration::from_secs(5);
/// `delivery_mode` of a message that survives a restart of the broker.
const PERSISTENT: u8 = 2;

/// A connection in use, with the channel that publishes in confirm mode.
struct Link {
    connection: Connection,
    publisher: Channel,
    /// Somebody found the link unusable; the supervisor replaces it.
    broken: Notify,
}

/// A broker connection that heals. Dropping it ends the supervisor.
pub struct AmqpQueue {
    /// Written by the supervisor, read by everyone who asks the broker something.
    link: watch::Receiver<Option<Arc<Link>>>,
    shutdown: CancellationToken,
    supervisor: JoinHandle<()>,
}

impl std::fmt::Debug for AmqpQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AmqpQueue").field("connected", &self.link.borrow().is_some()).finish_non_exhaustive()
    }
}

impl AmqpQueue {
    /// Starts the supervisor and returns at once; use [`connected`](Self::connected) to wait.
    ///
    /// # Errors
    /// If `url` is not an AMQP URL.
    pub fn start(url: &SecretString) -> Result<Self, QueueError> {
        let uri = parse(url)?;
        let (sender, link) = watch::channel(None);
        let shutdown = CancellationToken::new();
        let supervisor = tokio::spawn(supervise(uri, sender, shutdown.clone()));
        Ok(Self { link, shutdown, supervisor })
    }

    /// Waits until there is a connection. Never ends if the broker never comes.
    pub async fn connected(&self) {
        // An error means that the supervisor is gone, which only `close` and dropping bring about.
        let _ = self.link.clone().wait_for(Option::is_some).await;
    }

    /// Closes the connection in good order.
    pub async fn close(mut self) {
        self.shutdown.cancel();
        if let Err(error) = (&mut self.supervisor).await {
            warn!(error = format!("{error:#}"), "The broker connection's supervisor failed");
        }
    }

    fn link(&self) -> Result<Arc<Link>, QueueError> {
        self.link.borrow().clone().ok_or(QueueError::NotConnected)
    }
}

impl Drop for AmqpQueue {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

impl Queue for AmqpQueue {
    async fn declare(&self, declaration: &QueueDeclaration) -> Result<(), QueueError> {
        let link = self.link()?;
        let declared = answer("declare a queue", async {
            // A refused declaration closes its channel, so it gets one of its own.
            let channel = link.connection.create_channel().await?;
            let exchange = dead_letter_exchange();
            declare_queue(&channel, &dead_letter_queue()).await?;
            let options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
            let fanout = ExchangeKind::Fanout;
            channel.exchange_declare(exchange.name.into(), fanout, options, FieldTable::default()).await?;
            let (queue, arguments) = (exchange.bound_queue.into(), FieldTable::default());
            let options = QueueBindOptions::default();
            channel.queue_bind(queue, exchange.name.into(), "".into(), options, arguments).await?;
            declare_queue(&channel, declaration).await?;
            channel.close(200, "OK".into()).await
        });
        link.report_if_broken(declared.await)
    }

    async fn publish(
        &self,
        name: &str,
        messages: &[OutgoingMessage],
    ) -> Result<Vec<PublishOutcome>, QueueError> {
        let link = self.link()?;
        if link.connection.status().blocked() {
            return Err(QueueError::Blocked);
        }
        let deadline = Instant::now() + CONFIRM_LIMIT;
        // All are sent before the first confirm is awaited: one at a time would be a hundred times slower.
        let mut confirms = Vec::with_capacity(messages.len());
        // What becomes of messages that were not sent.
        let mut unsent = PublishOutcome::Unknown;
        for message in messages {
            let sent = link.publisher.basic_publish(
                "".into(),
                name.into(),
                BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() },
                &message.body,
                properties(message),
            );
            match time::timeout_at(deadline, sent).await {
                Ok(Ok(confirm)) => confirms.push(confirm),
                Ok(Err(error)) => {
                    warn!(queue.name = name, error = format!("{error:#}"), "Cannot send a message");
                    break;
                }
                Err(_) => {
                    unsent = PublishOutcome::Silent;
                    break;
                }
            }
        }
        let mut outcomes = Vec::with_capacity(messages.len());
        for confirm in confirms {
            outcomes.push(match time::timeout_at(deadline, confirm).await {
                Ok(Ok(Confirmation::Ack(None))) => PublishOutcome::Confirmed,
                // Acknowledged and sent back: the broker took it, found no queue for it, and dropped it.
                Ok(Ok(Confirmation::Ack(Some(_)))) => PublishOutcome::Returned,
                Ok(Ok(Confirmation::Nack(_))) => PublishOutcome::Refused,
                Ok(Ok(Confirmation::NotRequested)) | Ok(Err(_)) => PublishOutcome::Unknown,
                Err(_) => PublishOutcome::Silent,
            });
        }
        outcomes.resize(messages.len(), unsent);
        let is_known =
            |outcome: &PublishOutcome| !matches!(outcome, PublishOutcome::Unknown | PublishOutcome::Silent);
        let unknown = outcomes.iter().filter(|outcome| !is_known(outcome)).count();
        if unknown > 0 {
            let blocked = link.connection.status().blocked();
            warn!(
                queue.name = name,
                unknown, blocked, "The broker did not say what became of {unknown} messages"
            );
            // A blocked broker will answer when it has room; any other silence is a connection to replace.
            if !blocked {
                link.broken.notify_one();
            } else if unknown == messages.len() {
                return Err(QueueError::Blocked);
            }
        }
        Ok(outcomes)
    }

    async fn ready_count(&self, name: &str) -> Result<Option<u32>, QueueError> {
        let link = self.link()?;
        let counted = answer("count a queue", async {
            // Asking for a queue that is not there closes the channel, so it gets one of its own.
            let channel = link.connection.create_channel().await?;
            let options = QueueDeclareOptions::durable().passive();
            match channel.queue_declare(name.into(), options, FieldTable::default()).await {
                Ok(queue) => {
                    channel.close(200, "OK".into()).await?;
                    Ok(Some(queue.message_count()))
                }
                Err(error) if is_not_found(&error) => Ok(None),
                Err(error) => Err(error),
            }
        });
        link.report_if_broken(counted.await)
    }

    async fn delete(&self, name: &str) -> Result<(), QueueError> {
        let link = self.link()?;
        let deleted = answer("delete a queue", async {
            let channel = link.connection.create_channel().await?;
            // Of a queue that is not there, RabbitMQ says that it was deleted.
            channel.queue_delete(name.into(), QueueDeleteOptions::default()).await?;
            channel.close(200, "OK".into()).await
        });
        link.report_if_broken(deleted.await)
    }
}

impl Link {
    /// Passes `answer` on, and tells the supervisor if it shows a dead connection.
    fn report_if_broken<T>(&self, answer: Result<T, QueueError>) -> Result<T, QueueError> {
        let timed_out = matches!(answer, Err(QueueError::TimedOut { .. }));
        if timed_out || (answer.is_err() && !self.connection.status().connected()) {
            self.broken.notify_one();
        }
        answer
    }
}

/// Whether a client can log in at `url` now.
pub async fn answers(url: &SecretString) -> bool {
    let answer = log_in(url).await;
    if let Err(error) = &answer {
        debug!(error = error.to_string(), "The broker does not answer yet");
    }
    answer.is_ok()
}

/// Logs in at `url` and out again.
///
/// # Errors
/// With the reason, if that cannot be done.
pub async fn log_in(url: &SecretString) -> Result<(), QueueError> {
    close(&connect(&parse(url)?).await?).await;
    Ok(())
}

/// The version of the RabbitMQ at `url`, without logging in.
///
/// # Errors
/// If it does not answer in time, or is no RabbitMQ.
pub async fn broker_version(url: &SecretString) -> Result<BrokerVersion, QueueError> {
    let uri = parse(url)?;
    let what = "ask for its version";
    match time::timeout(ANSWER_LIMIT, greeting::broker_version(&uri)).await {
        Ok(Ok(version)) => Ok(version),
        Ok(Err(error)) => Err(QueueError::Failed { what, reason: error.to_string() }),
        Err(_) => Err(QueueError::TimedOut { what, seconds: ANSWER_LIMIT.as_secs() }),
    }
}

async fn supervise(uri: AMQPUri, sender: watch::Sender<Option<Arc<Link>>>, shutdown: CancellationToken) {
    let mut backoff = BACKOFF.start;
    loop {
        let connected = tokio::select! {
            connected = connect(&uri) => connected,
            () = shutdown.cancelled() => return,
        };
        match connected {
            Ok(link) => {
                info!("Connected to the broker");
                let link = Arc::new(link);
                let since = Instant::now();
                sender.send_replace(Some(Arc::clone(&link)));
                let end = tokio::select! {
                    reason = link_lost(&link) => Some(reason),
                    () = shutdown.cancelled() => None,
                };
                sender.send_replace(None);
                close(&link).await;
                let Some(reason) = end else { return };
                warn!(reason, "Lost the broker; connecting again");
                // A connection that breaks as soon as it stands must not be rebuilt in a busy loop.
                if since.elapsed() > BACKOFF.end {
                    backoff = BACKOFF.start;
                }
            }
            Err(error) => {
                let error = error.to_string();
                warn!(error, "Cannot connect to the broker; trying again within {backoff:?}");
            }
        }
        // Jitter, so that a fleet does not come back in step: somewhere in the upper half of the wait.
        let pause = backoff.mul_f64(rand::rng().random_range(0.5..1.0));
        tokio::select! {
            () = time::sleep(pause) => {}
            () = shutdown.cancelled() => return,
        }
        backoff = (backoff * 2).min(BACKOFF.end);
    }
}

/// Waits for the first sign that `link` is of no more use, and says which.
async fn link_lost(link: &Link) -> String {
    let mut events = std::pin::pin!(link.connection.events_listener());
    loop {
        if !link.connection.status().connected() {
            return "the connection was closed".to_owned();
        }
        if !link.publisher.status().connected() {
            return "the publishing channel was closed".to_owned();
        }
        tokio::select! {
            event = events.next() => match event {
                None => return "the connection ended".to_owned(),
                // A question about a queue that is not there closes its own channel and nothing else.
                Some(Event::Error(error)) if error.is_amqp_soft_error() => {}
                Some(Event::Error(error)) => return error.to_string(),
                Some(Event::ConnectionBlocked(reason)) => warn!(reason, "The broker blocks publishers"),
                Some(Event::ConnectionUnblocked) => info!("The broker takes messages again"),
                Some(_) => {}
            },
            () = link.broken.notified() => return "it did not answer".to_owned(),
        }
    }
}

async fn connect(uri: &AMQPUri) -> Result<Link, QueueError> {
    let name = format!("darkroom {}", env!("CARGO_PKG_VERSION"));
    let properties = ConnectionProperties::default().with_connection_name(name.into());
    let link = async {
        let connection = Connection::connect_uri(uri.clone(), properties).await?;
        let publisher = connection.create_channel().await?;
        publisher.confirm_select(ConfirmSelectOptions::default()).await?;
        Ok(Link { connection, publisher, broken: Notify::new() })
    };
    within(CONNECT_LIMIT, "connect", link).await
}

/// Says goodbye if the other side still listens.
async fn close(link: &Link) {
    let goodbye = answer("close", link.connection.close(200, "OK".into()));
    if let Err(error) = goodbye.await {
        debug!(error = error.to_string(), "The broker connection did not close in order");
    }
}

fn parse(url: &SecretString) -> Result<AMQPUri, QueueError> {
    // The text holds a password, so the error must not quote it.
    let mut uri: AMQPUri = url
        .expose_secret()
        .parse()
        .map_err(|error: String| QueueError::Failed { what: "read AMQP_URL", reason: error })?;
    uri.query.heartbeat.get_or_insert(HEARTBEAT_SECONDS);
    Ok(uri)
}

async fn declare_queue(channel: &Channel, declaration: &QueueDeclaration) -> lapin::Result<()> {
    let mut arguments = FieldTable::default();
    for (name, value) in &declaration.arguments {
        let value = match *value {
            QueueArgument::Text(text) => AMQPValue::LongString(text.into()),
            QueueArgument::Integer(number) => AMQPValue::LongLongInt(number),
        };
        arguments.insert((*name).into(), value);
    }
    let name = declaration.name.as_str().into();
    channel.queue_declare(name, QueueDeclareOptions::durable(), arguments).await.map(drop)
}

fn properties(message: &OutgoingMessage) -> BasicProperties {
    let properties = BasicProperties::default()
        .with_delivery_mode(PERSISTENT)
        .with_content_type("application/json".into());
    let Some(traceparent) = &message.traceparent else { return properties };
    let mut headers = FieldTable::default();
    headers.insert(TRACEPARENT_HEADER.into(), AMQPValue::LongString(traceparent.as_str().into()));
    properties.with_headers(headers)
}

fn is_not_found(error: &lapin::Error) -> bool {
    let ErrorKind::ProtocolError(error) = error.kind() else { return false };
    *error.kind() == AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND)
}

fn is_internal_error(error: &lapin::Error) -> bool {
    let ErrorKind::ProtocolError(error) = error.kind() else { return false };
    *error.kind() == AMQPErrorKind::Hard(AMQPHardError::INTERNALERROR)
}

async fn answer<T>(
    what: &'static str,
    question: impl Future<Output = lapin::Result<T>>,
) -> Result<T, QueueError> {
    within(ANSWER_LIMIT, what, question).await
}

async fn within<T>(
    limit: Duration,
    what: &'static str,
    question: impl Future<Output = lapin::Result<T>>,
) -> Result<T, QueueError> {
    match time::timeout(limit, question).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) if is_internal_error(&error) => Err(QueueError::Crashed { what }),
        Ok(Err(error)) => Err(QueueError::Failed { what, reason: error.to_string() }),
        Err(_) => Err(QueueError::TimedOut { what, seconds: limit.as_secs() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_url_gets_a_heartbeat_unless_it_has_one() {
        let uri = parse(&"amqp://u:p@h/%2f".into()).unwrap();
        assert_eq!(uri.query.heartbeat, Some(HEARTBEAT_SECONDS));
        let uri = parse(&"amqp://u:p@h/%2f?heartbeat=33".into()).unwrap();
        assert_eq!(uri.query.heartbeat, Some(33));
    }

    #[test]
    fn a_bad_url_is_refused_without_its_password() {
        let error = anyhow::Error::from(parse(&"http://u:hunter2@h/".into()).unwrap_err());
        assert!(!format!("{error:#} {error:?}").contains("hunter2"), "{error:#}");
    }

    #[tokio::test]
    async fn without_a_broker_every_question_says_so() {
        // Port 1 on loopback refuses at once.
        let queue = AmqpQueue::start(&"amqp://u:p@127.0.0.1:1/%2f".into()).unwrap();
        assert!(matches!(queue.publish("q", &[]).await, Err(QueueError::NotConnected)));
        assert!(matches!(queue.ready_count("q").await, Err(QueueError::NotConnected)));
        queue.close().await;
    }
}
