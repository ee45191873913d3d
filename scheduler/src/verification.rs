//! One batch checked completely: its rows against the promises, and its rows against the bucket.
//!
//! What the rows alone can tell is one query ([`PgCatalog::broken_promises`]); what only the bucket can tell is looked up
//! object by object. Nothing is changed.
use anyhow::{Context, Result};
use schema::{
    BatchAccount, BatchId, BrokenPromise, JobState, KeyStanding, ObjectFaultKind, ObjectKey, PgCatalog,
};
use serde::Serialize;

use crate::object_inspector::{Depth, InspectorReport, inspect_all};
use crate::object_store::ObjectStore;

/// Rows in one question.
const PAGE: u32 = 1_000;
/// Unfinished jobs to name; their number is in the account.
const NAMED_JOBS: u32 = 20;

/// Everything there is to say about a batch.
#[derive(Clone, Debug, Serialize)]
pub struct Verification {
    /// The batch.
    pub batch_id: BatchId,
    /// Its jobs, each counted once.
    pub account: BatchAccount,
    /// Enqueued jobs that are in no state at all.
    pub lost: i64,
    /// Image rows beyond one a completed job.
    pub doubled: i64,
    /// Objects that are not there.
    pub missing: u64,
    /// Objects of another size or digest than their rows say.
    pub corrupt: u64,
    /// Objects below the batch's prefix that no row names. A killed attempt may leave one: a waste, and no broken promise.
    pub orphaned: Vec<String>,
    /// The first of the jobs that are not final: ordinal and state.
    pub unfinished: Vec<(u32, JobState)>,
    /// What was found in the bucket.
    pub objects: InspectorReport,
    /// What was found in the rows.
    pub broken_promises: Vec<BrokenPromise>,
}

impl Verification {
    /// Whether every promise was kept, as far as one can see now.
    pub fn is_sound(&self) -> bool {
        self.lost == 0
            && self.doubled == 0
            && self.objects.faults.is_empty()
            && self.broken_promises.is_empty()
    }
}

/// Checks batch `batch_id`; its objects that no row names are looked for in `bucket`.
///
/// # Errors
/// If the catalog or the store cannot be asked.
pub async fn verify(
    catalog: &PgCatalog,
    store: &impl ObjectStore,
    bucket: &str,
    batch_id: BatchId,
    depth: Depth,
) -> Result<Verification> {
    let account =
        catalog.batch_account(batch_id).await?.with_context(|| format!("batch {batch_id} is gone"))?;
    let broken_promises = catalog.broken_promises(Some(batch_id)).await?;
    let mut objects = InspectorReport::default();
    let mut after = None;
    loop {
        let page = catalog.objects_of_batch(batch_id, after, PAGE).await?;
        let Some(last) = page.last() else { break };
        after = Some(last.image_id);
        inspect_all(store, &page, depth, &mut objects).await?;
    }
    let missing = objects.count(ObjectFaultKind::Missing);
    Ok(Verification {
        batch_id,
        lost: account.lost(),
        doubled: (account.images - account.completed).max(0),
        missing,
        corrupt: objects.faults.len() as u64 - missing,
        orphaned: unnamed(catalog, store, bucket, batch_id).await?,
        unfinished: catalog.unfinished_jobs(batch_id, NAMED_JOBS).await?,
        account,
        objects,
        broken_promises,
    })
}

/// The objects below the batch's prefix that no row names and that its unfinished jobs cannot have written.
async fn unnamed(
    catalog: &PgCatalog,
    store: &impl ObjectStore,
    bucket: &str,
    batch_id: BatchId,
) -> Result<Vec<String>> {
    let prefix = ObjectKey::batch_prefix(batch_id);
    let mut unnamed = Vec::new();
    let mut next = None;
    loop {
        let page = store.list(bucket, &prefix, next.as_deref()).await?;
        let mut keys = Vec::new();
        for object in page.objects {
            match object.key.parse::<ObjectKey>() {
                Ok(key) => keys.push(key),
                Err(_) => unnamed.push(object.key),
            }
        }
        let standings = catalog.standing_of_keys(&keys).await?;
        for (key, standing) in keys.into_iter().zip(standings) {
            if matches!(standing, KeyStanding::Orphaned | KeyStanding::Foreign) {
                unnamed.push(key.to_string());
            }
        }
        next = page.next;
        if next.is_none() {
            return Ok(unnamed);
        }
    }
}
