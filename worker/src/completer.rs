//! Last stage: from pixels to an acknowledged message.
//!
//! The order is the promise. **Encode and store → complete → ack**, each only after the one before has succeeded, and
//! each repeatable; what a crash between two of them costs stands beside the arrows in [`Completer::finish`]. Microbatches
//! are finished side by side, each in that order, so that a slow bucket holds up nobody but its own pictures.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::join_all;
use schema::{
    CatalogError, CompletedJob, FailDisposition, Lease, LeaseReturn, ModelName, ObjectKey, SafetyVerdict,
    Sha256Digest, StageTimings, StoredObject, WorkerId,
};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use crate::backoff::{Chain, Patience};
use crate::catalog::Catalog;
use crate::failure::JobError;
use crate::fitness::Fitness;
use crate::lease::Leases;
use crate::metrics::{Counter, Metrics};
use crate::microbatch::{Finished, FinishedPicture, Outcome, Picture};
use crate::object_store::{ObjectStore, StoreError, Stored};
use crate::pipeline::{GeneratedImage, PipelineIdentity, StageTimes};
use crate::png::{PngError, Provenance, encode_picture};
use crate::queue::{Acknowledger, DeliveryTag, Queue, Requeue};
use crate::trace::{Span, Stage, Trace};

/// How long a picture that is drawn waits for a server that is away before its job is given back. Well below the
/// broker's consumer timeout of half an hour, which would take the delivery away anyhow.
const PATIENCE: Duration = Duration::from_secs(300);
/// How long giving back is tried. A lease that cannot be given back lapses.
const RELEASE_PATIENCE: Duration = Duration::from_secs(5);
/// Pictures of all microbatches that are encoded or on their way to the bucket at once. Object stores answer in 100 to 200 ms:
/// so many carry 80 pictures a second.
pub const CONCURRENT_PUTS: usize = 16;
/// Microbatches that are finished at once. More than one, since with small ones storing may take longer than drawing; few,
/// since their pixels are in memory.
const CONCURRENT_MICROBATCHES: usize = 4;

/// What the pictures of this worker have in common.
#[derive(Debug, Clone)]
pub struct WorkerIdentity {
    /// The worker's row.
    pub worker_id: WorkerId,
    /// The model it serves.
    pub model: ModelName,
    /// The pipeline it runs.
    pub pipeline: PipelineIdentity,
}

/// See the module.
#[derive(Debug)]
pub struct Completer<Q, S, C> {
    /// Settles deliveries.
    pub acknowledger: Acknowledger<Q>,
    /// Keeps the pixels.
    pub store: Arc<S>,
    /// Has the last word.
    pub catalog: Arc<C>,
    /// Forgets the leases of jobs that are done.
    pub leases: Leases,
    /// Goes into rows and files.
    pub identity: Arc<WorkerIdentity>,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// Hears how each picture ended.
    pub fitness: Arc<Fitness>,
    /// Ends the waiting for servers that are away.
    pub give_up: CancellationToken,
    /// Is told of each stage.
    pub trace: Trace,
    /// A permit for each picture on its way to the bucket: [`CONCURRENT_PUTS`] of them.
    pub puts: Semaphore,
}

/// A picture on its way to its row.
struct Completion {
    picture: Picture,
    completed: CompletedJob,
}

impl<Q: Queue, S: ObjectStore, C: Catalog> Completer<Q, S, C> {
    /// Works until the engine is gone and all its pictures are settled.
    pub async fn run(self, mut finished: mpsc::Receiver<Finished>) {
        let completer = Arc::new(self);
        let mut finishing = JoinSet::new();
        loop {
            tokio::select! {
                Some(ended) = finishing.join_next() => passed_on(ended),
                // While there is no room, the engine's thread holds at most the next and then waits.
                next = finished.recv(), if finishing.len() < CONCURRENT_MICROBATCHES => {
                    let Some(next) = next else { break };
                    let completer = completer.clone();
                    finishing.spawn(async move { completer.finish_timed(next).await });
                }
            }
        }
        while let Some(ended) = finishing.join_next().await {
            passed_on(ended);
        }
    }

    async fn finish_timed(&self, finished: Finished) {
        let started = Instant::now();
        let after_last_step = |picture: &FinishedPicture| {
            let StageTimes { wait, vae, safety, .. } = picture.times;
            wait + vae + safety
        };
        let shared = finished.pictures.iter().map(after_last_step).max();
        self.finish(finished).await;
        self.metrics.finishing_took(shared.unwrap_or_default() + started.elapsed());
        self.metrics.touch();
    }

    /// Brings every picture of a microbatch to its end, in the order that the promises rest on.
    pub async fn finish(&self, finished: Finished) {
        let Finished { microbatch_id, pictures } = finished;
        let job_ids = pictures.iter().map(|picture| picture.lease().job_id).collect();
        let (mut drawn, mut failed, mut stopped) = (Vec::new(), Vec::new(), Vec::new());
        let (mut lost, mut suspected) = (Vec::new(), Vec::new());
        for FinishedPicture { picture, outcome, times } in pictures {
            match outcome {
                Outcome::Image(image) => drawn.push((picture, image, times)),
                Outcome::Failed(error) => failed.push((picture, JobError::from(error))),
                Outcome::Stopped => stopped.push(picture),
                Outcome::LeaseLost => lost.push(picture),
                Outcome::Suspected => suspected.push(picture),
            }
        }

        schema::failpoint::reached("completer::before_store");
        // 1. Store. A crash before: the leases lapse, the jobs run again, nothing was visible.
        let mut completions = Vec::new();
        let span = |stage, picture, pictures, from| {
            self.trace.span(Span { stage, microbatch_id, picture, pictures, from, to: Instant::now() });
        };
        let stored = drawn.into_iter().enumerate().map(|(index, (picture, image, times))| {
            let span = move |stage, from| span(stage, Some(index), 1, from);
            self.store(picture, image, times, span)
        });
        for answer in join_all(stored).await {
            match answer {
                Ok(completion) => completions.push(completion),
                Err(failure) => failed.push(failure),
            }
        }

        schema::failpoint::reached("completer::after_store");
        // 2. Complete. A crash between 1 and 2: objects without rows; the jobs run again, and the same bytes find their
        //    objects there already. Never a row without its object.
        let (completing, pictures) = (Instant::now(), completions.len());
        let (completed, mut gone) = self.complete(completions, &mut failed).await;
        lost.append(&mut gone);
        span(Stage::Complete, None, pictures, completing);

        schema::failpoint::reached("completer::after_complete");
        // 3. Ack. A crash between 2 and 3: the broker hands the messages out again, and claiming finds the jobs completed.
        if !completed.is_empty() {
            info!(microbatch.id = %microbatch_id, batch.size = completed.len(), "Completed {} pictures", completed.len());
        }
        self.metrics.completed.add(completed.len());
        if !completed.is_empty() {
            self.fitness.succeeded();
        }
        let acking = Instant::now();
        for picture in &lost {
            // Cancelled, or rescued and published again: the catalog has the truth, so the message is spent.
            debug!(job.id = %picture.job.lease.job_id, "The lease of a job was lost; nothing of it is kept");
            self.metrics.leases_lost.increment();
        }
        let spent: Vec<DeliveryTag> = completed.into_iter().chain(lost).map(|picture| picture.tag).collect();
        let pictures = spent.len();
        join_all(spent.into_iter().map(|tag| self.acknowledger.ack(tag))).await;
        span(Stage::Ack, None, pictures, acking);
        for (picture, error) in failed {
            if let Some(released) = self.fail(picture, error).await {
                stopped.push(released);
            }
        }
        schema::failpoint::reached("completer::after_ack");
        self.release(stopped).await;
        self.suspect(suspected).await;
        self.leases.forget(job_ids).await;
    }

    /// Encodes and stores one picture. A flagged one is not published: its row gets the scores and no object.
    async fn store(
        &self,
        picture: Picture,
        image: GeneratedImage,
        times: StageTimes,
        span: impl Fn(Stage, Instant),
    ) -> Result<Completion, (Picture, JobError)> {
        // Closed never.
        let _permit = self.puts.acquire().await;
        let mut completed = self.completed_job(&picture, &image, times);
        if image.has_nsfw_concept == Some(true) {
            self.metrics.flagged.increment();
            return Ok(Completion { picture, completed });
        }
        let encoding = Instant::now();
        let bytes = match self.encode(&picture, image).await {
            Ok(bytes) => bytes,
            Err(error) => return Err((picture, error.into())),
        };
        completed.timings.encode_ms = milliseconds(encoding.elapsed());
        span(Stage::Encode, encoding);
        let uploading = Instant::now();
        let sha256 = Sha256Digest::of(&bytes);
        let key = ObjectKey::new(picture.job.batch_id, picture.job.ordinal, &sha256);
        let can_waiting_help = |error: &StoreError| !matches!(error, StoreError::Mismatch { .. });
        let stored = self
            .patience()
            .insist("store a picture", can_waiting_help, || self.store.put_if_absent(&key, &bytes, &sha256))
            .await;
        match stored {
            Ok(Stored::Written) => {}
            Ok(Stored::AlreadyThere) => self.metrics.already_there.increment(),
            Err(error) => return Err((picture, error.into())),
        }
        completed.timings.upload_ms = milliseconds(uploading.elapsed());
        span(Stage::Put, uploading);
        let (bucket, size_bytes) = (self.store.bucket().to_owned(), bytes.len() as u64);
        completed.object = Some(StoredObject { bucket, object_key: key, sha256, size_bytes });
        Ok(Completion { picture, completed })
    }

    /// PNG encoding is arithmetic on megabytes, so it leaves the async threads.
    async fn encode(&self, picture: &Picture, image: GeneratedImage) -> Result<Vec<u8>, PngError> {
        let (job, identity) = (picture.job.clone(), self.identity.clone());
        let encoding = tokio::task::spawn_blocking(move || {
            let provenance = Provenance {
                job_id: job.lease.job_id,
                batch_id: job.batch_id,
                ordinal: job.ordinal,
                acceptance_id: job.acceptance_id,
                model: &identity.model,
                weights_sha256: &job.weights_sha256,
                noise_dtype: &identity.pipeline.noise_dtype,
            };
            encode_picture(&job.spec, &image, &provenance)
        });
        encoding.await.unwrap_or_else(|panic| Err(PngError::Panicked { source: panic.into() }))
    }

    fn completed_job(&self, picture: &Picture, image: &GeneratedImage, times: StageTimes) -> CompletedJob {
        let pipeline = &self.identity.pipeline;
        CompletedJob {
            lease: picture.job.lease,
            worker_id: self.identity.worker_id,
            object: None,
            safety: image.has_nsfw_concept.map(|has_nsfw_concept| SafetyVerdict {
                has_nsfw_concept,
                concept_scores: image.concept_scores.clone(),
                special_care_scores: image.special_care_scores.clone(),
            }),
            prompt_truncated: image.prompt_truncated,
            weights_sha256: picture.job.weights_sha256,
            device: pipeline.device.clone(),
            dtype: image.dtype.clone(),
            noise_dtype: pipeline.noise_dtype.clone(),
            recipe: image.recipe,
            engine: image.engine.as_deref().cloned(),
            timings: StageTimings {
                text_encoder_ms: milliseconds(times.text_encoder),
                denoise_ms: milliseconds(times.denoise),
                vae_ms: milliseconds(times.vae),
                safety_ms: milliseconds(times.safety),
                ..StageTimings::default()
            },
        }
    }

    /// Writes the rows in one transaction; answers whose are written and whose lease was gone. If the catalog refuses the
    /// whole, each is tried alone, so that one bad row does not take its neighbors down.
    async fn complete(
        &self,
        completions: Vec<Completion>,
        failed: &mut Vec<(Picture, JobError)>,
    ) -> (Vec<Picture>, Vec<Picture>) {
        let (mut completed, mut lost) = (Vec::new(), Vec::new());
        let mut groups = vec![completions];
        while let Some(mut group) = groups.pop() {
            if group.is_empty() {
                continue;
            }
            let jobs: Vec<CompletedJob> =
                group.iter().map(|completion| completion.completed.clone()).collect();
            let answer = self
                .patience()
                .insist("record pictures", CatalogError::is_transient, || {
                    self.catalog.complete_if_leased(&jobs)
                })
                .await;
            match answer {
                Ok(answers) => {
                    for (Completion { picture, .. }, answer) in group.into_iter().zip(answers) {
                        if answer.is_ok() { completed.push(picture) } else { lost.push(picture) }
                    }
                }
                Err(error) if group.len() > 1 && !error.is_transient() => {
                    warn!(error = %Chain(&error), "The catalog refused {} pictures; each is tried alone", group.len());
                    groups.extend(group.drain(..).map(|completion| vec![completion]));
                }
                Err(error) => {
                    let error = Arc::new(error);
                    let shared = |Completion { picture, .. }| (picture, JobError::Catalog(error.clone()));
                    failed.extend(group.into_iter().map(shared));
                }
            }
        }
        (completed, lost)
    }

    /// Ends a failed attempt. Gives the picture back if it is to be released instead.
    async fn fail(&self, picture: Picture, error: JobError) -> Option<Picture> {
        let Lease { job_id, .. } = picture.job.lease;
        let attempt = picture.job.attempt;
        let Some(failure) = error.failure() else {
            warn!(job.id = %job_id, job.attempt = attempt, error = %Chain(&error), "Job `{job_id}` is given back");
            return Some(picture);
        };
        if self.fitness.failed(job_id, &failure) {
            warn!(job.id = %job_id, error = %Chain(&error), "Job `{job_id}` is given back: this worker is unfit");
            return Some(picture);
        }
        let recorded = self
            .patience()
            .insist("record a failure", CatalogError::is_transient, || {
                self.catalog.fail_if_leased(picture.job.lease, &failure)
            })
            .await;
        match recorded {
            Ok(Ok(FailDisposition::Retryable { scheduled_at })) => {
                self.metrics.failed.increment();
                warn!(
                    job.id = %job_id, job.attempt = attempt, error = %Chain(&error),
                    "Attempt {attempt} of job `{job_id}` failed, retrying after {scheduled_at}"
                );
            }
            Ok(Ok(FailDisposition::Discarded)) => {
                self.metrics.failed.increment();
                error!(
                    job.id = %job_id, job.attempt = attempt, error = %Chain(&error),
                    "Attempt {attempt} of job `{job_id}` failed, and the job is given up"
                );
            }
            Ok(Err(_)) => self.metrics.leases_lost.increment(),
            Err(catalog_error) => {
                warn!(job.id = %job_id, error = %Chain(&catalog_error), "A failure could not be recorded");
                return Some(picture);
            }
        }
        // The catalog has the truth; a retry is published when it is due.
        self.acknowledger.ack(picture.tag).await;
        None
    }

    /// Gives jobs back unharmed: first the leases, then the messages. The other way around the message could be taken by
    /// a worker that finds the job still running, and be spent.
    async fn release(&self, pictures: Vec<Picture>) {
        let (requeued, settled): (Vec<_>, Vec<_>) =
            pictures.into_iter().partition(|picture| self.acknowledger.holds(&picture.tag));
        let released = &self.metrics.released;
        tokio::join!(
            self.give_back(&requeued, LeaseReturn::MessageRequeued, released),
            self.give_back(&settled, LeaseReturn::MessageSettled, released),
        );
        for picture in requeued.into_iter().chain(settled) {
            self.acknowledger.nack(picture.tag, Requeue::Yes).await;
        }
    }

    /// Gives jobs back that were in the call that broke the engine. Their messages are spent: the relay sends others, which
    /// say in how small a company they may run.
    async fn suspect(&self, pictures: Vec<Picture>) {
        self.give_back(&pictures, LeaseReturn::Suspected, &self.metrics.suspected).await;
        for picture in pictures {
            self.acknowledger.ack(picture.tag).await;
        }
    }

    /// Returns the leases of these jobs and counts how many were still held.
    async fn give_back(&self, pictures: &[Picture], messages: LeaseReturn, returned: &Counter) {
        if pictures.is_empty() {
            return;
        }
        let leases: Vec<Lease> = pictures.iter().map(|picture| picture.job.lease).collect();
        let patience = Patience { limit: RELEASE_PATIENCE, give_up: CancellationToken::new() };
        let released = patience
            .insist("give jobs back", CatalogError::is_transient, || {
                self.catalog.release_if_leased(&leases, messages)
            })
            .await;
        match released {
            Ok(released) => returned.add(released.len()),
            // Lapsing has the same end, later.
            Err(error) => {
                warn!(error = %Chain(&error), "{} jobs could not be given back; their leases will lapse", leases.len())
            }
        }
    }

    fn patience(&self) -> Patience {
        Patience { limit: PATIENCE, give_up: self.give_up.clone() }
    }
}

/// A microbatch whose finishing panicked ends the stage as if it had panicked itself.
fn passed_on(ended: Result<(), JoinError>) {
    if let Err(error) = ended
        && let Ok(panic) = error.try_into_panic()
    {
        std::panic::resume_unwind(panic);
    }
}

fn milliseconds(duration: Duration) -> f32 {
    duration.as_secs_f32() * 1000.0
}
