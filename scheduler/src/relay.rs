//! The relay: keeps each queue filled up to the watermark from the backlog in Postgres.
//!
//! It publishes first and marks after. A crash in between leaves published jobs unmarked, so they are published a
//! second time, and the worker that finds a job claimed or final drops the message. Two relays take turns
//! (`PgCatalog::try_relay_turn`), and where that fails they do the same to each other. Fairness among batches is in the
//! query; the watermark is what makes cancelling, priorities and fairness quick to take effect, because what the broker
//! holds is out of our hands.
//!
//! A question to the catalog costs it as much as there is on the way, so the relay asks for many jobs at once and publishes them
//! in chunks. While one chunk is marked the next is published, so catalog and broker work at the same time. All are marked
//! before it asks again, so no answer holds a job that the broker has already; and whatever fails, it tries to mark what the
//! broker has confirmed.
//!
//! A queue can break alone, and for good: its process is gone or finds no leader, while the broker around it answers
//! (RabbitMQ 3.10 does this when queues are deleted and declared in a hurry, and its node is then killed). Nobody can
//! publish to such a queue or consume from it. Since messages are only hints, the relay makes it anew.
mod backlog;

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use anyhow::Result;
pub use backlog::Backlog;
use schema::failpoint;
use schema::{JobId, Model, ModelId, PriorityBand, PublishableJob, QueueDeclaration, job_queue};
use serde::Serialize;
use tracing::{debug, info, warn};

use crate::queue::{OutgoingMessage, PublishOutcome, Queue, QueueError};

/// Messages in one `publish` call: enough to keep the broker busy while confirms travel, and few enough that all
/// confirms arrive long before their time limit.
const CHUNK: u32 = 1_000;
/// Jobs that are asked for at once, and that a queue may take before the others have their turn. Beyond the first chunk they are not
/// looked at again before they are published, about a second later; fewer would let the relay wait for the catalog more often.
const WINDOW: u32 = 5 * CHUNK;
/// A run begins no further round after this long. Longer than the serve loop's interval, so that the next run follows at
/// once, and far shorter than the minute for which a turn to publish is kept.
const RUN_LIMIT: Duration = Duration::from_secs(15);

/// So often in a row, each time on a fresh connection, may a queue be silent or refuse everything while it is empty...
const SILENCES: u32 = 2;
/// ...and for so long, before it counts as broken. A quorum that elects a leader takes seconds.
const SILENCE_LIMIT: Duration = Duration::from_secs(30);

/// What one run did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RelayReport {
    /// Messages that the broker holds now.
    pub published: u64,
    /// Messages that the broker did not take, or did not say so. Their jobs wait for the next run.
    pub not_published: u64,
}

/// How many unclaimed messages a queue is to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watermark {
    /// So many, whatever the fleet.
    Fixed(u32),
    /// Enough for the workers that are there: ten microbatches for each, and not fewer than 1,000. With fewer than they fetch, a
    /// large fleet's workers would start with microbatches that are not full.
    ForWorkers,
}

/// Microbatches that wait for each worker: the two that it fetches, and what it draws until the relay looks again.
const WAITING_MICROBATCHES: u64 = 10;
/// Also for a small fleet, and while none is there.
const LEAST_WATERMARK: u64 = 1_000;
/// Well below where job queues refuse more.
pub const MOST_WATERMARK: u32 = 900_000;

impl Watermark {
    async fn of(self, backlog: &impl Backlog, model_id: ModelId) -> Result<u64> {
        match self {
            Self::Fixed(watermark) => Ok(watermark.into()),
            Self::ForWorkers => {
                let capacity = backlog.microbatch_capacity(model_id).await?;
                Ok((WAITING_MICROBATCHES * capacity).clamp(LEAST_WATERMARK, MOST_WATERMARK.into()))
            }
        }
    }
}

/// The relay with what it remembers between runs.
#[derive(Debug)]
pub struct Relay {
    watermark: Watermark,
    /// Queues that are known to exist. Forgotten when a message comes back.
    declared: HashSet<String>,
    /// The queues that do not take messages although the broker answers.
    silences: HashMap<String, Silence>,
    silence_limit: Duration,
    run_limit: Duration,
}

/// Since when a queue takes nothing, and how often it was tried.
#[derive(Clone, Copy, Debug)]
struct Silence {
    since: Instant,
    count: u32,
}

impl Silence {
    fn is_longer_than(&self, limit: Duration) -> bool {
        self.count >= SILENCES && self.since.elapsed() >= limit
    }
}

/// A queue to fill.
#[derive(Debug)]
struct Lane<'a> {
    model: &'a Model,
    band: PriorityBand,
    declaration: QueueDeclaration,
    /// Unclaimed messages that it is to hold.
    watermark: u64,
    /// Half of the watermark was claimed since the last run or within this one. What the queue holds may not last until the next
    /// run, so this one looks again, however little there is room for; otherwise that is not worth the question.
    empties_fast: bool,
}

impl<'a> Lane<'a> {
    /// All of a model's.
    fn of(model: &'a Model, watermark: u64) -> impl Iterator<Item = Self> {
        let lane = move |&band| {
            let declaration = job_queue(&model.name, band);
            Self { model, band, declaration, watermark, empties_fast: false }
        };
        PriorityBand::ALL.iter().map(lane)
    }
}

/// Marks jobs that the broker holds in the queue `name`.
async fn mark(backlog: &impl Backlog, name: &str, confirmed: &[JobId]) -> Result<()> {
    if confirmed.is_empty() {
        return Ok(());
    }
    let marked = backlog.mark_published_if_available(confirmed).await?;
    failpoint::reached("relay::after_mark");
    let confirmed = confirmed.len();
    debug!(queue.name = name, confirmed, marked, "Published {confirmed} jobs to {name}");
    Ok(())
}

impl Relay {
    /// A relay that keeps at most `watermark` unclaimed messages per model and band.
    pub fn new(watermark: Watermark) -> Self {
        let (declared, silences) = Default::default();
        Self { watermark, declared, silences, silence_limit: SILENCE_LIMIT, run_limit: RUN_LIMIT }
    }

    /// Fills every queue up to the watermark: a window for each, then again for those that take more. One that fails
    /// does not keep the others waiting.
    ///
    /// # Errors
    /// If the catalog or the broker cannot be asked: the first reason. What was published stays published.
    pub async fn run_once(&mut self, backlog: &impl Backlog, queue: &impl Queue) -> Result<RelayReport> {
        let mut report = RelayReport::default();
        let mut failed = None;
        let started = Instant::now();
        let models = backlog.models().await?;
        let mut hungry: Vec<Lane<'_>> = Vec::new();
        for model in &models {
            hungry.extend(Lane::of(model, self.watermark.of(backlog, model.model_id).await?));
        }
        while !hungry.is_empty() {
            let mut hungry_still = Vec::new();
            for mut lane in hungry {
                match self.fill(backlog, queue, &mut lane, &mut report).await {
                    Ok(true) => hungry_still.push(lane),
                    Ok(false) => {}
                    Err(error) => {
                        let Lane { model, band, .. } = lane;
                        let what = format!("cannot fill the queue of model `{}`, band {band}", model.name);
                        failed.get_or_insert(error.context(what));
                    }
                }
            }
            hungry = hungry_still;
            if started.elapsed() >= self.run_limit {
                break;
            }
        }
        if report.published > 0 {
            info!(published = report.published, "Published {} jobs", report.published);
        }
        failed.map_or(Ok(report), Err)
    }

    /// Brings up to [`WINDOW`] jobs into one queue. Returns whether it should get more in this run.
    async fn fill(
        &mut self,
        backlog: &impl Backlog,
        queue: &impl Queue,
        lane: &mut Lane<'_>,
        report: &mut RelayReport,
    ) -> Result<bool> {
        let name = lane.declaration.name.as_str();
        let silence = self.silences.get(name);
        if silence.is_some_and(|silence| silence.is_longer_than(self.silence_limit)) {
            self.make_anew(backlog, queue, lane).await?;
        }
        // Declared also while it is empty, so that workers and autoscalers find it.
        self.declare(queue, &lane.declaration).await?;
        let unclaimed = backlog.published_unclaimed_count(lane.model.model_id, lane.band).await?;
        let room = lane.watermark.saturating_sub(unclaimed);
        lane.empties_fast |= 2 * room >= lane.watermark;
        let limit = u32::try_from(room).unwrap_or(u32::MAX).min(WINDOW);
        if limit == 0 {
            return Ok(false);
        }
        let jobs = backlog.jobs_to_publish(lane.model.model_id, lane.band, limit).await?;

        // What the broker holds and the catalog has yet to mark.
        let mut unmarked = Vec::new();
        // Whether the broker takes all that it is offered. If not, the queue gets a pause until the next run.
        let mut published = Ok(true);
        for chunk in jobs.chunks(CHUNK as usize) {
            let (marked, confirmed) =
                tokio::join!(mark(backlog, name, &unmarked), self.publish(queue, &lane.declaration, chunk));
            if marked.is_ok() {
                unmarked.clear();
            }
            let takes_all = confirmed.map(|confirmed| {
                report.published += confirmed.len() as u64;
                report.not_published += (chunk.len() - confirmed.len()) as u64;
                unmarked.extend(&confirmed);
                confirmed.len() == chunk.len()
            });
            published = marked.and(takes_all);
            if !matches!(published, Ok(true)) {
                break;
            }
        }
        // After a failure too, and once more what could not be marked before: what stays unmarked is published again.
        let marked = mark(backlog, name, &unmarked).await;
        let takes_all = published.and_then(|takes_all| marked.map(|()| takes_all))?;
        let may_be_more = jobs.len() == limit as usize && (room > limit.into() || lane.empties_fast);
        Ok(takes_all && may_be_more)
    }

    /// Publishes `jobs` and returns those that the broker holds.
    async fn publish(
        &mut self,
        queue: &impl Queue,
        declaration: &QueueDeclaration,
        jobs: &[PublishableJob],
    ) -> Result<Vec<JobId>> {
        let messages: Vec<OutgoingMessage> = jobs
            .iter()
            .map(|job| OutgoingMessage { body: job.message().encode(), traceparent: job.traceparent.clone() })
            .collect();
        let asked = Instant::now();
        let outcomes = queue.publish(&declaration.name, &messages).await?;
        let count = |wanted| outcomes.iter().filter(|&&outcome| outcome == wanted).count();
        let (returned, refused) = (count(PublishOutcome::Returned), count(PublishOutcome::Refused));
        if returned > 0 {
            // Somebody deleted the queue, or the broker lost everything. The next run makes it again.
            self.declared.remove(&declaration.name);
            warn!(
                queue.name = declaration.name,
                returned, "The queue {} is gone; making it again", declaration.name
            );
        }
        // Once a queue, not once a second.
        if refused > 0 && !self.silences.contains_key(&declaration.name) {
            warn!(
                queue.name = declaration.name,
                refused, "The queue {} refused {refused} messages", declaration.name
            );
        }
        if count(PublishOutcome::Silent) == jobs.len() {
            self.note_silence(&declaration.name, asked);
        } else if refused == jobs.len() && queue.ready_count(&declaration.name).await? == Some(0) {
            // It is not full: nothing of it is left that could store a message.
            self.note_silence(&declaration.name, asked);
        } else if count(PublishOutcome::Confirmed) > 0 {
            self.silences.remove(&declaration.name);
        }
        let confirmed =
            jobs.iter().zip(&outcomes).filter(|&(_, &outcome)| outcome == PublishOutcome::Confirmed);
        let confirmed = confirmed.map(|(job, _)| job.job_id).collect();
        failpoint::reached("relay::after_publish");
        Ok(confirmed)
    }

    async fn declare(&mut self, queue: &impl Queue, declaration: &QueueDeclaration) -> Result<()> {
        if !self.declared.contains(&declaration.name) {
            let asked = Instant::now();
            let declared = queue.declare(declaration).await;
            if declared.as_ref().is_err_and(QueueError::may_be_the_queue) {
                self.note_silence(&declaration.name, asked);
            }
            declared?;
            self.declared.insert(declaration.name.clone());
        }
        Ok(())
    }

    fn note_silence(&mut self, name: &str, asked: Instant) {
        self.silences.entry(name.to_owned()).or_insert(Silence { since: asked, count: 0 }).count += 1;
    }

    /// Removes a broken queue. What it held is published again, to the queue that the next declaration makes.
    async fn make_anew(&mut self, backlog: &impl Backlog, queue: &impl Queue, lane: &Lane<'_>) -> Result<()> {
        let name = &lane.declaration.name;
        // Each silence has replaced the connection, and this one was built since: the broker itself answers.
        queue.delete(name).await?;
        let lost = backlog.republish_if_unclaimed_for(lane.model.model_id, lane.band, Duration::ZERO).await?;
        warn!(
            queue.name = name.as_str(),
            lost, "The queue {name} did not answer {SILENCES} times in a row; it is made anew"
        );
        self.silences.remove(name);
        self.declared.remove(name);
        Ok(())
    }
}

#[cfg(test)]
#[expect(missing_docs, reason = "the names of a test's stand-ins say what they do")]
pub mod fakes;
#[cfg(test)]
mod tests;
