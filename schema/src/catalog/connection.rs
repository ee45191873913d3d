//! The pool of connections, and bringing the tables up to date.

use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};
use sqlx::migrate::{Migrate, Migrator};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{ConnectOptions, Connection, Executor, PgPool};

use super::error::CatalogError;

/// The migrations of this build. A database that a later build has migrated still serves it.
fn migrator() -> Migrator {
    let mut migrator = sqlx::migrate!("../migrations");
    migrator.set_ignore_missing(true);
    migrator
}

/// How long a call waits for a connection before it says that the catalog cannot be reached.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection that was unused for longer is tried out before it is used. Sooner it is not: a question and an answer before
/// each statement is a tenth of what Postgres has to do for a picture, and whoever calls repeats what failed in transit.
const TRY_OUT_AFTER: Duration = Duration::from_secs(5);

/// Every statement here is written for an index, and none wants the whole of a table that grows. Postgres would still read all of one that
/// has a page or two when it plans, and it keeps that plan, for a worker's most frequent statements, until it has looked at the
/// table again: for the first minute of a new database each microbatch would read every job. Where no index serves,
/// tables are read as before; but such a plan then looks so expensive that Postgres would compile it each time, for seconds.
const FIND_BY_INDEX: &str = "SET enable_seqscan = off; SET jit = off";

/// Darkroom's Postgres: a pool of connections. Cloning shares it.
#[derive(Clone, Debug)]
pub struct PgCatalog {
    pub(super) pool: PgPool,
}

/// How the database's migrations compare with this build's.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct MigrationStatus {
    /// Versions that both have.
    pub applied: Vec<i64>,
    /// Versions that only this build has, each with its description: `migrate` would apply them.
    pub pending: Vec<(i64, String)>,
    /// Versions that only the database has: it was migrated by a later build.
    pub unknown: Vec<i64>,
}

impl MigrationStatus {
    /// Whether every migration of this build is applied. A later build may have applied more: migrations
    /// are written so that the previous build still works (`migrations/README.md`).
    pub fn is_current(&self) -> bool {
        self.pending.is_empty()
    }
}

impl PgCatalog {
    /// Connects to `url` (`postgres://user:password@host/database`) with at most `max_connections` connections. Tries
    /// once, so that a wrong address is told at once; a process that should wait for Postgres to start calls again.
    ///
    /// # Errors
    /// [`CatalogError::Misconfigured`] for a bad URL or wrong credentials; [`CatalogError::Unreachable`] when Postgres
    /// refuses, or after ten seconds without an answer.
    pub async fn connect(url: &SecretString, max_connections: u32) -> Result<Self, CatalogError> {
        let options: PgConnectOptions = url.expose_secret().parse()?;
        // Cancelling a large batch takes seconds and is no reason to warn; for slow statements, ask Postgres' own log.
        let options = options.disable_statement_logging();
        // The pool would repeat a refused connection until its time is up and then not say what was wrong.
        let first = tokio::time::timeout(ACQUIRE_TIMEOUT, options.connect());
        first.await.map_err(|elapsed| CatalogError::Unreachable(elapsed.into()))??.close().await?;
        let pool = PgPoolOptions::new()
            .max_connections(max_connections)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .test_before_acquire(false)
            .after_connect(|connection, _| {
                Box::pin(async move { connection.execute(FIND_BY_INDEX).await.map(|_| ()) })
            })
            .before_acquire(|connection, used| {
                // A connection that does not answer is replaced.
                Box::pin(async move { Ok(used.idle_for <= TRY_OUT_AFTER || connection.ping().await.is_ok()) })
            })
            .connect_lazy_with(options);
        Ok(Self { pool })
    }

    /// Asks Postgres for a sign of life.
    ///
    /// # Errors
    /// When there is none.
    pub async fn ping(&self) -> Result<(), CatalogError> {
        sqlx::query("SELECT 1").execute(&self.pool).await?;
        Ok(())
    }

    /// Closes all connections, waiting for calls in progress.
    pub async fn close(&self) {
        self.pool.close().await;
    }

    /// Applies the migrations that are pending and returns how it found them. Two processes may call it at once.
    ///
    /// # Errors
    /// [`CatalogError::NotMigrated`] when an applied migration differs from this build's, and when Postgres fails.
    pub async fn migrate(&self) -> Result<MigrationStatus, CatalogError> {
        let found = self.migration_status().await?;
        migrator().run(&self.pool).await?;
        Ok(found)
    }

    /// Compares the database's migrations with this build's, without changing anything.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn migration_status(&self) -> Result<MigrationStatus, CatalogError> {
        let mut connection = self.pool.acquire().await?;
        let is_fresh: bool = sqlx::query_scalar("SELECT to_regclass('_sqlx_migrations') IS NULL")
            .fetch_one(&mut *connection)
            .await?;
        let in_database: Vec<i64> = if is_fresh {
            Vec::new()
        } else {
            let applied = connection.list_applied_migrations().await?;
            applied.into_iter().map(|migration| migration.version).collect()
        };
        let migrator = migrator();
        let is_ours = |version: &i64| migrator.version_exists(*version);
        let (applied, unknown): (Vec<i64>, Vec<i64>) = in_database.into_iter().partition(is_ours);
        let pending = migrator
            .iter()
            .filter(|migration| !applied.contains(&migration.version))
            .map(|migration| (migration.version, migration.description.to_string()))
            .collect();
        Ok(MigrationStatus { applied, pending, unknown })
    }
}
