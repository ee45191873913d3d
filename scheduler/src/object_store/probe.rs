//! What only `darkroom doctor` and the reconcilers ask of S3: how it answers a PUT, and what time it has.
use aws_sdk_s3::error::SdkError;
use aws_sdk_s3::primitives::ByteStream;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use chrono::{DateTime, Utc};
use schema::Sha256Digest;

use super::{S3ObjectStore, StoreError, failed};

/// What a store said to a PUT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PutAnswer {
    /// It took the object.
    Stored,
    /// It refused, with this HTTP status.
    Refused(u16),
}

impl S3ObjectStore {
    /// PUTs `bytes` as a worker does, claiming that `sha256` is their digest.
    ///
    /// # Errors
    /// If the store cannot be asked.
    pub async fn put_if_absent(
        &self,
        bucket: &str,
        key: &str,
        bytes: &[u8],
        sha256: &Sha256Digest,
    ) -> Result<PutAnswer, StoreError> {
        let request = self.client.put_object().bucket(bucket).key(key).if_none_match("*");
        let request = request.checksum_sha256(STANDARD.encode(sha256.as_bytes()));
        match request.body(ByteStream::from(bytes.to_vec())).send().await {
            Ok(_) => Ok(PutAnswer::Stored),
            Err(SdkError::ServiceError(refused)) => Ok(PutAnswer::Refused(refused.raw().status().as_u16())),
            Err(error) => Err(failed(bucket, &error)),
        }
    }

    /// The store's clock, from the `Date` of its answer to a question about an object that is not there; `None` if it
    /// does not say.
    pub async fn clock(&self, bucket: &str) -> Option<DateTime<Utc>> {
        // A name that nobody uses. Any refusal will do, and the SDK shows headers of refusals alone.
        let key = format!("darkroom-doctor/{}", uuid::Uuid::now_v7());
        let refused = self.client.head_object().bucket(bucket).key(key).send().await.err()?;
        let date = refused.raw_response()?.headers().get("date")?;
        Some(DateTime::parse_from_rfc2822(date).ok()?.to_utc())
    }
}
