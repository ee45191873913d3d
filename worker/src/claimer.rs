//! Second stage: turns entries into claimed microbatches, as late as the engine allows.
//!
//! A microbatch is formed and claimed only when the engine's one waiting place is free, so that a worker holds leases on
//! what runs and what comes next, and on nothing else; what waits longer stays a mere message that cancelling, priorities
//! and other workers can still overtake. While the catalog is away the stage waits in place, and consuming stops with it.
//!
//! A job that was lost with its workers until it has to run alone is claimed only when this worker holds nothing else, and
//! nothing is claimed beside it: if the worker dies, it is known which job it was.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant as StdInstant};

use schema::{CatalogError, ClaimedJob, JobId, Lease, LeaseReturn, MicrobatchId, WorkerId};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::backoff::{Chain, Patience};
use crate::batcher::{Batcher, Company};
use crate::catalog::Catalog;
use crate::control::control;
use crate::lease::Leases;
use crate::metrics::Metrics;
use crate::microbatch::{Entry, Microbatch, Picture};
use crate::queue::{Acknowledger, DeliveryTag, Queue, Requeue};
use crate::trace::{Span, Stage, Trace};

/// Longer than any worker waits: claiming is tried for as long as there is something to claim.
const PATIENCE: Duration = Duration::from_secs(365 * 24 * 3600);

/// See the module.
#[derive(Debug)]
pub struct Claimer<Q, C> {
    /// Settles what is not claimed.
    pub acknowledger: Acknowledger<Q>,
    /// Where claims are made.
    pub catalog: Arc<C>,
    /// Keeps what is claimed.
    pub leases: Leases,
    /// Who claims.
    pub worker_id: WorkerId,
    /// For how long.
    pub lease: Duration,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// Is told of each claim.
    pub trace: Trace,
}

impl<Q: Queue, C: Catalog> Claimer<Q, C> {
    /// Works until `drain` is cancelled, the consumers are gone, or the engine is; then requeues all that is unclaimed.
    pub async fn run(
        self,
        mut entries: mpsc::Receiver<Entry>,
        microbatches: mpsc::Sender<Microbatch>,
        mut batcher: Batcher<Entry>,
        drain: CancellationToken,
    ) {
        loop {
            let due_at = batcher.due_at();
            let is_due = due_at.is_some_and(|due| due <= Instant::now());
            tokio::select! {
                // In this order: stopping first, and a microbatch that is due before new entries.
                biased;
                () = drain.cancelled() => break,
                place = microbatches.reserve(), if is_due => {
                    let Ok(place) = place else { break };
                    let Some((company, entries)) = batcher.next_microbatch(Instant::now()) else { continue };
                    if company.is_alone() && !self.all_settled(&drain).await {
                        self.requeue(entries).await;
                        break;
                    }
                    if let Some(microbatch) = self.claim(company, entries, &drain).await {
                        place.send(microbatch);
                    }
                    if company.is_alone() && !self.all_settled(&drain).await {
                        break;
                    }
                }
                entry = entries.recv() => {
                    let Some(entry) = entry else { break };
                    let (key, limit) = (entry.message.microbatch_key, entry.message.microbatch_limit);
                    batcher.push(Company { key, limit }, entry.band, entry, Instant::now());
                }
                () = sleep_until(due_at.unwrap_or_else(Instant::now)), if due_at.is_some() && !is_due => {}
            }
        }
        // Whoever still sends gets the entry back and requeues it.
        entries.close();
        while let Some(entry) = entries.recv().await {
            self.acknowledger.nack(entry.tag, Requeue::Yes).await;
        }
        self.requeue(batcher.drain()).await;
    }

    async fn requeue(&self, entries: Vec<Entry>) {
        for entry in entries {
            self.acknowledger.nack(entry.tag, Requeue::Yes).await;
        }
    }

    /// Waits until this worker holds no lease; false if it is to stop instead.
    async fn all_settled(&self, drain: &CancellationToken) -> bool {
        tokio::select! {
            biased;
            () = drain.cancelled() => false,
            () = self.leases.settled() => true,
        }
    }

    /// Claims what it can get of a microbatch and settles the rest.
    async fn claim(
        &self,
        company: Company,
        entries: Vec<Entry>,
        drain: &CancellationToken,
    ) -> Option<Microbatch> {
        schema::failpoint::reached("claimer::before_claim");
        let microbatch_id = MicrobatchId::generate();
        let formed = StdInstant::now();
        let oldest = entries.iter().map(|entry| entry.arrived).min().unwrap_or(formed);
        let job_ids: Vec<JobId> = entries.iter().map(|entry| entry.message.job_id).collect();
        let patience = Patience { limit: PATIENCE, give_up: drain.clone() };
        let claimed = patience
            .insist(
                "claim jobs",
                |_: &CatalogError| true,
                || self.catalog.claim_if_available(&job_ids, self.worker_id, microbatch_id, self.lease),
            )
            .await;
        let Ok(claimed) = claimed else {
            // Draining. If the claim went through unseen, its lease lapses and the job is rescued.
            self.requeue(entries).await;
            return None;
        };
        schema::failpoint::reached("claimer::after_claim");
        let (pictures, rest) = pair(claimed, entries);
        let pictures = self.part_from_suspects(company, pictures).await;
        for tag in rest {
            // Finished, cancelled, running elsewhere or twice in here: the catalog knows, the message is spent. If it runs
            // elsewhere and is lost there, the rescuer has it published again.
            self.metrics.not_claimed.increment();
            self.acknowledger.ack(tag).await;
        }
        if pictures.is_empty() {
            return None;
        }
        debug!(microbatch.id = %microbatch_id, batch.size = pictures.len(), "Claimed {} jobs", pictures.len());
        let leases: Vec<_> = pictures.iter().map(|picture| picture.job.lease).collect();
        let (handle, control) = control(leases.iter().map(|lease| lease.job_id).collect(), drain.clone());
        self.leases.hold(leases, handle).await;
        let claimed = StdInstant::now();
        for (stage, from, to) in [(Stage::Consume, oldest, formed), (Stage::Claim, formed, claimed)] {
            self.trace.span(Span { stage, microbatch_id, picture: None, pictures: pictures.len(), from, to });
        }
        self.metrics.microbatches.increment();
        self.metrics.claimed.add(pictures.len());
        Some(Microbatch { microbatch_id, pictures, claimed, control })
    }

    /// Gives back the jobs whose row asks for less company than their message did: it was sent before they were lost. The
    /// relay publishes them again, with the limit.
    async fn part_from_suspects(&self, company: Company, pictures: Vec<Picture>) -> Vec<Picture> {
        let fits = |picture: &Picture| {
            picture.job.microbatch_limit.is_none() || picture.job.microbatch_limit == company.limit
        };
        let (pictures, suspects): (Vec<_>, Vec<_>) = pictures.into_iter().partition(fits);
        if suspects.is_empty() {
            return pictures;
        }
        let leases: Vec<Lease> = suspects.iter().map(|picture| picture.job.lease).collect();
        if let Err(error) = self.catalog.release_if_leased(&leases, LeaseReturn::MessageSettled).await {
            warn!(error = %Chain(&error), "{} jobs could not be given back; their leases will lapse", leases.len());
        }
        for picture in suspects {
            self.acknowledger.ack(picture.tag).await;
        }
        pictures
    }
}

/// Pairs each claimed job with one delivery that told of it. Jobs that share a key stand together, fresh ones before those
/// that failed before; the tags left over come second.
fn pair(claimed: Vec<ClaimedJob>, entries: Vec<Entry>) -> (Vec<Picture>, Vec<DeliveryTag>) {
    let mut claimed: HashMap<JobId, ClaimedJob> =
        claimed.into_iter().map(|job| (job.lease.job_id, job)).collect();
    let (mut pictures, mut rest) = (Vec::new(), Vec::new());
    for Entry { message, tag, .. } in entries {
        match claimed.remove(&message.job_id) {
            Some(job) => pictures.push(Picture { job, tag }),
            None => rest.push(tag),
        }
    }
    pictures.sort_by_key(|picture| (picture.job.attempt > 1, picture.job.spec.microbatch_key()));
    (pictures, rest)
}
