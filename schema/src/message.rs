//! The message on the wire: "look at job X", and which microbatch it would suit.
//!
//! It carries no prompt: prompts are personal data and the claimed row decides anyhow, so a stale or doubled message
//! is harmless. The trace context travels beside it, in the AMQP header [`TRACEPARENT_HEADER`](crate::TRACEPARENT_HEADER).

use serde::{Deserialize, Serialize};

use crate::id::JobId;
use crate::microbatch_key::MicrobatchKey;

/// The version that this build writes and reads.
const VERSION: u32 = 1;
/// The longest message that is read; ours have about 120 bytes.
const MAX_LENGTH: usize = 1024;

/// One job's message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JobMessage {
    /// The job to look at.
    pub job_id: JobId,
    /// What it may share a forward pass with.
    pub microbatch_key: MicrobatchKey,
    /// The most jobs that it may share a microbatch with, itself included; `None` for as many as fit. A build that does not
    /// know the field ignores it, and the claimed row decides.
    pub microbatch_limit: Option<u32>,
}

/// A message that nobody can read; it belongs among the dead letters.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The message is longer than any of ours.
    #[error("a job message has at most {MAX_LENGTH} bytes, but this one has {length}")]
    TooLong {
        /// Its length in bytes.
        length: usize,
    },
    /// The message has a version that this build does not know.
    #[error("this build reads job messages of version {VERSION}, but this one has version {version}")]
    UnknownVersion {
        /// The version it names.
        version: u32,
    },
    /// The message is not JSON, or lacks a field.
    #[error("not a job message")]
    Malformed(#[source] serde_json::Error),
}

#[derive(Serialize, Deserialize)]
struct Versioned {
    version: u32,
}

#[derive(Serialize, Deserialize)]
struct V1 {
    version: u32,
    job_id: JobId,
    microbatch_key: MicrobatchKey,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    microbatch_limit: Option<u32>,
}

impl JobMessage {
    /// The message as JSON, in at most 1,024 bytes.
    pub fn encode(&self) -> Vec<u8> {
        let Self { job_id, microbatch_key, microbatch_limit } = *self;
        serde_json::to_vec(&V1 { version: VERSION, job_id, microbatch_key, microbatch_limit })
            .expect("two strings and a number always serialize")
    }

    /// Reads a message.
    ///
    /// # Errors
    /// When it is too long, of an unknown version, or malformed.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        if bytes.len() > MAX_LENGTH {
            return Err(DecodeError::TooLong { length: bytes.len() });
        }
        // The version first: another version may have other fields.
        let Versioned { version } = serde_json::from_slice(bytes).map_err(DecodeError::Malformed)?;
        if version != VERSION {
            return Err(DecodeError::UnknownVersion { version });
        }
        let V1 { job_id, microbatch_key, microbatch_limit, .. } =
            serde_json::from_slice(bytes).map_err(DecodeError::Malformed)?;
        Ok(Self { job_id, microbatch_key, microbatch_limit })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::id::BatchId;

    fn message() -> JobMessage {
        let batch_id: BatchId = "0190f5fe-7c00-7a00-8000-000000000001".parse().unwrap();
        let microbatch_key = "512x512/50/pndm/cfg".parse().unwrap();
        JobMessage { job_id: JobId::of(batch_id, 0), microbatch_key, microbatch_limit: None }
    }

    #[test]
    fn only_a_suspect_carries_a_limit() {
        let suspect = JobMessage { microbatch_limit: Some(2), ..message() };
        assert_eq!(JobMessage::decode(&suspect.encode()).unwrap(), suspect);
        assert!(!String::from_utf8(message().encode()).unwrap().contains("limit"));
    }

    #[test]
    fn version_1_looks_like_this() {
        insta::assert_snapshot!(String::from_utf8(message().encode()).unwrap(), @r#"{"version":1,"job_id":"18e2d600-1338-5e33-8ec4-383ff772c9ab","microbatch_key":"512x512/50/pndm/cfg"}"#);
        assert_eq!(JobMessage::decode(&message().encode()).unwrap(), message());
    }

    #[test]
    fn a_later_minor_field_is_ignored_and_a_later_version_is_not() {
        let text = String::from_utf8(message().encode()).unwrap();
        let with_more = text.replacen('{', r#"{"note":"new","#, 1);
        assert_eq!(JobMessage::decode(with_more.as_bytes()).unwrap(), message());
        let later = text.replace(r#""version":1"#, r#""version":2"#);
        insta::assert_snapshot!(JobMessage::decode(later.as_bytes()).unwrap_err(), @"this build reads job messages of version 1, but this one has version 2");
    }

    #[test]
    fn garbage_is_refused_with_a_reason() {
        for bad in [
            "",
            "{}",
            "null",
            "\u{0}",
            r#"{"version":1}"#,
            r#"{"version":-1}"#,
            r#"{"version":1,"job_id":1}"#,
        ] {
            assert!(matches!(JobMessage::decode(bad.as_bytes()), Err(DecodeError::Malformed(_))), "{bad:?}");
        }
        let long = vec![b' '; MAX_LENGTH + 1];
        insta::assert_snapshot!(JobMessage::decode(&long).unwrap_err(), @"a job message has at most 1024 bytes, but this one has 1025");
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes: Vec<u8>) {
            let _ = JobMessage::decode(&bytes);
        }
    }
}
