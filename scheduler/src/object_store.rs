//! S3 behind the [`ObjectStore`] wall; the only file that knows the SDK.
use std::future::Future;
use std::time::Duration;

use aws_config::BehaviorVersion;
use aws_config::timeout::TimeoutConfig;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::{Builder, Credentials, Region};
use aws_sdk_s3::error::{DisplayErrorContext, SdkError};
use aws_sdk_s3::operation::get_object::GetObjectError;
use secrecy::ExposeSecret;

use crate::config::{S3Access, S3Settings};

/// One attempt to read a picture of some megabytes over a slow line.
const ATTEMPT_LIMIT: Duration = Duration::from_secs(60);

/// Why an object could not be read.
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
    #[error("cannot read from the bucket `{bucket}`: {reason}")]
    Failed {
        /// The bucket.
        bucket: String,
        /// The SDK's error with its causes; it has no good text of its own.
        reason: String,
    },
}

/// A store of pictures.
pub trait ObjectStore: Send + Sync {
    /// The bytes of the object `key` in `bucket`.
    fn get(&self, bucket: &str, key: &str) -> impl Future<Output = Result<Vec<u8>, StoreError>> + Send;
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
}

fn failed(bucket: &str, error: &(impl std::error::Error + 'static)) -> StoreError {
    StoreError::Failed { bucket: bucket.to_owned(), reason: DisplayErrorContext(error).to_string() }
}
