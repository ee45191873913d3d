//! Bringing a batch's pictures into a folder: several at once, each checked against its row, none fetched twice.
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use futures::StreamExt;
use schema::{BatchResult, JobState, Sha256Digest, StoredObject};
use serde::Serialize;
use tokio::fs;

use crate::contact_sheet::{Tile, Verdict};
use crate::object_store::ObjectStore;

/// Downloads at a time: enough to hide the wait for each, few enough for a laptop's line.
const CONCURRENCY: usize = 8;
/// Letters of the prompt in a file's name.
const SLUG_LETTERS: usize = 48;

/// What happened to one job's picture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fetched {
    /// It was downloaded now.
    Downloaded(PathBuf),
    /// It was there already, with the right digest.
    Kept(PathBuf),
    /// There is none to download.
    Absent,
}

/// What happened to all of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct FetchReport {
    /// Pictures downloaded now.
    pub downloaded: u64,
    /// Pictures that were there already.
    pub kept: u64,
    /// Pictures that the safety checker flagged.
    pub withheld: u64,
    /// Jobs that were cancelled or discarded.
    pub without_picture: u64,
    /// Jobs that are not final yet.
    pub not_final: u64,
    /// What went wrong, one text a picture.
    pub failures: Vec<String>,
}

/// Fetches the pictures of `results` into the folder `output` and adds to `report` what happened. Returns the
/// contact sheet's tiles, in the order of `results`. A picture that fails does not keep the others from coming.
pub async fn fetch(
    store: &impl ObjectStore,
    results: &[BatchResult],
    output: &Path,
    report: &mut FetchReport,
    mut fetched_one: impl FnMut(),
) -> Vec<Tile> {
    let downloads = futures::stream::iter(results).map(|result| fetch_one(store, result, output));
    let mut downloads = std::pin::pin!(downloads.buffered(CONCURRENCY).zip(futures::stream::iter(results)));
    let mut tiles = Vec::with_capacity(results.len());
    while let Some((fetched, result)) = downloads.next().await {
        let verdict = verdict(result);
        let picture = match fetched {
            Ok(Fetched::Downloaded(path)) => {
                report.downloaded += 1;
                Some(path)
            }
            Ok(Fetched::Kept(path)) => {
                report.kept += 1;
                Some(path)
            }
            Ok(Fetched::Absent) => {
                match verdict {
                    Verdict::Withheld => report.withheld += 1,
                    Verdict::Waiting => report.not_final += 1,
                    _ => report.without_picture += 1,
                }
                None
            }
            Err(error) => {
                report.failures.push(format!("picture {}: {error:#}", result.ordinal));
                None
            }
        };
        let (prompt, seed) = (result.spec.prompt().to_owned(), result.spec.seed());
        tiles.push(Tile { prompt, seed, picture, verdict });
        fetched_one();
    }
    tiles
}

async fn fetch_one(store: &impl ObjectStore, result: &BatchResult, output: &Path) -> Result<Fetched> {
    let Some(object) = result.image.as_ref().and_then(|image| image.object.as_ref()) else {
        return Ok(Fetched::Absent);
    };
    let path = output.join(file_name(result));
    if let Ok(bytes) = fs::read(&path).await
        && Sha256Digest::of(&bytes) == object.sha256
    {
        return Ok(Fetched::Kept(path));
    }
    let key = object.object_key.to_string();
    let bytes = store.get(&object.bucket, &key).await?;
    check(&bytes, object)?;
    // Written beside and moved, so that a file with a picture's name is always a whole picture.
    let (output, destination) = (output.to_owned(), path.clone());
    tokio::task::spawn_blocking(move || {
        let file = tempfile::Builder::new().prefix(".fetching-").tempfile_in(output)?;
        std::fs::write(file.path(), bytes)?;
        // A temporary file is private; a picture need not be.
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
        std::fs::set_permissions(file.path(), mode)?;
        file.persist(destination).map(drop).map_err(|error| error.error)
    })
    .await?
    .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(Fetched::Downloaded(path))
}

fn check(bytes: &[u8], object: &StoredObject) -> Result<()> {
    let key = &object.object_key;
    ensure!(
        bytes.len() as u64 == object.size_bytes,
        "the object {key} has to have {} bytes, but has {}",
        object.size_bytes,
        bytes.len()
    );
    let found = Sha256Digest::of(bytes);
    ensure!(
        found == object.sha256,
        "the object {key} has to have the SHA-256 {}, but has {found}",
        object.sha256
    );
    Ok(())
}

/// What there is to say about one job's picture.
pub fn verdict(result: &BatchResult) -> Verdict {
    match (result.state, result.image.as_ref().map(|image| image.safety.as_ref())) {
        (JobState::Completed, Some(Some(safety))) if safety.has_nsfw_concept => Verdict::Withheld,
        (JobState::Completed, Some(Some(_))) => Verdict::Passed,
        (JobState::Completed, _) => Verdict::Unchecked,
        (JobState::Discarded, _) => Verdict::Discarded,
        (JobState::Cancelled, _) => Verdict::Cancelled,
        (JobState::Available | JobState::Running | JobState::Retryable, _) => Verdict::Waiting,
    }
}

/// The picture's file name: its place in the batch, what it shows, and its seed.
pub fn file_name(result: &BatchResult) -> String {
    format!("{:05}-{}-{}.png", result.ordinal, slug(result.spec.prompt()), result.spec.seed())
}

/// The prompt's ASCII letters and digits in lower case, everything between as `-`: safe as part of a file name.
fn slug(prompt: &str) -> String {
    let mut slug = String::new();
    for character in prompt.chars() {
        if slug.len() >= SLUG_LETTERS {
            break;
        }
        if character.is_ascii_alphanumeric() {
            slug.push(character.to_ascii_lowercase());
        } else if !slug.is_empty() && !slug.ends_with('-') {
            slug.push('-');
        }
    }
    let slug = slug.trim_end_matches('-');
    if slug.is_empty() { "picture".to_owned() } else { slug.to_owned() }
}

#[cfg(test)]
mod tests;
