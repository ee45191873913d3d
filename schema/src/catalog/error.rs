//! What can go wrong between us and Postgres, sorted by what the caller should do about it.

use sqlx::error::DatabaseError;

/// The cause of a [`CatalogError`], for people to read.
pub type Source = Box<dyn std::error::Error + Send + Sync>;

/// A statement that did not go through. Nothing it would have changed was changed, except that after
/// [`Unreachable`](Self::Unreachable) a commit may or may not have happened: repeat the call, they are all safe to repeat.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// Postgres is away, starting, stopping, out of connections or out of disk. Waiting helps.
    #[error("the catalog cannot be reached")]
    Unreachable(#[source] Source),
    /// Two statements were in each other's way. Trying again helps.
    #[error("the catalog was busy with the same rows")]
    Contended(#[source] Source),
    /// The address or the credentials are wrong. A person has to act.
    #[error("the catalog's address or credentials are wrong\nhint: check DATABASE_URL")]
    Misconfigured(#[source] Source),
    /// The tables are not those of this build. A person has to act.
    #[error("the catalog's tables are not those that this build expects\nhint: run `darkroom migrate`")]
    NotMigrated(#[source] Source),
    /// A constraint or trigger of the catalog refused the change.
    #[error("the catalog refused a change, by its rule `{rule}`")]
    Refused {
        /// The constraint's name, or the trigger's.
        rule: String,
        /// What Postgres said.
        #[source]
        source: Source,
    },
    /// A row holds something that this build cannot read.
    #[error("the catalog holds {what}, which this build cannot read")]
    Unreadable {
        /// Which row or column.
        what: String,
        /// Why not.
        #[source]
        source: Source,
    },
    /// Anything else: a mistake in a statement, most likely.
    #[error("the catalog failed")]
    Internal(#[source] Source),
}

impl CatalogError {
    /// Whether the same call may go through later without anybody doing anything.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unreachable(_) | Self::Contended(_))
    }
}

impl From<sqlx::Error> for CatalogError {
    fn from(error: sqlx::Error) -> Self {
        use sqlx::Error as E;
        match error {
            E::Database(database_error) => from_database(database_error),
            E::Io(_) | E::Tls(_) | E::PoolTimedOut | E::PoolClosed | E::WorkerCrashed | E::BeginFailed => {
                Self::Unreachable(error.into())
            }
            E::Configuration(_) => Self::Misconfigured(error.into()),
            E::ColumnDecode { ref index, .. } => {
                Self::Unreadable { what: format!("a value in column {index}"), source: error.into() }
            }
            _ => Self::Internal(error.into()),
        }
    }
}

/// Sorts an error by its SQLSTATE (PostgreSQL manual, appendix A).
fn from_database(error: Box<dyn DatabaseError>) -> CatalogError {
    let code = error.code().unwrap_or_default().into_owned();
    let rule = error.constraint().unwrap_or(error.message()).to_owned();
    let source: Source = error.into_error();
    match code.as_str() {
        // Serialization failure, deadlock, lock not available, statement timeout.
        "40001" | "40P01" | "55P03" | "57014" => CatalogError::Contended(source),
        // Admin or crash shutdown, starting up, connection or resource trouble.
        "57P01" | "57P02" | "57P03" => CatalogError::Unreachable(source),
        // The role or the database is not there.
        "3D000" => CatalogError::Misconfigured(source),
        // Undefined column, object, function, table.
        "42703" | "42704" | "42883" | "42P01" => CatalogError::NotMigrated(source),
        _ => match code.get(..2) {
            Some("08" | "53") => CatalogError::Unreachable(source),
            Some("28") => CatalogError::Misconfigured(source),
            Some("23") => CatalogError::Refused { rule, source },
            _ => CatalogError::Internal(source),
        },
    }
}

impl From<sqlx::migrate::MigrateError> for CatalogError {
    fn from(error: sqlx::migrate::MigrateError) -> Self {
        use sqlx::migrate::MigrateError as M;
        match error {
            M::Execute(error) => error.into(),
            M::VersionMissing(_) | M::VersionMismatch(_) | M::Dirty(_) => Self::NotMigrated(error.into()),
            other => Self::Internal(other.into()),
        }
    }
}
