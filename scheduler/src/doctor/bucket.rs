//! The bucket: does it refuse what it should, and does it tell what it keeps?
use schema::Sha256Digest;
use uuid::Uuid;

use super::Finding;
use crate::object_store::{ObjectStore, PutAnswer, S3ObjectStore, StoreError};

/// Where probes lie, for the seconds that they do.
const PREFIX: &str = "darkroom-doctor/";
const BYTES: &[u8] = b"darkroom doctor was here";

/// Asks the bucket everything, and removes what that left.
pub async fn examine(store: &S3ObjectStore, bucket: &str) -> Vec<Finding> {
    let id = Uuid::now_v7();
    let (key, wrong_key) = (format!("{PREFIX}{id}"), format!("{PREFIX}{id}-wrong"));
    let mut findings = match probe(store, bucket, &key, &wrong_key).await {
        Ok(findings) => findings,
        Err(error) => {
            let hint =
                "check S3_BUCKET and the AWS variables, and that the key may put, get, list and delete";
            vec![Finding::danger("bucket", error.to_string(), hint)]
        }
    };
    for key in [&key, &wrong_key] {
        if let Err(error) = store.delete(bucket, key).await {
            let hint = format!("delete {key}; `darkroom serve` cannot remove orphans either");
            findings.push(Finding::warning("bucket deletion", error.to_string(), hint));
            break;
        }
    }
    findings
}

async fn probe(
    store: &S3ObjectStore,
    bucket: &str,
    key: &str,
    wrong_key: &str,
) -> Result<Vec<Finding>, StoreError> {
    let mut findings = Vec::new();
    let sha256 = Sha256Digest::of(BYTES);
    let first = store.put_if_absent(bucket, key, BYTES, &sha256).await?;
    let second = store.put_if_absent(bucket, key, BYTES, &sha256).await?;
    findings.push(judge_condition(first, second));
    let other = Sha256Digest::of(b"something else");
    findings.push(match store.put_if_absent(bucket, wrong_key, BYTES, &other).await? {
        PutAnswer::Refused(status) => {
            Finding::ok("bucket checksum", format!("a wrong SHA-256 is refused ({status})"))
        }
        PutAnswer::Stored => Finding::warning(
            "bucket checksum",
            "a wrong SHA-256 is taken: pixels that are damaged on the way are not noticed",
            "use a store that checks x-amz-checksum-sha256, or TLS and `darkroom verify --deep`",
        ),
    });
    let head = store.head(bucket, key).await?;
    findings.push(match head.sha256 {
        _ if head.size_bytes != BYTES.len() as u64 => Finding::danger(
            "bucket metadata",
            format!("an object of {} bytes is said to have {}", BYTES.len(), head.size_bytes),
            "use another store",
        ),
        Some(found) if found == sha256 => {
            Finding::ok("bucket metadata", "the store tells an object's size and SHA-256")
        }
        Some(found) => Finding::danger(
            "bucket metadata",
            format!("an object with the SHA-256 {sha256} is said to have {found}"),
            "use another store",
        ),
        None => Finding::warning(
            "bucket metadata",
            "the store keeps no SHA-256: `verify` and `reconcile` see sizes alone",
            "check pictures with `darkroom verify --deep` now and then",
        ),
    });
    let read = store.get(bucket, key).await?;
    let listed = store.list(bucket, key, None).await?.objects;
    findings.push(if read != BYTES || listed.first().is_none_or(|object| object.key != key) {
        let found = "an object that was stored does not come back, or is not listed at once";
        Finding::danger("bucket consistency", found, "use a store that shows what it has stored")
    } else {
        Finding::ok("bucket consistency", "what was stored is read and listed at once")
    });
    Ok(findings)
}

fn judge_condition(first: PutAnswer, second: PutAnswer) -> Finding {
    const PROBE: &str = "bucket condition";
    match (first, second) {
        (PutAnswer::Refused(status), _) => Finding::danger(
            PROBE,
            format!("a PUT with If-None-Match and a SHA-256 is refused ({status})"),
            "check the key's permissions, and that the store knows conditional writes",
        ),
        // What workers take for "it is there already".
        (PutAnswer::Stored, PutAnswer::Refused(status @ (412 | 304))) => {
            Finding::ok(PROBE, format!("a second PUT of one key is refused ({status})"))
        }
        (PutAnswer::Stored, PutAnswer::Refused(status)) => Finding::danger(
            PROBE,
            format!("a second PUT of one key is refused with {status} in place of 412"),
            "workers would take that for a failing store; use one that answers 412",
        ),
        (PutAnswer::Stored, PutAnswer::Stored) => Finding::warning(
            PROBE,
            "the store ignores If-None-Match: a late twin may write the same bytes again, which does no harm",
            "use a store with conditional writes to save the traffic",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Verdict;

    #[test]
    fn a_store_that_ignores_the_condition_is_a_warning_and_one_that_chokes_on_it_a_danger() {
        use PutAnswer::{Refused, Stored};
        for (first, second, verdict) in [
            (Stored, Refused(412), Verdict::Ok),
            (Stored, Refused(304), Verdict::Ok),
            (Stored, Stored, Verdict::Warning),
            (Stored, Refused(501), Verdict::Danger),
            (Refused(501), Refused(501), Verdict::Danger),
        ] {
            assert_eq!(judge_condition(first, second).verdict, verdict, "{first:?} {second:?}");
        }
    }
}
