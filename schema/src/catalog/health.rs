//! What `darkroom doctor` asks Postgres: settings that hold or break our promises, room, time, and how long
//! microbatches took.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;

use super::connection::PgCatalog;
use super::error::CatalogError;
use crate::model_name::ModelName;

/// The server's settings, and how full it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, sqlx::FromRow)]
pub struct ServerHealth {
    /// The version, as 150006 for 15.6.
    pub version_number: i32,
    /// The version for people.
    pub version: String,
    /// Whether a commit reaches the disk at all.
    pub fsync: bool,
    /// When a commit is answered: `on`, `off`, `local`, `remote_write` or `remote_apply`.
    pub synchronous_commit: String,
    /// The standbys that a commit waits for; empty when there are none.
    pub synchronous_standby_names: String,
    /// Whether a page that is torn by a crash can be repaired.
    pub full_page_writes: bool,
    /// Connections that the server takes from us: all, less those reserved, or what our role or database may have.
    pub connection_limit: i32,
    /// Connections that are open now, of anybody.
    pub connection_count: i32,
    /// Whether this server only repeats another.
    pub in_recovery: bool,
}

/// How long microbatches took lately on the workers of one model that were started with the same settings.
#[derive(Clone, Debug, PartialEq, Serialize, sqlx::FromRow)]
pub struct MicrobatchTimes {
    /// The model.
    pub model: ModelName,
    /// The workers' `--lease-seconds`; `None` from builds that did not record it.
    pub lease_seconds: Option<i32>,
    /// The workers' `--max-microbatch`; `None` from builds that did not record it.
    pub max_microbatch: Option<i32>,
    /// How many workers those are, by name.
    pub worker_count: i64,
    /// The one with the longest microbatch.
    pub slowest_worker: String,
    /// Attempts that went well within the time looked at.
    pub attempt_count: i64,
    /// The longest of them, from claim to record: for so long its worker had to keep the lease.
    pub longest_seconds: Option<f64>,
    /// Attempts that were given up although their worker was seen alive later: it lost its lease.
    pub lost_by_the_living: i64,
}

impl PgCatalog {
    /// The server's settings, as this connection has them.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn server_health(&self) -> Result<ServerHealth, CatalogError> {
        let sql = "
            SELECT current_setting('server_version_num')::integer AS version_number,
                   current_setting('server_version') AS version,
                   current_setting('fsync')::boolean AS fsync,
                   current_setting('synchronous_commit') AS synchronous_commit,
                   current_setting('synchronous_standby_names') AS synchronous_standby_names,
                   current_setting('full_page_writes')::boolean AS full_page_writes,
                   least(
                       current_setting('max_connections')::integer
                           - current_setting('superuser_reserved_connections')::integer,
                       (SELECT nullif(rolconnlimit, -1) FROM pg_roles WHERE rolname = current_user),
                       (SELECT nullif(datconnlimit, -1) FROM pg_database WHERE datname = current_database())
                   ) AS connection_limit,
                   (SELECT count(*)::integer FROM pg_stat_activity
                    WHERE backend_type = 'client backend' OR backend_type IS NULL) AS connection_count,
                   pg_is_in_recovery() AS in_recovery";
        Ok(sqlx::query_as(sql).fetch_one(&self.pool).await?)
    }

    /// The database's clock, which all leases go by.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn clock(&self) -> Result<DateTime<Utc>, CatalogError> {
        Ok(sqlx::query_scalar("SELECT clock_timestamp()").fetch_one(&self.pool).await?)
    }

    /// How long the microbatches of the time since `window` ago took, by model and workers' settings.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn microbatch_times(&self, window: Duration) -> Result<Vec<MicrobatchTimes>, CatalogError> {
        let sql = "
            WITH of_worker AS (
                SELECT model_id, lease_seconds, max_microbatch, workers.name AS worker,
                       count(*) FILTER (WHERE outcome = 'ok') AS attempt_count,
                       max(extract(epoch FROM ended_at - attempts.started_at)::float8)
                           FILTER (WHERE outcome = 'ok') AS longest_seconds,
                       count(*) FILTER (WHERE outcome = 'lost' AND workers.last_seen_at > ended_at)
                           AS lost_by_the_living
                FROM attempts JOIN workers USING (worker_id)
                WHERE ended_at > now() - make_interval(secs => $1)
                GROUP BY model_id, lease_seconds, max_microbatch, workers.name
            )
            SELECT models.name AS model, lease_seconds, max_microbatch, count(*) AS worker_count,
                   (array_agg(worker ORDER BY longest_seconds DESC NULLS LAST, worker))[1] AS slowest_worker,
                   sum(attempt_count)::bigint AS attempt_count, max(longest_seconds) AS longest_seconds,
                   sum(lost_by_the_living)::bigint AS lost_by_the_living
            FROM of_worker JOIN models USING (model_id)
            GROUP BY models.name, lease_seconds, max_microbatch
            ORDER BY models.name, lease_seconds, max_microbatch";
        Ok(sqlx::query_as(sql).bind(window.as_secs_f64()).fetch_all(&self.pool).await?)
    }
}
