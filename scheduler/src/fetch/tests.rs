//! Fetching from a store in memory.
use std::sync::atomic::Ordering;

use schema::{
    BatchId, ImageId, ImageRecord, JobId, JobSpec, NoiseScheduler, ObjectKey, SafetyVerdict, SpecDefaults,
};

use super::*;
use crate::object_store::fakes::FakeStore;

/// A completed job whose picture has these bytes, or was flagged.
fn completed(batch_id: BatchId, ordinal: u32, bytes: Option<&[u8]>) -> BatchResult {
    let spec = JobSpec { prompt: format!("Cat no. {ordinal}"), seed: Some(7), ..JobSpec::default() };
    let object = bytes.map(|bytes| {
        let sha256 = Sha256Digest::of(bytes);
        StoredObject {
            bucket: "bucket".to_owned(),
            object_key: ObjectKey::new(batch_id, ordinal, &sha256),
            sha256,
            size_bytes: bytes.len() as u64,
        }
    });
    let safety = SafetyVerdict {
        has_nsfw_concept: object.is_none(),
        concept_scores: Vec::new(),
        special_care_scores: Vec::new(),
    };
    BatchResult {
        job_id: JobId::of(batch_id, ordinal),
        ordinal,
        source_line: None,
        state: JobState::Completed,
        spec: spec.validate(&SpecDefaults::of_model(512, 512, NoiseScheduler::Pndm)).unwrap(),
        error_class: None,
        error_message: None,
        image: Some(ImageRecord {
            image_id: ImageId::generate(),
            object,
            safety: Some(safety),
            prompt_truncated: false,
            weights_sha256: Sha256Digest::of(b""),
            created_at: chrono::DateTime::UNIX_EPOCH,
        }),
    }
}

fn put(store: &mut FakeStore, result: &BatchResult, bytes: &[u8]) {
    let object = result.image.as_ref().unwrap().object.as_ref().unwrap();
    store.objects.insert(object.object_key.to_string(), bytes.to_vec());
}

#[tokio::test]
async fn pictures_are_fetched_once_and_again_when_they_are_spoiled() {
    let folder = tempfile::tempdir().unwrap();
    let (mut store, batch_id) = (FakeStore::default(), BatchId::generate());
    let results = [
        completed(batch_id, 0, Some(b"zero")),
        completed(batch_id, 1, None),
        completed(batch_id, 2, Some(b"two")),
    ];
    put(&mut store, &results[0], b"zero");
    put(&mut store, &results[2], b"two");

    let mut report = FetchReport::default();
    let tiles = fetch(&store, &results, folder.path(), &mut report, || {}).await;
    assert_eq!(report, FetchReport { downloaded: 2, withheld: 1, ..FetchReport::default() });
    let path = folder.path().join("00002-cat-no-2-7.png");
    assert_eq!(std::fs::read(&path).unwrap(), b"two");
    assert_eq!(tiles[2].picture.as_ref(), Some(&path));
    assert_eq!((tiles[1].picture.as_ref(), tiles[1].verdict), (None, Verdict::Withheld));

    std::fs::write(&path, b"spoiled").unwrap();
    let mut report = FetchReport::default();
    fetch(&store, &results, folder.path(), &mut report, || {}).await;
    assert_eq!(report, FetchReport { downloaded: 1, kept: 1, withheld: 1, ..FetchReport::default() });
    assert_eq!(std::fs::read(&path).unwrap(), b"two");
    assert_eq!(store.reads.load(Ordering::Relaxed), 3);
}

#[tokio::test]
async fn an_object_that_is_not_what_its_row_says_is_not_kept() {
    let folder = tempfile::tempdir().unwrap();
    let (mut store, batch_id) = (FakeStore::default(), BatchId::generate());
    let results = [
        completed(batch_id, 0, Some(b"good")),
        completed(batch_id, 1, Some(b"good")),
        completed(batch_id, 2, Some(b"good")),
        completed(batch_id, 3, Some(b"good")),
    ];
    put(&mut store, &results[0], b"evil");
    put(&mut store, &results[1], b"longer");
    put(&mut store, &results[3], b"good");
    let mut report = FetchReport::default();
    fetch(&store, &results, folder.path(), &mut report, || {}).await;
    assert_eq!(report.downloaded, 1, "the bad ones do not keep the good one from coming");
    assert_eq!(report.failures.len(), 3);
    assert!(report.failures[0].contains("has to have the SHA-256"), "{}", report.failures[0]);
    assert!(report.failures[1].ends_with("has to have 4 bytes, but has 6"), "{}", report.failures[1]);
    assert!(report.failures[2].contains("holds no object"), "{}", report.failures[2]);
    let files: Vec<_> =
        std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(files, ["00003-cat-no-3-7.png"]);
}

#[test]
fn file_names_are_safe_whatever_the_prompt() {
    assert_eq!(slug("A red cat, sitting"), "a-red-cat-sitting");
    assert_eq!(slug("../../etc/passwd"), "etc-passwd");
    assert_eq!(slug("猫\0\n"), "picture");
    assert_eq!(slug(""), "picture");
    assert!(slug(&"long words ".repeat(50)).len() <= SLUG_LETTERS);
}
