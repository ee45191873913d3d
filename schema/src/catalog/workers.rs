//! The workers: each run of a worker process has a row, so that attempts and images can name who made them.

use chrono::{DateTime, Utc};
use serde::Serialize;

use super::connection::PgCatalog;
use super::error::CatalogError;
use crate::id::{ModelId, WorkerId};
use crate::model_name::ModelName;

/// A worker process that starts.
#[derive(Clone, Debug)]
pub struct NewWorker {
    /// Drawn by the worker, once a process.
    pub worker_id: WorkerId,
    /// What people call it.
    pub name: String,
    /// The machine it runs on.
    pub host: String,
    /// The one model it serves. It can hold leases on this model's jobs alone.
    pub model_id: ModelId,
    /// Its pipeline: `stable-diffusion`, `solid-color`.
    pub pipeline: String,
    /// Its device: `cpu`, `cuda:0`.
    pub device: String,
    /// The dtype it computes in: `f32`.
    pub dtype: String,
    /// The build it runs.
    pub version: String,
    /// How long a job stays this worker's after its last sign of life, in seconds.
    pub lease_seconds: u32,
    /// The most jobs that it lets share a forward pass.
    pub max_microbatch: u32,
}

/// A worker's row, and how many leases it holds now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, sqlx::FromRow)]
pub struct WorkerSummary {
    /// Its id.
    pub worker_id: WorkerId,
    /// What people call it.
    pub name: String,
    /// The machine it runs on.
    pub host: String,
    /// The model it serves.
    pub model: ModelName,
    /// Its pipeline.
    pub pipeline: String,
    /// Its device.
    pub device: String,
    /// The dtype it computes in.
    pub dtype: String,
    /// The build it runs.
    pub version: String,
    /// When it started.
    pub started_at: DateTime<Utc>,
    /// When it was last heard of.
    pub last_seen_at: DateTime<Utc>,
    /// When it stopped, if it said so.
    pub stopped_at: Option<DateTime<Utc>>,
    /// Why it stopped.
    pub stop_reason: Option<String>,
    /// Whether it stopped because one fault kept coming back, whatever the job.
    pub is_unfit: bool,
    /// The jobs it holds leases on.
    pub running_count: i64,
}

impl PgCatalog {
    /// Records that a worker has started.
    ///
    /// # Errors
    /// When its id is taken or its model unknown, and when Postgres fails.
    pub async fn register_worker(&self, new: &NewWorker) -> Result<(), CatalogError> {
        let sql = "INSERT INTO workers (worker_id, name, host, model_id, pipeline, device, dtype, version,
                                        lease_seconds, max_microbatch)
                   VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)";
        sqlx::query(sql)
            .bind(new.worker_id)
            .bind(&new.name)
            .bind(&new.host)
            .bind(new.model_id)
            .bind(&new.pipeline)
            .bind(&new.device)
            .bind(&new.dtype)
            .bind(&new.version)
            .bind(i64::from(new.lease_seconds))
            .bind(i64::from(new.max_microbatch))
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    /// Records that a worker is alive. Says whether it is registered and not stopped.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn worker_seen(&self, worker_id: WorkerId) -> Result<bool, CatalogError> {
        let sql = "UPDATE workers SET last_seen_at = now() WHERE worker_id = $1 AND stopped_at IS NULL";
        Ok(sqlx::query(sql).bind(worker_id).execute(&self.pool).await?.rows_affected() == 1)
    }

    /// Records that a worker has stopped, and why. The first reason stays.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn worker_stopped(&self, worker_id: WorkerId, reason: &str) -> Result<(), CatalogError> {
        let sql = "UPDATE workers SET last_seen_at = now(), stopped_at = now(), stop_reason = $2
                   WHERE worker_id = $1 AND stopped_at IS NULL";
        sqlx::query(sql).bind(worker_id).bind(reason).execute(&self.pool).await?;
        Ok(())
    }

    /// Records that a worker stops because one fault kept coming back, whatever the job. The first reason stays.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn worker_unfit(&self, worker_id: WorkerId, reason: &str) -> Result<(), CatalogError> {
        let sql =
            "UPDATE workers SET last_seen_at = now(), stopped_at = now(), stop_reason = $2, is_unfit = true
                   WHERE worker_id = $1 AND stopped_at IS NULL";
        sqlx::query(sql).bind(worker_id).bind(reason).execute(&self.pool).await?;
        Ok(())
    }

    /// Every worker that has not stopped, and those that stopped within the last day; latest first.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn workers(&self) -> Result<Vec<WorkerSummary>, CatalogError> {
        let sql = "
            SELECT workers.*, models.name AS model,
                   (SELECT count(*) FROM jobs
                    WHERE state = 'running' AND jobs.leased_by = workers.worker_id) AS running_count
            FROM workers JOIN models USING (model_id)
            WHERE stopped_at IS NULL OR stopped_at > now() - interval '1 day'
            ORDER BY started_at DESC, worker_id DESC";
        Ok(sqlx::query_as(sql).fetch_all(&self.pool).await?)
    }
}
