//! Random interleavings of everything that happens to jobs, against a model of a few lines.
//!
//! The model knows each job's state, generation, attempt and outcomes, and every lease that was ever handed out. Each
//! step does one thing, often with a stale lease, and compares the answer; then all jobs are compared with their rows.

use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError};
use schema::{
    ClaimedJob, ErrorClass, FailDisposition, JobId, JobState, LeaseLost, LeaseReturn, MicrobatchId, WorkerId,
};

use crate::support::{Fixture, LEASE, completed, failure};

const JOB_COUNT: usize = 3;
const MAX_ATTEMPTS: u32 = 3;

/// One step. The numbers choose among jobs, workers and leases, modulo how many there are.
#[derive(Clone, Debug)]
enum Step {
    Publish,
    Claim { jobs: Vec<usize>, worker: usize },
    Extend { lease: usize },
    Release { lease: usize, requeued: bool },
    Suspect { lease: usize },
    Fail { lease: usize, can_retry_help: bool },
    Complete { leases: Vec<usize> },
    Cancel { job: usize },
    Expire { job: usize },
    Rescue,
    Stage { job: usize },
}

fn step() -> impl Strategy<Value = Step> {
    let several = || prop::collection::vec(0..JOB_COUNT, 1..4);
    let lease = 0..12_usize;
    prop_oneof![
        1 => Just(Step::Publish),
        6 => (several(), 0..2_usize).prop_map(|(jobs, worker)| Step::Claim { jobs, worker }),
        2 => lease.clone().prop_map(|lease| Step::Extend { lease }),
        2 => (lease.clone(), any::<bool>()).prop_map(|(lease, requeued)| Step::Release { lease, requeued }),
        2 => lease.clone().prop_map(|lease| Step::Suspect { lease }),
        4 => (lease.clone(), prop::bool::weighted(0.8))
            .prop_map(|(lease, can_retry_help)| Step::Fail { lease, can_retry_help }),
        3 => prop::collection::vec(lease, 1..3).prop_map(|leases| Step::Complete { leases }),
        1 => (0..JOB_COUNT).prop_map(|job| Step::Cancel { job }),
        3 => (0..JOB_COUNT).prop_map(|job| Step::Expire { job }),
        3 => Just(Step::Rescue),
        4 => (0..JOB_COUNT).prop_map(|job| Step::Stage { job }),
    ]
}

#[derive(Clone, Debug)]
struct ModelJob {
    job_id: JobId,
    state: JobState,
    generation: i64,
    attempt: u32,
    expired: bool,
    published: bool,
    outcomes: Vec<&'static str>,
    /// The size of the microbatch that it was last claimed in.
    company: u32,
    limit: Option<u32>,
    losses_alone: u32,
}

/// As `max_losses_alone()` in the catalog.
const MAX_LOSSES_ALONE: u32 = 3;

impl ModelJob {
    fn leave(&mut self, state: JobState, outcome: &'static str) {
        self.state = state;
        self.expired = false;
        *self.outcomes.last_mut().expect("a running job has an attempt") = outcome;
    }

    /// Its worker is gone, or says that it is going.
    fn lose(&mut self) {
        self.losses_alone += u32::from(self.limit == Some(1));
        self.limit = Some((self.company.min(self.limit.unwrap_or(u32::MAX)) / 2).max(1));
        let is_guilty = self.losses_alone >= MAX_LOSSES_ALONE;
        self.leave(if is_guilty { JobState::Discarded } else { JobState::Available }, "lost");
        self.attempt -= 1;
        self.published = false;
    }

    fn is_held_by(&self, claimed: &ClaimedJob) -> bool {
        self.state == JobState::Running && self.generation == claimed.lease.lease_generation
    }
}

struct Model {
    jobs: Vec<ModelJob>,
    workers: [WorkerId; 2],
    /// Every lease ever handed out, with whose it was.
    leases: Vec<(ClaimedJob, WorkerId)>,
}

impl Model {
    fn job(&mut self, job_id: JobId) -> &mut ModelJob {
        self.jobs.iter_mut().find(|job| job.job_id == job_id).expect("a job of this case")
    }

    fn lease(&self, index: usize) -> Option<(ClaimedJob, WorkerId)> {
        let count = self.leases.len();
        (count > 0).then(|| self.leases[index % count].clone())
    }

    /// Does `step` to the catalog and to the model, and compares the answers.
    async fn take(&mut self, fixture: &Fixture, step: &Step) -> Result<(), TestCaseError> {
        let catalog = &fixture.catalog;
        match step {
            Step::Publish => {
                let job_ids: Vec<JobId> = self.jobs.iter().map(|job| job.job_id).collect();
                let marked = catalog.mark_published_if_available(&job_ids).await.unwrap();
                let available = self.jobs.iter_mut().filter(|job| job.state == JobState::Available);
                let expected = available.map(|job| job.published = true).count();
                prop_assert_eq!(marked, expected as u64);
            }
            Step::Claim { jobs, worker } => {
                let worker_id = self.workers[*worker];
                let job_ids: Vec<JobId> = jobs.iter().map(|&job| self.jobs[job].job_id).collect();
                let claimed = catalog
                    .claim_if_available(&job_ids, worker_id, MicrobatchId::generate(), LEASE)
                    .await
                    .unwrap();
                let mut expected = Vec::new();
                let company = claimed.len() as u32;
                for &job in jobs {
                    let job = &mut self.jobs[job];
                    if job.state == JobState::Available {
                        job.state = JobState::Running;
                        job.generation += 1;
                        job.attempt += 1;
                        job.company = company;
                        job.outcomes.push("open");
                        expected.push((job.job_id, job.generation, job.attempt));
                    }
                }
                let answered =
                    claimed.iter().map(|job| (job.lease.job_id, job.lease.lease_generation, job.attempt));
                prop_assert_eq!(answered.collect::<Vec<_>>(), expected);
                self.leases.extend(claimed.into_iter().map(|job| (job, worker_id)));
            }
            Step::Extend { lease } => {
                let Some((claimed, worker_id)) = self.lease(*lease) else { return Ok(()) };
                let held = catalog.extend_leases_if_held(&[claimed.lease], worker_id, LEASE).await.unwrap();
                let job = self.job(claimed.lease.job_id);
                prop_assert_eq!(!held.is_empty(), job.is_held_by(&claimed));
                if job.is_held_by(&claimed) {
                    job.expired = false;
                }
            }
            Step::Release { lease, requeued } => {
                let Some((claimed, _)) = self.lease(*lease) else { return Ok(()) };
                let messages =
                    if *requeued { LeaseReturn::MessageRequeued } else { LeaseReturn::MessageSettled };
                let released = catalog.release_if_leased(&[claimed.lease], messages).await.unwrap();
                let job = self.job(claimed.lease.job_id);
                prop_assert_eq!(!released.is_empty(), job.is_held_by(&claimed));
                if job.is_held_by(&claimed) {
                    job.leave(JobState::Available, "preempted");
                    job.attempt -= 1;
                    job.published = *requeued;
                }
            }
            Step::Suspect { lease } => {
                let Some((claimed, _)) = self.lease(*lease) else { return Ok(()) };
                let released =
                    catalog.release_if_leased(&[claimed.lease], LeaseReturn::Suspected).await.unwrap();
                let job = self.job(claimed.lease.job_id);
                prop_assert_eq!(!released.is_empty(), job.is_held_by(&claimed));
                if job.is_held_by(&claimed) {
                    job.lose();
                }
            }
            Step::Fail { lease, can_retry_help } => {
                let Some((claimed, _)) = self.lease(*lease) else { return Ok(()) };
                let failure = failure(ErrorClass::Infra, *can_retry_help);
                let answer = catalog.fail_if_leased(claimed.lease, &failure).await.unwrap();
                let job = self.job(claimed.lease.job_id);
                if !job.is_held_by(&claimed) {
                    prop_assert_eq!(answer, Err(LeaseLost(claimed.lease)));
                } else if *can_retry_help && job.attempt < MAX_ATTEMPTS {
                    prop_assert!(matches!(answer, Ok(FailDisposition::Retryable { .. })), "{:?}", answer);
                    job.leave(JobState::Retryable, "error");
                    job.published = false;
                } else {
                    prop_assert_eq!(answer, Ok(FailDisposition::Discarded));
                    job.leave(JobState::Discarded, "error");
                    job.published = false;
                }
            }
            Step::Complete { leases } => {
                let given: Vec<_> = leases.iter().filter_map(|&lease| self.lease(lease)).collect();
                // A worker reports each job once.
                let mut seen = Vec::new();
                let given: Vec<_> = given
                    .into_iter()
                    .filter(|(claimed, _)| {
                        let fresh = !seen.contains(&claimed.lease.job_id);
                        seen.push(claimed.lease.job_id);
                        fresh
                    })
                    .collect();
                let reports: Vec<_> =
                    given.iter().map(|(claimed, worker_id)| completed(claimed, *worker_id)).collect();
                let answers = catalog.complete_if_leased(&reports).await.unwrap();
                for ((claimed, _), answer) in given.iter().zip(answers) {
                    let job = self.job(claimed.lease.job_id);
                    // Completed by this very lease before: the same answer again.
                    let recorded =
                        job.state == JobState::Completed && job.generation == claimed.lease.lease_generation;
                    prop_assert_eq!(answer.is_ok(), job.is_held_by(claimed) || recorded);
                    if job.is_held_by(claimed) {
                        job.leave(JobState::Completed, "ok");
                    }
                }
            }
            Step::Cancel { job } => {
                let job = &mut self.jobs[*job];
                let counts = catalog.cancel_job_if_not_final(job.job_id).await.unwrap().unwrap();
                prop_assert_eq!(counts.cancelled == 1, !job.state.is_final());
                prop_assert_eq!(counts.of_them_running == 1, job.state == JobState::Running);
                if job.state == JobState::Running {
                    job.leave(JobState::Cancelled, "cancelled");
                    job.generation += 1;
                } else if !job.state.is_final() {
                    job.state = JobState::Cancelled;
                }
            }
            Step::Expire { job } => {
                let job = &mut self.jobs[*job];
                if job.state == JobState::Running {
                    let lease = schema::Lease { job_id: job.job_id, lease_generation: job.generation };
                    fixture.expire(lease).await;
                    job.expired = true;
                }
            }
            Step::Rescue => {
                let rescued = catalog.rescue_if_lease_expired(1000).await.unwrap();
                for job in &mut self.jobs {
                    let became = rescued.iter().find(|(job_id, _)| *job_id == job.job_id);
                    prop_assert_eq!(became.is_some(), job.expired);
                    if let Some((_, state)) = became {
                        job.lose();
                        prop_assert_eq!(*state, job.state);
                    }
                }
            }
            Step::Stage { job } => {
                let due = "UPDATE jobs SET scheduled_at = now() WHERE job_id = $1 AND state = 'retryable'";
                let job = &mut self.jobs[*job];
                sqlx::query(due).bind(job.job_id).execute(&fixture.pool).await.unwrap();
                let staged = catalog.stage_if_due(1000).await.unwrap();
                prop_assert_eq!(staged.contains(&job.job_id), job.state == JobState::Retryable);
                if job.state == JobState::Retryable {
                    job.state = JobState::Available;
                }
            }
        }
        Ok(())
    }

    /// Compares every job with its row.
    async fn compare(&self, fixture: &Fixture) -> Result<(), TestCaseError> {
        for job in &self.jobs {
            prop_assert_eq!(fixture.state(job.job_id).await, job.state);
            let column = async |name| fixture.column(job.job_id, name).await;
            prop_assert_eq!(column("lease_generation").await, Some(job.generation.to_string()));
            prop_assert_eq!(column("attempt").await, Some(job.attempt.to_string()));
            prop_assert_eq!(
                column("image_id IS NOT NULL").await.unwrap() == "true",
                job.state == JobState::Completed
            );
            if job.state == JobState::Available {
                prop_assert_eq!(column("published_at IS NOT NULL").await.unwrap() == "true", job.published);
            }
            prop_assert_eq!(fixture.outcomes(job.job_id).await, job.outcomes.clone());
            prop_assert_eq!(column("microbatch_limit").await, job.limit.map(|limit| limit.to_string()));
            prop_assert_eq!(column("losses_alone").await, Some(job.losses_alone.to_string()));
        }
        Ok(())
    }
}

async fn run(fixture: &Fixture, steps: &[Step]) -> Result<(), TestCaseError> {
    let (_, job_ids) = fixture.submit(&MicrobatchId::generate().to_string(), JOB_COUNT as u32).await;
    let fresh = |job_id| ModelJob {
        job_id,
        state: JobState::Available,
        generation: 0,
        attempt: 0,
        expired: false,
        published: false,
        outcomes: Vec::new(),
        company: 0,
        limit: None,
        losses_alone: 0,
    };
    let jobs = job_ids.into_iter().map(fresh).collect();
    let workers = [fixture.worker().await, fixture.worker().await];
    let mut model = Model { jobs, workers, leases: Vec::new() };
    for step in steps {
        model.take(fixture, step).await?;
        model.compare(fixture).await?;
    }
    Ok(())
}

#[test]
fn any_interleaving_agrees_with_the_model() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    // One database for all cases: each case has jobs of its own, and looks only at those.
    let fixture = runtime.block_on(Fixture::new());
    let config = Config { cases: 40, failure_persistence: None, ..Config::default() };
    proptest!(config, |(steps in prop::collection::vec(step(), 1..40))| {
        runtime.block_on(run(&fixture, &steps))?;
    });
}
