//! Licence texts and who accepted them. An acceptance is of one exact text, told by its digest.

use chrono::{DateTime, Utc};
use serde::Serialize;

use super::connection::PgCatalog;
use super::error::CatalogError;
use crate::id::{AcceptanceId, LicenceId};
use crate::model_name::ModelName;
use crate::sha256::Sha256Digest;

/// A licence text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, sqlx::FromRow)]
pub struct Licence {
    /// Its id.
    pub licence_id: LicenceId,
    /// What people call it.
    pub name: String,
    /// The whole text.
    pub text: String,
    /// The digest of the text.
    pub text_sha256: Sha256Digest,
    /// When it was registered.
    pub registered_at: DateTime<Utc>,
}

/// One principal's acceptance of one licence text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, sqlx::FromRow)]
pub struct Acceptance {
    /// Its id.
    pub acceptance_id: AcceptanceId,
    /// The licence.
    pub licence_id: LicenceId,
    /// Who accepted.
    pub principal: String,
    /// When.
    pub accepted_at: DateTime<Utc>,
    /// When it was taken back, if it was.
    pub revoked_at: Option<DateTime<Utc>>,
    /// How it was given: `cli`.
    pub method: String,
    /// The sentence that was agreed to.
    pub statement: String,
}

impl PgCatalog {
    /// The licence of the model called `model`, if that is registered.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn licence_of_model(&self, model: &ModelName) -> Result<Option<Licence>, CatalogError> {
        let sql = "SELECT licences.* FROM licences JOIN models USING (licence_id) WHERE models.name = $1";
        Ok(sqlx::query_as(sql).bind(model).fetch_optional(&self.pool).await?)
    }

    /// Records that `principal` accepts licence `licence_id`. An acceptance that is still valid is kept and returned.
    ///
    /// # Errors
    /// When there is no such licence, when a text is empty, and when Postgres fails.
    pub async fn accept_licence(
        &self,
        principal: &str,
        licence_id: LicenceId,
        method: &str,
        statement: &str,
    ) -> Result<Acceptance, CatalogError> {
        // The update that changes nothing makes a conflicting row come back like a new one, in one statement.
        let sql = "
            INSERT INTO licence_acceptances AS known (acceptance_id, licence_id, principal, method, statement)
            VALUES ($1, $2, $3, $4, $5)
            ON CONFLICT (licence_id, principal) WHERE revoked_at IS NULL DO UPDATE SET principal = known.principal
            RETURNING *";
        let query = sqlx::query_as(sql).bind(AcceptanceId::generate()).bind(licence_id);
        Ok(query.bind(principal).bind(method).bind(statement).fetch_one(&self.pool).await?)
    }

    /// The acceptance of licence `licence_id` by `principal` that is valid now, if there is one.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn valid_acceptance(
        &self,
        principal: &str,
        licence_id: LicenceId,
    ) -> Result<Option<Acceptance>, CatalogError> {
        let sql = "SELECT * FROM licence_acceptances
                   WHERE principal = $1 AND licence_id = $2 AND revoked_at IS NULL";
        Ok(sqlx::query_as(sql).bind(principal).bind(licence_id).fetch_optional(&self.pool).await?)
    }

    /// Takes `principal`'s acceptance of licence `licence_id` back, if there is a valid one. Batches that were
    /// submitted under it keep it.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn revoke_acceptance_if_valid(
        &self,
        principal: &str,
        licence_id: LicenceId,
    ) -> Result<Option<Acceptance>, CatalogError> {
        // The row first, then the time: a submission that this waits for began earlier than its revocation.
        let sql = "
            WITH valid AS (
                SELECT acceptance_id FROM licence_acceptances
                WHERE principal = $1 AND licence_id = $2 AND revoked_at IS NULL
                FOR NO KEY UPDATE
            )
            UPDATE licence_acceptances AS known SET revoked_at = clock_timestamp()
            FROM valid WHERE known.acceptance_id = valid.acceptance_id RETURNING known.*";
        Ok(sqlx::query_as(sql).bind(principal).bind(licence_id).fetch_optional(&self.pool).await?)
    }
}
