//! The wall towards S3, and the only file that knows the S3 SDK.
//!
//! Objects are written once and never changed: the key holds part of the picture's own digest and `If-None-Match: *` goes
//! with each PUT. Correctness does not lean on the condition (some servers race or ignore it): two writers of one key
//! write equal bytes, and the catalog's row says which object counts.

use std::future::Future;
use std::time::Duration;

use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::error::SdkError;
use aws_sdk_s3::operation::put_object::PutObjectError;
use aws_sdk_s3::primitives::ByteStream;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use schema::{ObjectKey, Sha256Digest};
use tracing::warn;

/// What the SDK said.
type Source = Box<dyn std::error::Error + Send + Sync>;

/// Tries of one request within the SDK, with its own jittered backoff; the completer tries longer around it.
const SDK_ATTEMPTS: u32 = 3;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// For one try of a request. A picture of 2048×1024 is 6 MB; anything slower than that in this time is an outage.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(60);
/// What a 412 means when only the condition can fail.
const PRECONDITION_FAILED: u16 = 412;
/// What older MinIO answers in place of 412.
const NOT_MODIFIED: u16 = 304;

/// How an object came to be in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// We wrote it.
    Written,
    /// It was there, with the right size: an earlier run of the same job wrote it.
    AlreadyThere,
}

/// Why an object could not be stored.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The store cannot be reached, is overloaded, or failed; waiting may help.
    #[error("the object store cannot take `{key}` now")]
    Unavailable {
        /// The object.
        key: ObjectKey,
        /// The SDK's words.
        source: Source,
    },
    /// The store refuses: credentials, permissions or a missing bucket. A person can help while we wait.
    #[error("the object store refuses `{key}`")]
    Refused {
        /// The object.
        key: ObjectKey,
        /// The SDK's words.
        source: Source,
    },
    /// Under this key lies an object of another size, and it could not be replaced.
    #[error("the object `{key}` should have {expected} bytes but has {found}")]
    Mismatch {
        /// The object.
        key: ObjectKey,
        /// Its size as it should be.
        expected: usize,
        /// Its size as the store tells it.
        found: i64,
    },
}

/// Where pictures are kept.
pub trait ObjectStore: Send + Sync + 'static {
    /// The bucket that all keys are in.
    fn bucket(&self) -> &str;

    /// Stores a PNG under its content-addressed key. Once it returns `Ok`, the object exists with these bytes' size.
    fn put_if_absent(
        &self,
        key: &ObjectKey,
        bytes: &[u8],
        sha256: &Sha256Digest,
    ) -> impl Future<Output = Result<Stored, StoreError>> + Send;
}

/// A bucket reached by the S3 protocol.
#[derive(Debug, Clone)]
pub struct S3ObjectStore {
    client: aws_sdk_s3::Client,
    bucket: String,
}

/// Where the bucket's name stands in a request's URL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Addressing {
    /// `https://bucket.host/key`, as Amazon wants it.
    ByHost,
    /// `https://host/bucket/key`, for servers whose name has no subdomains, such as `127.0.0.1`.
    ByPath,
}

/// Whether a PUT may replace what is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Overwrite {
    Refuse,
    Allow,
}

impl S3ObjectStore {
    /// The bucket, with endpoint, credentials, region and the rest from the standard AWS environment. Nothing is sent yet.
    pub async fn connect(bucket: String, addressing: Addressing) -> Self {
        let environment = aws_config::load_defaults(aws_config::BehaviorVersion::latest()).await;
        let config = aws_sdk_s3::config::Builder::from(&environment)
            .force_path_style(addressing == Addressing::ByPath)
            .retry_config(RetryConfig::standard().with_max_attempts(SDK_ATTEMPTS))
            .timeout_config(
                TimeoutConfig::builder()
                    .connect_timeout(CONNECT_TIMEOUT)
                    .operation_attempt_timeout(ATTEMPT_TIMEOUT)
                    .build(),
            )
            .build();
        Self { client: aws_sdk_s3::Client::from_conf(config), bucket }
    }

    async fn put(
        &self,
        key: &ObjectKey,
        bytes: &[u8],
        sha256: &Sha256Digest,
        overwrite: Overwrite,
    ) -> Result<(), SdkError<PutObjectError>> {
        let request = self
            .client
            .put_object()
            .bucket(&self.bucket)
            .key(key.to_string())
            .content_type("image/png")
            .checksum_sha256(STANDARD.encode(sha256.as_bytes()))
            .body(ByteStream::from(bytes.to_vec()));
        let request = match overwrite {
            Overwrite::Refuse => request.if_none_match("*"),
            Overwrite::Allow => request,
        };
        request.send().await.map(drop)
    }

    /// The size of an object that is there.
    async fn size(&self, key: &ObjectKey) -> Result<i64, StoreError> {
        let head = self.client.head_object().bucket(&self.bucket).key(key.to_string()).send().await;
        let head = head.map_err(|error| store_error(key, error))?;
        Ok(head.content_length().unwrap_or_default())
    }
}

impl ObjectStore for S3ObjectStore {
    fn bucket(&self) -> &str {
        &self.bucket
    }

    async fn put_if_absent(
        &self,
        key: &ObjectKey,
        bytes: &[u8],
        sha256: &Sha256Digest,
    ) -> Result<Stored, StoreError> {
        match self.put(key, bytes, sha256, Overwrite::Refuse).await {
            Ok(()) => return Ok(Stored::Written),
            Err(error) if is_already_there(&error) => {}
            Err(error) => return Err(store_error(key, error)),
        }
        let found = self.size(key).await?;
        if i64::try_from(bytes.len()).is_ok_and(|expected| expected == found) {
            return Ok(Stored::AlreadyThere);
        }
        // The key names these bytes, so an object of another size is the rest of a broken upload: replace it.
        warn!(image.key = %key, size_bytes = bytes.len(), found, "Replacing an object of the wrong size");
        match self.put(key, bytes, sha256, Overwrite::Allow).await {
            Ok(()) => Ok(Stored::Written),
            Err(error) if is_already_there(&error) => {
                Err(StoreError::Mismatch { key: key.clone(), expected: bytes.len(), found })
            }
            Err(error) => Err(store_error(key, error)),
        }
    }
}

fn is_already_there(error: &SdkError<PutObjectError>) -> bool {
    let status = error.raw_response().map(|response| response.status().as_u16());
    matches!(status, Some(PRECONDITION_FAILED | NOT_MODIFIED))
}

/// 4xx means that the store understood and refuses; all else, and 4xx codes that ask for another try, is an outage.
fn store_error<E>(key: &ObjectKey, error: SdkError<E>) -> StoreError
where
    E: std::error::Error + Send + Sync + 'static,
{
    const REQUEST_TIMEOUT: u16 = 408;
    const CONFLICT: u16 = 409;
    const TOO_MANY_REQUESTS: u16 = 429;
    let status = error.raw_response().map(|response| response.status().as_u16());
    let refused = match (&error, status) {
        (_, Some(REQUEST_TIMEOUT | CONFLICT | TOO_MANY_REQUESTS)) => false,
        (SdkError::ServiceError(_), Some(400..=499)) => true,
        (SdkError::ConstructionFailure(_), _) => true,
        _ => false,
    };
    let (key, source) = (key.clone(), Source::from(error));
    if refused { StoreError::Refused { key, source } } else { StoreError::Unavailable { key, source } }
}
