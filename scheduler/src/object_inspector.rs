//! The object inspector: compares objects with the image rows that name them.
//!
//! A row is written after its object and neither is ever changed, so a difference means that the bucket lost something:
//! a lifecycle rule, a person, a broken disk. The row stays as it is; the fault is recorded beside it.
use anyhow::Result;
use futures::{StreamExt, TryStreamExt};
use schema::{ImageId, NamedObject, ObjectFault, ObjectFaultKind, PgCatalog, Sha256Digest, StoredObject};
use serde::Serialize;
use tracing::warn;

use crate::object_store::{ObjectStore, StoreError};

/// Questions to the store at a time.
const CONCURRENCY: usize = 16;

/// How closely to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// Size, and digest if the store tells it.
    Head,
    /// Size, and digest; the object is downloaded if the store does not tell it.
    HeadOrDownload,
    /// Every object is downloaded.
    Download,
}

/// What a look brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Inspection {
    /// It is what its row says.
    Sound,
    /// It has the right size, and the store does not tell its digest.
    DigestUnknown,
    /// It is not.
    Faulty(ObjectFault),
}

/// What one run found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct InspectorReport {
    /// Objects that were looked at.
    pub inspected: u64,
    /// Those whose digest the store did not tell.
    pub digest_unknown: u64,
    /// What was found wrong.
    pub faults: Vec<ObjectFault>,
}

impl InspectorReport {
    /// How many faults are of this kind.
    pub fn count(&self, kind: ObjectFaultKind) -> u64 {
        self.faults.iter().filter(|fault| fault.kind == kind).count() as u64
    }
}

/// Looks at `sample` objects by chance and, unless `dry_run`, records what it finds.
///
/// # Errors
/// If the store or the catalog cannot be asked.
pub async fn run_once(
    catalog: &PgCatalog,
    store: &impl ObjectStore,
    sample: u32,
    depth: Depth,
    dry_run: bool,
) -> Result<InspectorReport> {
    let named = catalog.sample_of_objects(sample).await?;
    let mut report = InspectorReport::default();
    inspect_all(store, &named, depth, &mut report).await?;
    if !dry_run && !named.is_empty() {
        let seen: Vec<ImageId> = named.iter().map(|named| named.image_id).collect();
        catalog.record_object_faults(&seen, &report.faults).await?;
    }
    for fault in &report.faults {
        warn!(image.id = %fault.image_id, fault = %fault.kind, "An object is not what its image row says: {}", fault.found);
    }
    Ok(report)
}

/// Looks at all of `named` and adds to `report` what was found.
///
/// # Errors
/// If the store cannot be asked.
pub async fn inspect_all(
    store: &impl ObjectStore,
    named: &[NamedObject],
    depth: Depth,
    report: &mut InspectorReport,
) -> Result<(), StoreError> {
    // They are its own, since a stream over borrowed ones is not `Send` for all lifetimes.
    let looks =
        futures::stream::iter(named.to_vec()).map(|named| async move { inspect(store, &named, depth).await });
    let mut looks = looks.buffered(CONCURRENCY);
    while let Some(inspection) = looks.try_next().await? {
        report.inspected += 1;
        match inspection {
            Inspection::Sound => {}
            Inspection::DigestUnknown => report.digest_unknown += 1,
            Inspection::Faulty(fault) => report.faults.push(fault),
        }
    }
    Ok(())
}

async fn inspect(
    store: &impl ObjectStore,
    named: &NamedObject,
    depth: Depth,
) -> Result<Inspection, StoreError> {
    let StoredObject { bucket, object_key, sha256, size_bytes } = &named.object;
    let key = object_key.to_string();
    let faulty = |kind, found| Inspection::Faulty(ObjectFault { image_id: named.image_id, kind, found });
    let compare = |found_size: u64, found: Option<Sha256Digest>| match found {
        _ if found_size != *size_bytes => faulty(
            ObjectFaultKind::WrongSize,
            format!("{key} has {found_size} bytes and should have {size_bytes}"),
        ),
        Some(found) if found != *sha256 => faulty(
            ObjectFaultKind::WrongDigest,
            format!("{key} has the SHA-256 {found} and should have {sha256}"),
        ),
        Some(_) => Inspection::Sound,
        None => Inspection::DigestUnknown,
    };
    let missing = || faulty(ObjectFaultKind::Missing, format!("{key} is not in the bucket {bucket}"));
    if depth != Depth::Download {
        let inspection = match store.head(bucket, &key).await {
            Ok(head) => compare(head.size_bytes, head.sha256),
            Err(StoreError::NotFound { .. }) => missing(),
            Err(error) => return Err(error),
        };
        if depth == Depth::Head || inspection != Inspection::DigestUnknown {
            return Ok(inspection);
        }
    }
    match store.get(bucket, &key).await {
        Ok(bytes) => Ok(compare(bytes.len() as u64, Some(Sha256Digest::of(&bytes)))),
        Err(StoreError::NotFound { .. }) => Ok(missing()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use schema::{BatchId, JobId, ObjectKey};

    use super::*;
    use crate::object_store::fakes::FakeStore;

    fn named(batch_id: BatchId, ordinal: u32, bytes: &[u8]) -> NamedObject {
        let sha256 = Sha256Digest::of(bytes);
        let object_key = ObjectKey::new(batch_id, ordinal, &sha256);
        NamedObject {
            image_id: ImageId::generate(),
            job_id: JobId::of(batch_id, ordinal),
            object: StoredObject {
                bucket: "bucket".into(),
                object_key,
                sha256,
                size_bytes: bytes.len() as u64,
            },
        }
    }

    /// Four objects: sound, missing, of another size, of other bytes.
    fn four(store: &mut FakeStore) -> Vec<NamedObject> {
        let batch_id = BatchId::generate();
        let named: Vec<_> = (0..4).map(|ordinal| named(batch_id, ordinal, b"pixels")).collect();
        for (index, bytes) in [(0, &b"pixels"[..]), (2, b"pix"), (3, b"PIXELS")] {
            store.objects.insert(named[index].object.object_key.to_string(), bytes.to_vec());
        }
        named
    }

    fn kinds(report: &InspectorReport) -> Vec<ObjectFaultKind> {
        report.faults.iter().map(|fault| fault.kind).collect()
    }

    #[tokio::test]
    async fn each_difference_is_a_fault_of_its_own_kind() {
        use ObjectFaultKind::{Missing, WrongDigest, WrongSize};
        for depth in [Depth::Head, Depth::HeadOrDownload, Depth::Download] {
            let mut store = FakeStore::default();
            let named = four(&mut store);
            let mut report = InspectorReport::default();
            inspect_all(&store, &named, depth, &mut report).await.unwrap();
            assert_eq!(kinds(&report), [Missing, WrongSize, WrongDigest], "{depth:?}");
            assert_eq!((report.inspected, report.digest_unknown), (4, 0));
            let downloads = store.reads.load(Ordering::Relaxed);
            assert_eq!(downloads, if depth == Depth::Download { 4 } else { 0 }, "{depth:?}");
        }
    }

    #[tokio::test]
    async fn a_store_that_keeps_no_digest_is_believed_or_read_as_asked() {
        let mut store = FakeStore { keeps_no_digest: true, ..FakeStore::default() };
        let named = four(&mut store);
        let mut report = InspectorReport::default();
        inspect_all(&store, &named, Depth::Head, &mut report).await.unwrap();
        assert_eq!((report.faults.len(), report.digest_unknown), (2, 2), "other bytes go unnoticed");
        let mut report = InspectorReport::default();
        inspect_all(&store, &named, Depth::HeadOrDownload, &mut report).await.unwrap();
        assert_eq!((report.faults.len(), report.digest_unknown), (3, 0));
        assert_eq!(store.reads.load(Ordering::Relaxed), 2, "only those that look right are downloaded");
    }
}
