//! The orphan collector: deletes objects that no image row names and none ever will.
//!
//! A killed attempt may leave an object behind, and a late twin one of its own. That no row names an object is no reason to
//! delete it: a worker that runs the job again finds it there, and is about to record it. So an object has to be old by
//! the store's own clock, its job has to be final, and [`PgCatalog::hold_if_orphaned`] looks again right before the
//! deletion and keeps the job as it is until that is over. Objects of jobs that this catalog does not know are left
//! alone: another fleet may share the bucket.
use std::time::Duration;

use anyhow::{Context, Result};
use chrono::{DateTime, Utc};
use futures::{StreamExt, TryStreamExt};
use schema::{KeyStanding, ObjectKey, PgCatalog};
use serde::Serialize;
use tracing::info;

use crate::object_store::{ListedObject, ObjectStore};

/// Objects that are held and deleted together: few enough that their jobs are not held for long.
const CHUNK: usize = 64;
/// Deletions at a time.
const CONCURRENCY: usize = 8;
/// Keys to name in the report; there may be a million.
const NAMED_KEYS: usize = 1_000;

/// Which objects count.
#[derive(Clone, Copy, Debug)]
pub struct Collection {
    /// The store's time.
    pub now: DateTime<Utc>,
    /// Only objects that are at least so old are looked at.
    pub older_than: Duration,
    /// Whether to find orphans and leave them.
    pub dry_run: bool,
}

/// What one run found and did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CollectorReport {
    /// Objects below the prefix.
    pub listed: u64,
    /// Those that are too young to be looked at.
    pub young: u64,
    /// Those that an image row names.
    pub named: u64,
    /// Those whose job may still record them.
    pub open: u64,
    /// Those of jobs that this catalog does not know, or with keys that are not ours.
    pub foreign: u64,
    /// Those that nobody will ever name.
    pub orphaned: u64,
    /// Their size together.
    pub orphaned_bytes: u64,
    /// Orphans that were deleted.
    pub deleted: u64,
    /// The first of the orphans' keys.
    pub keys: Vec<String>,
}

/// Looks at every object of `bucket` below `prefix` once. Safe to run twice, and by two schedulers at once.
///
/// # Errors
/// If the store or the catalog cannot be asked. What was deleted until then were orphans.
pub async fn run_once(
    catalog: &PgCatalog,
    store: &impl ObjectStore,
    bucket: &str,
    prefix: &str,
    collection: Collection,
) -> Result<CollectorReport> {
    let mut report = CollectorReport::default();
    let mut next = None;
    loop {
        let page = store.list(bucket, prefix, next.as_deref()).await?;
        report.listed += page.objects.len() as u64;
        let orphans = orphans(catalog, page.objects, collection, &mut report).await?;
        if !collection.dry_run {
            for chunk in orphans.chunks(CHUNK) {
                report.deleted += delete(catalog, store, bucket, chunk).await?;
            }
        }
        next = page.next;
        if next.is_none() {
            break;
        }
    }
    if report.deleted > 0 {
        info!(deleted = report.deleted, "Deleted {} objects that no image row names", report.deleted);
    }
    Ok(report)
}

/// The orphans among `objects`, as far as can be seen without holding them.
async fn orphans(
    catalog: &PgCatalog,
    objects: Vec<ListedObject>,
    collection: Collection,
    report: &mut CollectorReport,
) -> Result<Vec<ObjectKey>> {
    let mut old = Vec::new();
    for object in objects {
        // One without a time counts as young.
        let age = object.last_modified.and_then(|time| (collection.now - time).to_std().ok());
        match (age, object.key.parse::<ObjectKey>()) {
            (Some(age), Ok(key)) if age >= collection.older_than => old.push((key, object)),
            (_, Ok(_)) => report.young += 1,
            (_, Err(_)) => report.foreign += 1,
        }
    }
    let keys: Vec<ObjectKey> = old.iter().map(|(key, _)| key.clone()).collect();
    let standings = catalog.standing_of_keys(&keys).await?;
    let mut orphans = Vec::new();
    for ((key, object), standing) in old.into_iter().zip(standings) {
        match standing {
            KeyStanding::Named => report.named += 1,
            KeyStanding::Open => report.open += 1,
            KeyStanding::Foreign => report.foreign += 1,
            KeyStanding::Orphaned => {
                report.orphaned += 1;
                report.orphaned_bytes += object.size_bytes;
                if report.keys.len() < NAMED_KEYS {
                    report.keys.push(object.key);
                }
                orphans.push(key);
            }
        }
    }
    Ok(orphans)
}

/// Deletes those of `keys` that are orphans still, and returns how many.
async fn delete(
    catalog: &PgCatalog,
    store: &impl ObjectStore,
    bucket: &str,
    keys: &[ObjectKey],
) -> Result<u64> {
    let hold = catalog.hold_if_orphaned(keys).await?;
    // The keys are its own, since a stream over borrowed ones is not `Send` for all lifetimes.
    let deletions = futures::stream::iter(hold.keys().to_vec()).map(|key| async move {
        store
            .delete(bucket, &key.to_string())
            .await
            .with_context(|| format!("cannot delete the orphan {key}"))
    });
    let deleted: Result<Vec<()>> = deletions.buffer_unordered(CONCURRENCY).try_collect().await;
    hold.end().await?;
    Ok(deleted?.len() as u64)
}
