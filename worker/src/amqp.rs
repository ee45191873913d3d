//! RabbitMQ behind the [`Queue`] wall; the only room that knows lapin.
//!
//! A supervisor task owns the connection. On any sign that it is gone (an error, a consumer's stream that ends, a broker
//! that does not answer, or one that has messages and hands none out) the task drops it and builds another, with jittered
//! backoff and a limit on every step; lapin's own recovery stays off, because it can wait forever. Work in flight goes on
//! meanwhile: its acks come back as ineffective, and the messages that the broker hands out again find their jobs held
//! or finished when they are claimed.
//!
//! Each band has a channel of its own, so that a closed one takes nothing else with it, and a prefetch of its own.

mod greeting;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures::StreamExt;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions,
    ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::uri::AMQPUri;
use lapin::{Acker, Channel, Connection, ConnectionProperties, Event, ExchangeKind};
use schema::{
    BrokerVersion, ModelName, PriorityBand, QueueArgument, QueueDeclaration, TRACEPARENT_HEADER,
    dead_letter_exchange, dead_letter_queue, job_queue,
};
use secrecy::{ExposeSecret, SecretString};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::backoff::{Backoff, Chain};
use crate::metrics::Metrics;
use crate::queue::{Delivery, DeliveryTag, Queue, QueueError, Requeue, Settled};

/// TCP, TLS, login, declarations and consumers, all together.
const CONNECT_LIMIT: Duration = Duration::from_secs(15);
/// One question and its answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// Both sides give a silent connection up after twice this many seconds; the broker's default of 60 is slow to notice a
/// machine that is gone. A `heartbeat` in the URL wins.
const HEARTBEAT_SECONDS: u16 = 10;
/// As `ANSWER_LIMIT`, while the worker drains and time is short.
const STOP_LIMIT: Duration = Duration::from_secs(3);
/// How often the broker is asked whether it still has us as a consumer. Two suspicious answers rebuild the connection.
const WATCHDOG_INTERVAL: Duration = Duration::from_secs(15);
/// A connection that lasted this long was good: the next one is tried without a long wait.
const GOOD_CONNECTION: Duration = Duration::from_secs(60);

/// What the queue needs to know.
#[derive(Debug, Clone)]
pub struct AmqpSettings {
    /// `amqp[s]://USER:PASSWORD@HOST:PORT/VHOST`.
    pub url: SecretString,
    /// Whose queues to consume.
    pub model: ModelName,
    /// Unsettled deliveries allowed for each band.
    pub prefetch: u16,
    /// How the connection is called in the broker's own lists.
    pub connection_name: String,
}

/// The URL is not an AMQP URL. Does not show it, since it holds a password.
#[derive(Debug, thiserror::Error)]
#[error("AMQP_URL has to look like amqp[s]://USER:PASSWORD@HOST:PORT/VHOST, but {reason}")]
pub struct AmqpUrlError {
    reason: String,
}

/// One model's band queues over a connection that heals.
#[derive(Debug)]
pub struct AmqpQueue {
    shared: Arc<Shared>,
    supervisor: Mutex<Option<JoinHandle<()>>>,
}

/// What the supervisor and the stages share.
#[derive(Debug)]
struct Shared {
    settings: AmqpSettings,
    uri: AMQPUri,
    bands: Vec<Band>,
    /// Every unsettled delivery's acker. Written by the supervisor on arrival, removed by whoever settles; never held
    /// across an await.
    ackers: Mutex<HashMap<u64, Acker>>,
    next_number: AtomicU64,
    /// Cancelled when no more deliveries are wanted.
    stop: CancellationToken,
    /// Cancelled when nothing more will be settled.
    close: CancellationToken,
    metrics: Arc<Metrics>,
}

/// One band's line from the supervisor to its consumer.
#[derive(Debug)]
struct Band {
    band: PriorityBand,
    queue: QueueDeclaration,
    /// Taken by the one consumer of the band, and by no one else.
    deliveries: tokio::sync::Mutex<mpsc::Receiver<Delivery>>,
    /// Deliveries that arrived, ever. Written by the supervisor's forwarding, read by its watchdog.
    arrived: AtomicU64,
}

/// The version of the RabbitMQ at `url`, without logging in; `None` if it does not answer in time or is no RabbitMQ.
pub async fn broker_version(url: &SecretString) -> Result<Option<BrokerVersion>, AmqpUrlError> {
    let uri: AMQPUri = url.expose_secret().parse().map_err(|reason: String| AmqpUrlError { reason })?;
    match timeout(ANSWER_LIMIT, greeting::broker_version(&uri)).await {
        Ok(Ok(version)) => Ok(Some(version)),
        Ok(Err(error)) => {
            warn!(error = %Chain(&error), "The broker does not tell its version");
            Ok(None)
        }
        Err(_) => {
            warn!("The broker did not tell its version in time");
            Ok(None)
        }
    }
}

impl AmqpQueue {
    /// Starts the supervisor and returns at once; deliveries come when the broker does.
    pub fn start(settings: AmqpSettings, metrics: Arc<Metrics>) -> Result<Self, AmqpUrlError> {
        let mut uri: AMQPUri =
            settings.url.expose_secret().parse().map_err(|reason: String| AmqpUrlError { reason })?;
        uri.query.heartbeat.get_or_insert(HEARTBEAT_SECONDS);
        let (senders, bands) = PriorityBand::ALL
            .iter()
            .map(|&band| {
                let (sender, deliveries) = mpsc::channel(1);
                let queue = job_queue(&settings.model, band);
                let deliveries = tokio::sync::Mutex::new(deliveries);
                (sender, Band { band, queue, deliveries, arrived: AtomicU64::new(0) })
            })
            .unzip();
        let shared = Arc::new(Shared {
            settings,
            uri,
            bands,
            ackers: Mutex::default(),
            next_number: AtomicU64::new(1),
            stop: CancellationToken::new(),
            close: CancellationToken::new(),
            metrics,
        });
        let supervisor = Mutex::new(Some(tokio::spawn(supervise(shared.clone(), senders))));
        Ok(Self { shared, supervisor })
    }

    /// Ends the connection in good order, once all that will be settled is.
    pub async fn close(&self) {
        self.shared.stop.cancel();
        self.shared.close.cancel();
        let supervisor = self.supervisor.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        if let Some(supervisor) = supervisor
            && timeout(ANSWER_LIMIT, supervisor).await.is_err()
        {
            warn!("The broker connection did not close in time");
        }
    }

    async fn settle<F>(
        &self,
        tag: DeliveryTag,
        operation: &'static str,
        settle: impl FnOnce(Acker) -> F,
    ) -> Result<Settled, QueueError>
    where
        F: Future<Output = lapin::Result<bool>>,
    {
        let Some(acker) = self.shared.ackers().remove(&tag.spend()) else { return Ok(Settled::Ineffective) };
        match timeout(ANSWER_LIMIT, settle(acker)).await {
            // `false` is no error to lapin: the channel died before.
            Ok(Ok(sent)) => Ok(if sent { Settled::Sent } else { Settled::Ineffective }),
            Ok(Err(error)) => Err(QueueError::Refused { operation, source: error.into() }),
            Err(elapsed) => Err(QueueError::Refused { operation, source: elapsed.into() }),
        }
    }
}

impl Drop for AmqpQueue {
    fn drop(&mut self) {
        self.shared.stop.cancel();
        self.shared.close.cancel();
    }
}

impl Queue for AmqpQueue {
    async fn next(&self, band: PriorityBand) -> Option<Delivery> {
        let band = self.shared.bands.iter().find(|line| line.band == band)?;
        let mut deliveries = band.deliveries.lock().await;
        loop {
            let delivery = deliveries.recv().await?;
            if self.holds(&delivery.tag) {
                return Some(delivery);
            }
            // It came on a connection that is gone, so it will come again.
            self.shared.ackers().remove(&delivery.tag.spend());
        }
    }

    async fn ack(&self, tag: DeliveryTag) -> Result<Settled, QueueError> {
        self.settle(tag, "basic.ack", |acker| async move { acker.ack(BasicAckOptions::default()).await })
            .await
    }

    async fn nack(&self, tag: DeliveryTag, requeue: Requeue) -> Result<Settled, QueueError> {
        let options = BasicNackOptions { requeue: requeue == Requeue::Yes, ..BasicNackOptions::default() };
        self.settle(tag, "basic.nack", |acker| async move { acker.nack(options).await }).await
    }

    fn holds(&self, tag: &DeliveryTag) -> bool {
        self.shared.ackers().get(&tag.number()).is_some_and(Acker::usable)
    }

    async fn stop(&self) {
        self.shared.stop.cancel();
    }
}

impl Shared {
    fn ackers(&self) -> MutexGuard<'_, HashMap<u64, Acker>> {
        // A panic while the map was locked cannot have left it half written.
        self.ackers.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Makes a delivery of ours from lapin's.
    fn receive(&self, delivery: lapin::message::Delivery) -> Delivery {
        let number = self.next_number.fetch_add(1, Ordering::Relaxed);
        self.ackers().insert(number, delivery.acker);
        let headers = delivery.properties.headers().as_ref();
        let traceparent = headers.and_then(|headers| match headers.inner().get(TRACEPARENT_HEADER)? {
            AMQPValue::LongString(text) => Some(text.to_string()),
            AMQPValue::ShortString(text) => Some(text.to_string()),
            _ => None,
        });
        let (body, redelivered) = (delivery.data, delivery.redelivered);
        Delivery { tag: DeliveryTag::new(number), body, traceparent, redelivered }
    }
}

/// Keeps a session open until no more deliveries are wanted, and that last one until nothing more will be settled.
async fn supervise(shared: Arc<Shared>, senders: Vec<mpsc::Sender<Delivery>>) {
    let mut backoff = Backoff::for_server();
    while !shared.stop.is_cancelled() {
        let opened = tokio::select! {
            opened = timeout(CONNECT_LIMIT, Session::open(&shared)) => opened,
            () = shared.stop.cancelled() => break,
        };
        match opened {
            Ok(Ok(session)) => {
                shared.metrics.broker_connections.increment();
                info!(prefetch = shared.settings.prefetch, "Consuming from the broker");
                let since = tokio::time::Instant::now();
                let end = session.pump(&shared, &senders).await;
                if shared.stop.is_cancelled() {
                    // No more deliveries: the consumers see the end of their lines. The session stays for the acks.
                    drop(senders);
                    shared.close.cancelled().await;
                    return session.close().await;
                }
                warn!("The broker connection is given up: {end}");
                if since.elapsed() > GOOD_CONNECTION {
                    backoff = Backoff::for_server();
                }
                session.close().await;
            }
            Ok(Err(error)) => warn!(error = %Chain(&error), "Cannot connect to the broker"),
            Err(_) => warn!("Cannot connect to the broker within {CONNECT_LIMIT:?}"),
        }
        tokio::select! {
            () = sleep(backoff.next_delay()) => {}
            () = shared.stop.cancelled() => {}
        }
    }
}

/// One connection with its channels and consumers.
struct Session {
    connection: Connection,
    consumers: Vec<(Channel, lapin::Consumer)>,
}

impl Session {
    async fn open(shared: &Shared) -> lapin::Result<Self> {
        let name = shared.settings.connection_name.as_str();
        let properties = ConnectionProperties::default().with_connection_name(name.into());
        let connection = Connection::connect_uri(shared.uri.clone(), properties).await?;
        declare(&connection, shared).await?;
        let mut consumers = Vec::with_capacity(shared.bands.len());
        for band in &shared.bands {
            let channel = connection.create_channel().await?;
            channel.basic_qos(shared.settings.prefetch, BasicQosOptions::default()).await?;
            let (queue, tag) = (band.queue.name.as_str().into(), format!("{name}-{}", band.band).into());
            let consumer = channel
                .basic_consume(queue, tag, BasicConsumeOptions::default(), FieldTable::default())
                .await?;
            consumers.push((channel, consumer));
        }
        Ok(Self { connection, consumers })
    }

    /// Passes deliveries on until the connection is no good any more, or, once no more are wanted, until the last one that
    /// the broker had sent. Answers why it ended.
    async fn pump(&self, shared: &Shared, senders: &[mpsc::Sender<Delivery>]) -> String {
        let lines = self.consumers.iter().zip(&shared.bands).zip(senders);
        let forwarding =
            lines.map(|(((_, consumer), band), sender)| forward(shared, band, consumer.clone(), sender));
        let mut events = std::pin::pin!(self.connection.events_listener());
        let error = async {
            loop {
                match events.next().await {
                    Some(Event::Error(error)) => return error.to_string(),
                    Some(_) => {}
                    None => return std::future::pending().await,
                }
            }
        };
        let stopping = async {
            shared.stop.cancelled().await;
            let cancels = self.consumers.iter().map(|(channel, consumer)| {
                timeout(STOP_LIMIT, channel.basic_cancel(consumer.tag(), BasicCancelOptions::default()))
            });
            for cancelled in futures::future::join_all(cancels).await {
                match cancelled {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => return format!("consuming could not be stopped: {error}"),
                    Err(_) => return format!("the broker did not stop consuming within {STOP_LIMIT:?}"),
                }
            }
            // Now the streams end, after what had arrived before.
            std::future::pending::<String>().await
        };
        let all_forwarded = async {
            // The first consumer that ends is reason enough to rebuild, unless all are meant to end.
            let mut forwarding: futures::stream::FuturesUnordered<_> = forwarding.collect();
            let mut end = forwarding.next().await.unwrap_or_default();
            while shared.stop.is_cancelled()
                && let Some(next) = forwarding.next().await
            {
                end = next;
            }
            end
        };
        tokio::select! {
            end = all_forwarded => end,
            end = error => end,
            end = stopping => end,
            end = self.watch(shared) => end,
        }
    }

    /// Asks the broker now and then whether the queues answer, and whether one has messages that it does not hand out
    /// although we hold none.
    async fn watch(&self, shared: &Shared) -> String {
        let mut ticks = interval(WATCHDOG_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks.tick().await;
        let mut suspicious = false;
        let mut arrived_before = 0;
        loop {
            ticks.tick().await;
            let ready = match timeout(ANSWER_LIMIT, self.ready_counts(shared)).await {
                Ok(Ok(ready)) => ready,
                Ok(Err(error)) => return format!("the broker refused to count its messages: {error}"),
                Err(_) => return format!("the broker did not answer within {ANSWER_LIMIT:?}"),
            };
            let arrived = shared.bands.iter().map(|band| band.arrived.load(Ordering::Relaxed)).sum();
            let starved = ready > 0 && arrived == arrived_before && shared.ackers().is_empty();
            if starved && suspicious {
                return format!("the broker has {ready} messages for us and hands none out");
            }
            (suspicious, arrived_before) = (starved, arrived);
        }
    }

    async fn ready_counts(&self, shared: &Shared) -> lapin::Result<u32> {
        let channel = self.connection.create_channel().await?;
        let mut ready = 0;
        for band in &shared.bands {
            let (name, options) = (band.queue.name.as_str().into(), QueueDeclareOptions::durable().passive());
            ready += channel.queue_declare(name, options, FieldTable::default()).await?.message_count();
        }
        channel.close(200, "OK".into()).await?;
        Ok(ready)
    }

    async fn close(self) {
        // A connection that does not close by itself is closed by dropping it.
        let _ = timeout(ANSWER_LIMIT, self.connection.close(200, "OK".into())).await;
    }
}

/// One band's deliveries, from the broker to the consumer. Answers why they ended.
async fn forward(
    shared: &Shared,
    band: &Band,
    mut consumer: lapin::Consumer,
    sender: &mpsc::Sender<Delivery>,
) -> String {
    loop {
        // A place first: a delivery in hand when this is cancelled would be lost until the connection ends.
        let Ok(place) = sender.reserve().await else { return "nobody takes deliveries".to_owned() };
        match consumer.next().await {
            Some(Ok(delivery)) => {
                band.arrived.fetch_add(1, Ordering::Relaxed);
                place.send(shared.receive(delivery));
            }
            Some(Err(error)) => return format!("consuming band {} failed: {error}", band.band),
            // Cancelled by the broker: the queue was deleted or moved, or a delivery was held too long.
            None => return format!("the broker ended the consumer of band {}", band.band),
        }
    }
}

/// Declares everything as the scheduler does, so that either may come first.
async fn declare(connection: &Connection, shared: &Shared) -> lapin::Result<()> {
    let channel = connection.create_channel().await?;
    let exchange = dead_letter_exchange();
    declare_queue(&channel, &dead_letter_queue()).await?;
    let options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    channel
        .exchange_declare(exchange.name.into(), ExchangeKind::Fanout, options, FieldTable::default())
        .await?;
    let (queue, options) = (exchange.bound_queue.into(), QueueBindOptions::default());
    channel.queue_bind(queue, exchange.name.into(), "".into(), options, FieldTable::default()).await?;
    for band in &shared.bands {
        declare_queue(&channel, &band.queue).await?;
    }
    channel.close(200, "OK".into()).await
}

async fn declare_queue(channel: &Channel, declaration: &QueueDeclaration) -> lapin::Result<()> {
    let mut arguments = FieldTable::default();
    for (name, value) in &declaration.arguments {
        let value = match value {
            QueueArgument::Text(text) => AMQPValue::LongString((*text).into()),
            QueueArgument::Integer(number) => AMQPValue::LongLongInt(*number),
        };
        arguments.insert((*name).into(), value);
    }
    let name = declaration.name.as_str().into();
    channel.queue_declare(name, QueueDeclareOptions::durable(), arguments).await.map(drop)
}
