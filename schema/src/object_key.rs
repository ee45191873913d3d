//! Where a picture lies in the bucket.
//!
//! The key holds part of the picture's own digest, so two writers of one job with different pixels write two
//! objects and neither overwrites the other; the image row says which one counts.

use std::fmt;
use std::str::FromStr;

use crate::id::BatchId;
use crate::sha256::Sha256Digest;

/// The first path segment; a new layout gets a new one.
const LAYOUT: &str = "v1";
/// Hexadecimal digits of the digest in a key: 64 bits, plenty among the few objects of one job.
const DIGEST_DIGITS: usize = 16;

/// A picture's object key: `v1/<batch_id>/<ordinal, 8 digits>-<first 16 digits of its SHA-256>.png`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ObjectKey {
    batch_id: BatchId,
    ordinal: u32,
    digest_prefix: String,
}

/// Text that is not an object key of ours.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an object key looks like `{LAYOUT}/<batch id>/00000042-0123456789abcdef.png`, but this is `{text}`")]
pub struct ObjectKeyError {
    /// What was read, cut to 120 characters.
    pub text: String,
}

impl ObjectKey {
    /// The key of the picture with digest `sha256`, made for the job at `ordinal` of batch `batch_id`.
    pub fn new(batch_id: BatchId, ordinal: u32, sha256: &Sha256Digest) -> Self {
        let mut digest_prefix = sha256.to_string();
        digest_prefix.truncate(DIGEST_DIGITS);
        Self { batch_id, ordinal, digest_prefix }
    }

    /// What all keys of batch `batch_id`, and no others, start with.
    pub fn batch_prefix(batch_id: BatchId) -> String {
        format!("{LAYOUT}/{batch_id}/")
    }

    /// What all keys of this layout start with.
    pub fn layout_prefix() -> String {
        format!("{LAYOUT}/")
    }

    /// The batch that the picture belongs to.
    pub fn batch_id(&self) -> BatchId {
        self.batch_id
    }

    /// The job's place in its batch.
    pub fn ordinal(&self) -> u32 {
        self.ordinal
    }

    /// Whether this key's digest part agrees with `sha256`.
    pub fn agrees_with(&self, sha256: &Sha256Digest) -> bool {
        sha256.to_string().starts_with(&self.digest_prefix)
    }

    /// The last path segment: the name for a picture's copy on disk.
    pub fn file_name(&self) -> String {
        format!("{:08}-{}.png", self.ordinal, self.digest_prefix)
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{LAYOUT}/{}/{}", self.batch_id, self.file_name())
    }
}

impl FromStr for ObjectKey {
    type Err = ObjectKeyError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // Only the canonical spelling is a key: one object, one name.
        parse(text)
            .filter(|key| key.to_string() == text)
            .ok_or_else(|| ObjectKeyError { text: text.chars().take(120).collect() })
    }
}

fn parse(text: &str) -> Option<ObjectKey> {
    let mut segments = text.split('/');
    let (layout, batch_id, file) = (segments.next()?, segments.next()?, segments.next()?);
    let (ordinal, digest) = file.strip_suffix(".png")?.split_once('-')?;
    let well_formed = layout == LAYOUT
        && segments.next().is_none()
        && digest.len() == DIGEST_DIGITS
        && digest.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let key = ObjectKey {
        batch_id: batch_id.parse().ok()?,
        ordinal: ordinal.parse().ok()?,
        digest_prefix: digest.into(),
    };
    well_formed.then_some(key)
}

impl TryFrom<String> for ObjectKey {
    type Error = ObjectKeyError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<ObjectKey> for String {
    fn from(key: ObjectKey) -> Self {
        key.to_string()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn batch_id() -> BatchId {
        "0190f5fe-7c00-7a00-8000-000000000001".parse().unwrap()
    }

    #[test]
    fn a_key_shows_batch_ordinal_and_digest() {
        let digest = Sha256Digest::of(b"abc");
        let key = ObjectKey::new(batch_id(), 42, &digest);
        insta::assert_snapshot!(key, @"v1/0190f5fe-7c00-7a00-8000-000000000001/00000042-ba7816bf8f01cfea.png");
        assert!(key.agrees_with(&digest));
        assert!(!key.agrees_with(&Sha256Digest::of(b"abd")));
        assert!(key.to_string().starts_with(&ObjectKey::batch_prefix(batch_id())));
    }

    #[test]
    fn only_the_canonical_spelling_is_a_key() {
        let good = ObjectKey::new(batch_id(), 42, &Sha256Digest::of(b"abc")).to_string();
        for bad in [
            good.replace("v1", "v2"),
            good.replace("00000042", "42"),
            good.replace(".png", ".PNG"),
            good.replace("0190f5fe", "0190F5FE"),
            good.replacen('/', "//", 1),
            format!("{good}/x"),
            format!("/{good}"),
            good.replace("ba7816bf8f01cfea", "ba7816bf8f01cfe"),
        ] {
            assert!(bad.parse::<ObjectKey>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn keys_round_trip_through_text(ordinal: u32, bytes: Vec<u8>) {
            let key = ObjectKey::new(batch_id(), ordinal, &Sha256Digest::of(&bytes));
            prop_assert_eq!(key.to_string().parse(), Ok(key));
        }

        #[test]
        fn no_text_makes_the_parser_panic(text: String) {
            let _ = text.parse::<ObjectKey>();
        }
    }
}
