//! What `darkroom doctor` asks Postgres: settings that hold or break our promises, room, time, and how long
//! microbatches took.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Serialize;

use super::connection::PgCatalog;
use super::error::CatalogError;

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

/// How long microbatches took lately.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, sqlx::FromRow)]
pub struct MicrobatchTimes {
    /// Attempts that went well within the time looked at.
    pub attempt_count: i64,
    /// The longest of them, from claim to record.
    pub longest_seconds: Option<f64>,
    /// Attempts that were given up although their worker was seen alive later: it lost its lease.
    pub lost_by_the_living: i64,
    /// How far ahead the furthest lease of a running job reaches: no lease in use is shorter than that.
    pub furthest_lease_seconds: Option<f64>,
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

    /// How long the microbatches of the time since `window` ago took.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn microbatch_times(&self, window: Duration) -> Result<MicrobatchTimes, CatalogError> {
        let sql = "
            SELECT count(*) FILTER (WHERE outcome = 'ok') AS attempt_count,
                   max(extract(epoch FROM ended_at - attempts.started_at)::float8)
                       FILTER (WHERE outcome = 'ok') AS longest_seconds,
                   count(*) FILTER (WHERE outcome = 'lost' AND workers.last_seen_at > ended_at)
                       AS lost_by_the_living,
                   (SELECT max(extract(epoch FROM lease_expires_at - clock_timestamp())::float8)
                    FROM jobs WHERE state = 'running') AS furthest_lease_seconds
            FROM attempts JOIN workers USING (worker_id)
            WHERE ended_at > now() - make_interval(secs => $1)";
        Ok(sqlx::query_as(sql).bind(window.as_secs_f64()).fetch_one(&self.pool).await?)
    }
}
