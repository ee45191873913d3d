//! A database for a test, and the verbs that tests speak in.

mod server;

use std::time::Duration;

use schema::{
    Acceptance, BatchId, CatalogError, ClaimedJob, CompletedJob, ErrorClass, Failure, JobId, JobSpec,
    JobState, Lease, MicrobatchId, Model, ModelComponent, NewBatch, NewJob, NewModel, NewWorker,
    NoiseScheduler, ObjectKey, PgCatalog, PriorityBand, SafetyVerdict, Sha256Digest, SpecDefaults,
    StageTimings, StoredObject, WorkerId,
};
use secrecy::SecretString;
use sqlx::PgPool;
use tokio::task::JoinHandle;

pub use server::{TEST_ITSELF, TestDatabase};

/// A lease long enough for any test.
pub const LEASE: Duration = Duration::from_secs(600);
/// The principal who has accepted the licence.
pub const PRINCIPAL: &str = "ada";

/// A catalog with one model, whose licence [`PRINCIPAL`] has accepted.
pub struct Fixture {
    pub catalog: PgCatalog,
    /// For looking at rows, and for statements that no method would run.
    pub pool: PgPool,
    pub model: Model,
    pub acceptance: Acceptance,
    database: TestDatabase,
}

pub fn new_model(name: &str) -> NewModel {
    NewModel {
        name: name.parse().unwrap(),
        folder: "demo/model".into(),
        components: vec![ModelComponent {
            path: "unet/diffusion_pytorch_model.safetensors".into(),
            sha256: Sha256Digest::of(name.as_bytes()),
            size_bytes: 7,
        }],
        licence_name: "Demo licence".into(),
        licence_text: "Be kind.\n".into(),
        default_width: 128,
        default_height: 128,
        default_noise_scheduler: NoiseScheduler::Pndm,
    }
}

pub fn defaults() -> SpecDefaults {
    SpecDefaults::of_model(128, 128, NoiseScheduler::Pndm)
}

pub fn new_job(prompt: &str, seed: u64) -> NewJob {
    let spec = JobSpec { prompt: prompt.into(), seed: Some(seed), ..JobSpec::default() };
    NewJob { spec: spec.validate(&defaults()).unwrap(), source_line: Some(1) }
}

pub fn new_jobs(count: usize) -> Vec<NewJob> {
    (0..count).map(|index| new_job(&format!("a red circle, number {index}"), index as u64)).collect()
}

pub fn failure(class: ErrorClass, can_retry_help: bool) -> Failure {
    Failure { class, message: "the fault, and what caused it".into(), can_retry_help }
}

/// The name of the rule by which Postgres refused.
pub fn rule_of(error: sqlx::Error) -> String {
    match CatalogError::from(error) {
        CatalogError::Refused { rule, .. } => rule,
        other => panic!("not refused by a rule: {other:?}"),
    }
}

impl Fixture {
    pub async fn new() -> Self {
        let database = TestDatabase::create().await;
        let catalog = PgCatalog::connect(&database.url(), 8).await.unwrap();
        let pool = database.pool().await;
        let model = catalog.add_model(&new_model("demo")).await.unwrap().model;
        let acceptance =
            catalog.accept_licence(PRINCIPAL, model.licence_id, "cli", "I accept.").await.unwrap();
        Self { catalog, pool, model, acceptance, database }
    }

    pub fn url(&self) -> SecretString {
        self.database.url()
    }

    /// Waits until a statement of this database waits for a lock, which `task` has to be the reason for.
    pub async fn wait_for_lock<T>(&self, task: &JoinHandle<T>) {
        let waiting = "SELECT count(*) FROM pg_stat_activity
                       WHERE wait_event_type = 'Lock' AND datname = current_database()";
        while self.count(waiting).await == 0 {
            assert!(!task.is_finished(), "the task did not wait for the lock");
            tokio::task::yield_now().await;
        }
    }

    pub fn new_batch(&self, key: &str) -> NewBatch {
        NewBatch {
            name: key.into(),
            principal: PRINCIPAL.into(),
            model: self.model.name.clone(),
            idempotency_key: key.into(),
            source_name: "prompts.csv".into(),
            defaults: defaults(),
            band: PriorityBand::Normal,
            max_attempts: 3,
            traceparent: None,
        }
    }

    /// Submits `count` jobs and returns the batch and its jobs, in order.
    pub async fn submit(&self, key: &str, count: u32) -> (BatchId, Vec<JobId>) {
        let jobs = new_jobs(count as usize);
        let submitted = self.catalog.submit_batch(&self.new_batch(key), &jobs).await.unwrap();
        assert!(!submitted.replayed);
        let job_ids = (0..count).map(|ordinal| JobId::of(submitted.batch_id, ordinal)).collect();
        (submitted.batch_id, job_ids)
    }

    pub async fn submit_one(&self, key: &str) -> JobId {
        self.submit(key, 1).await.1[0]
    }

    pub async fn worker(&self) -> WorkerId {
        let worker_id = WorkerId::generate();
        let new = NewWorker {
            worker_id,
            name: "worker-1".into(),
            host: "localhost".into(),
            model_id: self.model.model_id,
            pipeline: "solid-color".into(),
            device: "cpu".into(),
            dtype: "f32".into(),
            version: "0.1.0".into(),
            lease_seconds: 60,
            max_microbatch: 4,
        };
        self.catalog.register_worker(&new).await.unwrap();
        worker_id
    }

    pub async fn claim(&self, job_ids: &[JobId], worker_id: WorkerId) -> Vec<ClaimedJob> {
        let microbatch_id = MicrobatchId::generate();
        self.catalog.claim_if_available(job_ids, worker_id, microbatch_id, LEASE).await.unwrap()
    }

    /// Claims a job that is known to be available.
    pub async fn claim_one(&self, job_id: JobId, worker_id: WorkerId) -> ClaimedJob {
        self.claim(&[job_id], worker_id).await.pop().expect("the job is available")
    }

    /// Lets the lease run out, as if its time had passed.
    pub async fn expire(&self, lease: Lease) {
        let sql = "UPDATE jobs SET lease_expires_at = now() - interval '1 second' WHERE job_id = $1";
        sqlx::query(sql).bind(lease.job_id).execute(&self.pool).await.unwrap();
    }

    pub async fn state(&self, job_id: JobId) -> JobState {
        let sql = "SELECT state FROM jobs WHERE job_id = $1";
        sqlx::query_scalar(sql).bind(job_id).fetch_one(&self.pool).await.unwrap()
    }

    /// One number from the database.
    pub async fn count(&self, sql: &str) -> i64 {
        sqlx::query_scalar(sql).fetch_one(&self.pool).await.unwrap()
    }

    /// How many rows of `jobs` were read, by Postgres' own count, once every catalog's session has ended: a session
    /// reports at its end at the latest.
    pub async fn rows_read(&self) -> i64 {
        let sessions = format!(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
             AND application_name <> '{TEST_ITSELF}' AND backend_type = 'client backend'"
        );
        while self.count(&sessions).await > 0 {
            tokio::task::yield_now().await;
        }
        let sql = "SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_user_tables WHERE relname = 'jobs'";
        self.count(sql).await
    }

    /// `column` of job `job_id` as text.
    pub async fn column(&self, job_id: JobId, column: &str) -> Option<String> {
        let sql = format!("SELECT {column}::text FROM jobs WHERE job_id = $1");
        sqlx::query_scalar(&sql).bind(job_id).fetch_one(&self.pool).await.unwrap()
    }

    /// The outcomes of a job's attempts in their order; `open` for one that has not ended.
    pub async fn outcomes(&self, job_id: JobId) -> Vec<String> {
        let sql = "SELECT coalesce(outcome::text, 'open') FROM attempts WHERE job_id = $1 ORDER BY lease_generation";
        sqlx::query_scalar(sql).bind(job_id).fetch_all(&self.pool).await.unwrap()
    }

    /// Runs a statement that has to be refused, and returns the rule that refuses it.
    pub async fn refusal(&self, sql: &str) -> String {
        // A transaction, since some rules are checked when it commits.
        let mut transaction = self.pool.begin().await.unwrap();
        let refused = match sqlx::raw_sql(sql).execute(&mut *transaction).await {
            Ok(_) => transaction.commit().await,
            Err(error) => Err(error),
        };
        rule_of(refused.expect_err(sql))
    }
}

/// What a worker would report for `claimed`, with pixels that depend on the lease.
pub fn completed(claimed: &ClaimedJob, worker_id: WorkerId) -> CompletedJob {
    let sha256 = Sha256Digest::of(format!("{:?}", claimed.lease).as_bytes());
    CompletedJob {
        lease: claimed.lease,
        worker_id,
        object: Some(StoredObject {
            bucket: "darkroom".into(),
            object_key: ObjectKey::new(claimed.batch_id, claimed.ordinal, &sha256),
            sha256,
            size_bytes: 1234,
        }),
        safety: Some(SafetyVerdict {
            has_nsfw_concept: false,
            concept_scores: vec![-0.12, -0.034],
            special_care_scores: vec![-0.25],
        }),
        prompt_truncated: false,
        weights_sha256: claimed.weights_sha256,
        device: "cpu".into(),
        dtype: "f32".into(),
        noise_dtype: "f32".into(),
        recipe: claimed.spec.recipe(),
        engine: None,
        timings: StageTimings { denoise_ms: 12.5, ..StageTimings::default() },
    }
}

/// The same, flagged by the safety checker.
pub fn flagged(claimed: &ClaimedJob, worker_id: WorkerId) -> CompletedJob {
    let safety = SafetyVerdict {
        has_nsfw_concept: true,
        concept_scores: vec![0.02, -0.034],
        special_care_scores: vec![-0.25],
    };
    CompletedJob { object: None, safety: Some(safety), ..completed(claimed, worker_id) }
}
