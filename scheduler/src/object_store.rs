//! S3 behind the [`ObjectStore`] wall; the only room that knows the SDK.
#[cfg(test)]
#[expect(missing_docs, reason = "the names of a test's stand-ins say what they do")]
pub mod fakes;
mod probe;

use std::future::Future;
use std::time::Duration;

use aws_config::BehaviorVersion;
use aws_config::timeout::TimeoutConfig;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::{Builder, Credentials, Region};
use aws_sdk_s3::error::{DisplayErrorContext, SdkError};
use aws_sdk_s3::operation::get_object::GetObjectError;
use aws_sdk_s3::operation::head_object::HeadObjectError;
use aws_sdk_s3::types::ChecksumMode;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use chrono::{DateTime, Utc};
pub use probe::PutAnswer;
use schema::Sha256Digest;
use secrecy::ExposeSecret;

use crate::config::{S3Access, S3Settings};

/// One attempt to read a picture of some megabytes over a slow line.
const ATTEMPT_LIMIT: Duration = Duration::from_secs(60);

/// Why the store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no such object.
    #[error("the bucket `{bucket}` holds no object `{key}`")]
    NotFound {
        /// The bucket.
        bucket: String,
        /// The object's key.
        key: String,
    },
    /// The store cannot be asked, or refuses.
    #[error("the bucket `{bucket}` cannot be used: {reason}")]
    Failed {
        /// The bucket.
        bucket: String,
        /// The SDK's error with its causes; it has no good text of its own.
        reason: String,
    },
}

/// What a store tells of an object without sending it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ObjectHead {
    /// Its size.
    pub size_bytes: u64,
    /// Its digest, if the store keeps it and this object was stored with one.
    pub sha256: Option<Sha256Digest>,
}

/// One object of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedObject {
    /// Its key.
    pub key: String,
    /// Its size.
    pub size_bytes: u64,
    /// When it was written, by the store's clock.
    pub last_modified: Option<DateTime<Utc>>,
}

/// A page of a listing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListPage {
    /// Its objects, in the order of their keys.
    pub objects: Vec<ListedObject>,
    /// How to ask for the next page; `None` after the last.
    pub next: Option<String>,
}

/// A store of pictures.
pub trait ObjectStore: Send + Sync {
    /// The bytes of the object `key` in `bucket`.
    fn get(&self, bucket: &str, key: &str) -> impl Future<Output = Result<Vec<u8>, StoreError>> + Send;

    /// Size and digest of the object `key` in `bucket`.
    fn head(&self, bucket: &str, key: &str) -> impl Future<Output = Result<ObjectHead, StoreError>> + Send;

    /// The first page of the objects in `bucket` whose keys start with `prefix`, or the page that an earlier one calls
    /// its `next`.
    fn list(
        &self,
        bucket: &str,
        prefix: &str,
        page: Option<&str>,
    ) -> impl Future<Output = Result<ListPage, StoreError>> + Send;

    /// Removes the object `key` from `bucket`; one that is not there is no error.
    fn delete(&self, bucket: &str, key: &str) -> impl Future<Output = Result<(), StoreError>> + Send;
}

/// S3, or a server that speaks like it.
#[derive(Clone, Debug)]
pub struct S3ObjectStore {
    client: Client,
}

impl S3ObjectStore {
    /// A client for `settings`. Asks nobody anything yet.
    pub async fn new(settings: &S3Settings) -> Self {
        let timeouts = TimeoutConfig::builder()
            .connect_timeout(Duration::from_secs(10))
            .operation_attempt_timeout(ATTEMPT_LIMIT)
            .build();
        let defaults = aws_config::defaults(BehaviorVersion::latest()).timeout_config(timeouts);
        let client = match &settings.access {
            S3Access::Environment { custom_endpoint } => {
                let shared = defaults.load().await;
                // Other servers than Amazon's seldom resolve `bucket.host`.
                Client::from_conf(Builder::from(&shared).force_path_style(*custom_endpoint).build())
            }
            S3Access::LocalStack { endpoint_url, region, access_key_id, secret_access_key } => {
                let secret = secret_access_key.expose_secret();
                let credentials = Credentials::new(access_key_id, secret, None, None, "darkroom local stack");
                let shared = defaults
                    .endpoint_url(endpoint_url)
                    .region(Region::new(region.clone()))
                    .credentials_provider(credentials)
                    .load()
                    .await;
                Client::from_conf(Builder::from(&shared).force_path_style(true).build())
            }
        };
        Self { client }
    }
}

impl ObjectStore for S3ObjectStore {
    async fn get(&self, bucket: &str, key: &str) -> Result<Vec<u8>, StoreError> {
        let output = match self.client.get_object().bucket(bucket).key(key).send().await {
            Ok(output) => output,
            Err(SdkError::ServiceError(error)) if matches!(error.err(), GetObjectError::NoSuchKey(_)) => {
                return Err(StoreError::NotFound { bucket: bucket.to_owned(), key: key.to_owned() });
            }
            Err(error) => return Err(failed(bucket, &error)),
        };
        let bytes = output.body.collect().await.map_err(|error| failed(bucket, &error))?;
        Ok(bytes.to_vec())
    }

    async fn head(&self, bucket: &str, key: &str) -> Result<ObjectHead, StoreError> {
        let request = self.client.head_object().bucket(bucket).key(key).checksum_mode(ChecksumMode::Enabled);
        match request.send().await {
            Ok(head) => Ok(ObjectHead {
                size_bytes: size(head.content_length()),
                sha256: head.checksum_sha256().and_then(digest),
            }),
            Err(SdkError::ServiceError(error)) if matches!(error.err(), HeadObjectError::NotFound(_)) => {
                Err(StoreError::NotFound { bucket: bucket.to_owned(), key: key.to_owned() })
            }
            Err(error) => Err(failed(bucket, &error)),
        }
    }

    async fn list(&self, bucket: &str, prefix: &str, page: Option<&str>) -> Result<ListPage, StoreError> {
        let request = self.client.list_objects_v2().bucket(bucket).prefix(prefix);
        let request = request.set_continuation_token(page.map(str::to_owned));
        let listed = request.send().await.map_err(|error| failed(bucket, &error))?;
        let objects = listed.contents().iter().filter_map(|object| {
            let last_modified = object
                .last_modified()
                .and_then(|time| DateTime::from_timestamp(time.secs(), time.subsec_nanos()));
            Some(ListedObject {
                key: object.key()?.to_owned(),
                size_bytes: size(object.size()),
                last_modified,
            })
        });
        let objects = objects.collect();
        // A page that says nothing of another is the last, whatever its token says.
        let next = listed
            .is_truncated()
            .unwrap_or(false)
            .then(|| listed.next_continuation_token().map(str::to_owned));
        Ok(ListPage { objects, next: next.flatten() })
    }

    async fn delete(&self, bucket: &str, key: &str) -> Result<(), StoreError> {
        let deleted = self.client.delete_object().bucket(bucket).key(key).send().await;
        deleted.map(drop).map_err(|error| failed(bucket, &error))
    }
}

fn size(told: Option<i64>) -> u64 {
    told.and_then(|size| u64::try_from(size).ok()).unwrap_or_default()
}

/// A checksum header's digest. That of an object uploaded in parts is none, and has a suffix.
fn digest(header: &str) -> Option<Sha256Digest> {
    let bytes: [u8; 32] = STANDARD.decode(header).ok()?.try_into().ok()?;
    Some(bytes.into())
}

fn failed(bucket: &str, error: &(impl std::error::Error + 'static)) -> StoreError {
    StoreError::Failed { bucket: bucket.to_owned(), reason: DisplayErrorContext(error).to_string() }
}
