//! A broker in memory. Every settlement goes to the shared event log.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use schema::PriorityBand;
use tokio::sync::mpsc;
use worker::queue::{Delivery, DeliveryTag, Queue, QueueError, Requeue, Settled};

use crate::worker_under_test::{Event, EventLog};

type Line = (mpsc::UnboundedSender<Vec<u8>>, tokio::sync::Mutex<mpsc::UnboundedReceiver<Vec<u8>>>);

#[derive(Debug)]
pub struct MemoryQueue {
    lines: BTreeMap<PriorityBand, Line>,
    next_number: AtomicU64,
    /// The body of every delivery, so that events can name the job.
    bodies: Mutex<BTreeMap<u64, Vec<u8>>>,
    /// As after a lost connection: nothing that is settled reaches the broker.
    pub disconnected: AtomicBool,
    stop: tokio_util::sync::CancellationToken,
    log: EventLog,
}

impl MemoryQueue {
    pub fn new(log: EventLog) -> Self {
        let line = |band: &PriorityBand| {
            let (sender, receiver) = mpsc::unbounded_channel();
            (*band, (sender, tokio::sync::Mutex::new(receiver)))
        };
        Self {
            lines: PriorityBand::ALL.iter().map(line).collect(),
            next_number: AtomicU64::new(1),
            bodies: Mutex::default(),
            disconnected: AtomicBool::new(false),
            stop: tokio_util::sync::CancellationToken::new(),
            log,
        }
    }

    pub fn publish(&self, band: PriorityBand, body: Vec<u8>) {
        self.lines[&band].0.send(body).expect("the queue is there");
    }

    fn settle(&self, tag: DeliveryTag, event: impl FnOnce(Vec<u8>) -> Event) -> Settled {
        let body = self.bodies.lock().unwrap().remove(&tag.spend()).expect("a delivery of this queue");
        self.log.push(event(body));
        if self.disconnected.load(Ordering::SeqCst) { Settled::Ineffective } else { Settled::Sent }
    }
}

impl Queue for MemoryQueue {
    async fn next(&self, band: PriorityBand) -> Option<Delivery> {
        let mut line = self.lines[&band].1.lock().await;
        let body = tokio::select! {
            biased;
            () = self.stop.cancelled() => return None,
            body = line.recv() => body?,
        };
        let number = self.next_number.fetch_add(1, Ordering::SeqCst);
        self.bodies.lock().unwrap().insert(number, body.clone());
        Some(Delivery { tag: DeliveryTag::new(number), body, traceparent: None, redelivered: false })
    }

    async fn ack(&self, tag: DeliveryTag) -> Result<Settled, QueueError> {
        Ok(self.settle(tag, Event::acked))
    }

    async fn nack(&self, tag: DeliveryTag, requeue: Requeue) -> Result<Settled, QueueError> {
        Ok(self.settle(tag, |body| Event::nacked(body, requeue)))
    }

    fn holds(&self, _tag: &DeliveryTag) -> bool {
        !self.disconnected.load(Ordering::SeqCst)
    }

    async fn stop(&self) {
        self.log.push(Event::ConsumingStopped);
        self.stop.cancel();
    }
}
