//! The models that jobs may name, each with its licence and the digest of its weights.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sqlx::types::Json;

use super::connection::PgCatalog;
use super::error::CatalogError;
use crate::id::{LicenceId, ModelId};
use crate::job_spec::SpecDefaults;
use crate::model_name::ModelName;
use crate::sha256::Sha256Digest;
use crate::state::NoiseScheduler;

/// One file of a model.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ModelComponent {
    /// Its path below the model's folder, with `/`.
    pub path: String,
    /// Its digest.
    pub sha256: Sha256Digest,
    /// Its size in bytes.
    pub size_bytes: u64,
}

/// A model to register.
#[derive(Clone, Debug)]
pub struct NewModel {
    /// The name that `submit` and the queues will use.
    pub name: ModelName,
    /// Where its files lie, as workers see it.
    pub folder: String,
    /// Its files.
    pub components: Vec<ModelComponent>,
    /// What people call its licence: "CreativeML OpenRAIL-M".
    pub licence_name: String,
    /// The whole licence text.
    pub licence_text: String,
    /// The width of a job that names none, in pixels.
    pub default_width: u32,
    /// The height of a job that names none, in pixels.
    pub default_height: u32,
    /// The noise scheduler of a job that names none.
    pub default_noise_scheduler: NoiseScheduler,
}

impl NewModel {
    /// One digest for all weights: over the components' digests and paths, sorted by path, one a line.
    pub fn weights_sha256(&self) -> Sha256Digest {
        let mut lines: Vec<String> = self
            .components
            .iter()
            .map(|component| format!("{} {}\n", component.path, component.sha256))
            .collect();
        lines.sort();
        Sha256Digest::of(lines.concat().as_bytes())
    }
}

/// A registered model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, sqlx::FromRow)]
pub struct Model {
    /// Its id.
    pub model_id: ModelId,
    /// Its name.
    pub name: ModelName,
    /// Its kind; `stable-diffusion-v1` is the only one so far.
    pub kind: String,
    /// Where its files lie.
    pub folder: String,
    /// Its licence.
    pub licence_id: LicenceId,
    /// One digest for all its weights.
    pub weights_sha256: Sha256Digest,
    /// Its files.
    #[sqlx(json)]
    pub components: Vec<ModelComponent>,
    /// The width of a job that names none, in pixels.
    #[sqlx(try_from = "i32")]
    pub default_width: u32,
    /// The height of a job that names none, in pixels.
    #[sqlx(try_from = "i32")]
    pub default_height: u32,
    /// The noise scheduler of a job that names none.
    pub default_noise_scheduler: NoiseScheduler,
    /// When it was registered.
    pub registered_at: DateTime<Utc>,
}

impl Model {
    /// What a job of this model gets where its spec says nothing.
    pub fn spec_defaults(&self) -> SpecDefaults {
        SpecDefaults::of_model(self.default_width, self.default_height, self.default_noise_scheduler)
    }
}

/// What [`PgCatalog::add_model`] found or made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddedModel {
    /// The model's row.
    pub model: Model,
    /// Whether it was registered before.
    pub was_known: bool,
}

/// Why a model was not registered.
#[derive(Debug, thiserror::Error)]
pub enum AddModelError {
    /// The name belongs to other weights.
    #[error(
        "the name `{name}` belongs to a model with other weights (registered {registered}, given {given})\n\
         hint: register these under another name"
    )]
    OtherWeights {
        /// The name.
        name: ModelName,
        /// The digest of the registered weights.
        registered: Sha256Digest,
        /// The digest of the weights that were given.
        given: Sha256Digest,
    },
    /// The model is registered with another licence text.
    #[error(
        "model `{name}` is registered with another licence text (registered {registered}, given {given})\n\
         hint: register it under another name, so that its users accept the new text"
    )]
    OtherLicence {
        /// The name.
        name: ModelName,
        /// The digest of the registered text.
        registered: Sha256Digest,
        /// The digest of the text that was given.
        given: Sha256Digest,
    },
    /// The catalog failed.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
}

impl From<sqlx::Error> for AddModelError {
    fn from(error: sqlx::Error) -> Self {
        Self::Catalog(error.into())
    }
}

impl PgCatalog {
    /// Registers a model and its licence text. Registering the same again changes nothing but the folder.
    ///
    /// # Errors
    /// When the name belongs to other weights or another licence text, and when Postgres fails.
    pub async fn add_model(&self, new: &NewModel) -> Result<AddedModel, AddModelError> {
        let mut transaction = self.pool.begin().await?;
        let licence_sha256 = Sha256Digest::of(new.licence_text.as_bytes());
        sqlx::query(
            "INSERT INTO licences (licence_id, name, text, text_sha256, byte_length)
             VALUES ($1, $2, $3, $4, octet_length($3)) ON CONFLICT (text_sha256) DO NOTHING",
        )
        .bind(LicenceId::generate())
        .bind(&new.licence_name)
        .bind(&new.licence_text)
        .bind(licence_sha256)
        .execute(&mut *transaction)
        .await?;
        let inserted = sqlx::query(
            "INSERT INTO models (model_id, name, folder, licence_id, weights_sha256, components,
                                 default_width, default_height, default_noise_scheduler)
             SELECT $1, $2, $3, licence_id, $5, $6, $7, $8, $9 FROM licences WHERE text_sha256 = $4
             ON CONFLICT (name) DO NOTHING",
        )
        .bind(ModelId::generate())
        .bind(&new.name)
        .bind(&new.folder)
        .bind(licence_sha256)
        .bind(new.weights_sha256())
        .bind(Json(&new.components))
        .bind(i64::from(new.default_width))
        .bind(i64::from(new.default_height))
        .bind(new.default_noise_scheduler)
        .execute(&mut *transaction)
        .await?;
        let model: Model = sqlx::query_as("SELECT * FROM models WHERE name = $1 FOR UPDATE")
            .bind(&new.name)
            .fetch_one(&mut *transaction)
            .await?;
        let registered: Sha256Digest =
            sqlx::query_scalar("SELECT text_sha256 FROM licences WHERE licence_id = $1")
                .bind(model.licence_id)
                .fetch_one(&mut *transaction)
                .await?;
        let name = || new.name.clone();
        if model.weights_sha256 != new.weights_sha256() {
            let (registered, given) = (model.weights_sha256, new.weights_sha256());
            return Err(AddModelError::OtherWeights { name: name(), registered, given });
        }
        if registered != licence_sha256 {
            return Err(AddModelError::OtherLicence { name: name(), registered, given: licence_sha256 });
        }
        let model = sqlx::query_as("UPDATE models SET folder = $2 WHERE model_id = $1 RETURNING *")
            .bind(model.model_id)
            .bind(&new.folder)
            .fetch_one(&mut *transaction)
            .await?;
        transaction.commit().await?;
        Ok(AddedModel { model, was_known: inserted.rows_affected() == 0 })
    }

    /// All registered models, by name.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn models(&self) -> Result<Vec<Model>, CatalogError> {
        Ok(sqlx::query_as("SELECT * FROM models ORDER BY name").fetch_all(&self.pool).await?)
    }

    /// The model called `name`, if it is registered.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn model_by_name(&self, name: &ModelName) -> Result<Option<Model>, CatalogError> {
        Ok(sqlx::query_as("SELECT * FROM models WHERE name = $1")
            .bind(name)
            .fetch_optional(&self.pool)
            .await?)
    }
}
