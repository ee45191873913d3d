//! A catalog in memory with the guards of the real one: states, generations, attempts.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use schema::{
    AcceptanceId, BatchId, CatalogError, ClaimedJob, CompletedJob, FailDisposition, Failure, ImageId, JobId,
    JobState, Lease, LeaseLost, LeaseReturn, MicrobatchId, Sha256Digest, ValidJobSpec, WorkerId,
};
use worker::catalog::Catalog;

use crate::worker_under_test::{Event, EventLog};

#[derive(Debug, Clone)]
pub struct Row {
    pub batch_id: BatchId,
    pub ordinal: u32,
    pub spec: ValidJobSpec,
    pub state: JobState,
    pub lease_generation: i64,
    pub attempt: u32,
    pub max_attempts: u32,
    pub image: Option<CompletedJob>,
    pub failure: Option<Failure>,
    pub released_as: Option<LeaseReturn>,
    pub microbatch_limit: Option<u32>,
}

#[derive(Debug)]
pub struct MemoryCatalog {
    pub rows: Mutex<BTreeMap<JobId, Row>>,
    /// So many statements fail before one succeeds.
    pub failures_left: AtomicUsize,
    /// Statements that complete fail as a whole while a picture of this ordinal is among them.
    pub refused_ordinal: Mutex<Option<u32>>,
    log: EventLog,
}

impl MemoryCatalog {
    pub fn new(log: EventLog) -> Self {
        Self {
            rows: Mutex::default(),
            failures_left: AtomicUsize::new(0),
            refused_ordinal: Mutex::new(None),
            log,
        }
    }

    pub fn insert(&self, batch_id: BatchId, ordinal: u32, spec: ValidJobSpec) -> JobId {
        let row = Row {
            batch_id,
            ordinal,
            spec,
            state: JobState::Available,
            lease_generation: 0,
            attempt: 0,
            max_attempts: 3,
            image: None,
            failure: None,
            released_as: None,
            microbatch_limit: None,
        };
        let job_id = JobId::of(batch_id, ordinal);
        self.rows.lock().unwrap().insert(job_id, row);
        job_id
    }

    pub fn row(&self, job_id: JobId) -> Row {
        self.rows.lock().unwrap()[&job_id].clone()
    }

    pub fn update(&self, job_id: JobId, update: impl FnOnce(&mut Row)) {
        update(self.rows.lock().unwrap().get_mut(&job_id).expect("a known job"));
    }

    /// As `cancel_job_if_not_final`: whoever holds a lease has lost it.
    pub fn cancel(&self, job_id: JobId) {
        self.update(job_id, |row| {
            row.state = JobState::Cancelled;
            row.lease_generation += 1;
        });
    }

    /// As the rescuer does with an expired lease.
    pub fn rescue(&self, job_id: JobId) {
        self.update(job_id, |row| {
            row.state = JobState::Available;
            row.attempt -= 1;
        });
    }

    fn check_up(&self) -> Result<(), CatalogError> {
        match self.failures_left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1))
        {
            Ok(_) => {
                self.log.push(Event::CatalogFailed);
                Err(CatalogError::Unreachable("away for the test".into()))
            }
            Err(_) => Ok(()),
        }
    }

    /// Applies `update` if the lease is held, and answers whether it was.
    fn if_leased(&self, lease: Lease, update: impl FnOnce(&mut Row)) -> Result<(), LeaseLost> {
        let mut rows = self.rows.lock().unwrap();
        match rows.get_mut(&lease.job_id) {
            Some(row) if row.state == JobState::Running && row.lease_generation == lease.lease_generation => {
                update(row);
                Ok(())
            }
            _ => Err(LeaseLost(lease)),
        }
    }

    fn ordinals(&self, job_ids: impl IntoIterator<Item = JobId>) -> Vec<u32> {
        let rows = self.rows.lock().unwrap();
        job_ids.into_iter().map(|job_id| rows[&job_id].ordinal).collect()
    }
}

impl Catalog for MemoryCatalog {
    async fn claim_if_available(
        &self,
        job_ids: &[JobId],
        _worker_id: WorkerId,
        _microbatch_id: MicrobatchId,
        _lease: Duration,
    ) -> Result<Vec<ClaimedJob>, CatalogError> {
        self.check_up()?;
        let mut claimed = Vec::new();
        for (job_id, row) in self.rows.lock().unwrap().iter_mut() {
            if job_ids.contains(job_id) && row.state == JobState::Available {
                row.state = JobState::Running;
                row.lease_generation += 1;
                row.attempt += 1;
                claimed.push(ClaimedJob {
                    lease: Lease { job_id: *job_id, lease_generation: row.lease_generation },
                    batch_id: row.batch_id,
                    ordinal: row.ordinal,
                    attempt: row.attempt,
                    max_attempts: row.max_attempts,
                    spec: row.spec.clone(),
                    weights_sha256: Sha256Digest::of(b"weights"),
                    acceptance_id: "0190f5fe-7c00-7a00-8000-000000000002".parse::<AcceptanceId>().unwrap(),
                    traceparent: None,
                    microbatch_limit: row.microbatch_limit,
                });
            }
        }
        self.log.push(Event::Claimed(claimed.iter().map(|job| job.ordinal).collect()));
        Ok(claimed)
    }

    async fn extend_leases_if_held(
        &self,
        leases: &[Lease],
        _worker_id: WorkerId,
        _lease: Duration,
    ) -> Result<Vec<JobId>, CatalogError> {
        self.check_up()?;
        let held = |lease: &&Lease| self.if_leased(**lease, |_| {}).is_ok();
        Ok(leases.iter().filter(held).map(|lease| lease.job_id).collect())
    }

    async fn release_if_leased(
        &self,
        leases: &[Lease],
        messages: LeaseReturn,
    ) -> Result<Vec<JobId>, CatalogError> {
        self.check_up()?;
        let release = |lease: &&Lease| {
            let released = self.if_leased(**lease, |row| {
                row.state = JobState::Available;
                row.attempt -= 1;
                row.released_as = Some(messages);
            });
            released.is_ok()
        };
        let released: Vec<JobId> = leases.iter().filter(release).map(|lease| lease.job_id).collect();
        self.log.push(Event::Released(self.ordinals(released.iter().copied())));
        Ok(released)
    }

    async fn fail_if_leased(
        &self,
        lease: Lease,
        failure: &Failure,
    ) -> Result<Result<FailDisposition, LeaseLost>, CatalogError> {
        self.check_up()?;
        let mut disposition = FailDisposition::Discarded;
        let failed = self.if_leased(lease, |row| {
            row.failure = Some(failure.clone());
            if failure.can_retry_help && row.attempt < row.max_attempts {
                row.state = JobState::Retryable;
                disposition = FailDisposition::Retryable { scheduled_at: chrono::Utc::now() };
            } else {
                row.state = JobState::Discarded;
            }
        });
        self.log.push(Event::Failed(self.ordinals([lease.job_id])[0]));
        Ok(failed.map(|()| disposition))
    }

    async fn complete_if_leased(
        &self,
        completed: &[CompletedJob],
    ) -> Result<Vec<Result<ImageId, LeaseLost>>, CatalogError> {
        self.check_up()?;
        let ordinals = self.ordinals(completed.iter().map(|job| job.lease.job_id));
        if self.refused_ordinal.lock().unwrap().is_some_and(|refused| ordinals.contains(&refused)) {
            return Err(CatalogError::Refused { rule: "of the test".to_owned(), source: "refused".into() });
        }
        let complete = |job: &CompletedJob| {
            self.if_leased(job.lease, |row| {
                row.state = JobState::Completed;
                row.image = Some(job.clone());
            })
            .map(|()| ImageId::generate())
        };
        let answers = completed.iter().map(complete).collect();
        self.log.push(Event::Completed(ordinals));
        Ok(answers)
    }
}
