//! Submitting: all or nothing, once a key, also at once, also large.

use std::time::Instant;

use schema::{JobSpec, NewJob, NoiseScheduler, PriorityBand, SubmitError};

use crate::support::{Fixture, defaults, new_job, new_jobs};

#[tokio::test]
async fn every_field_arrives() {
    let fixture = Fixture::new().await;
    let spec = JobSpec {
        prompt: "ein grüner Kreis 🟢\twith \\N, \"quotes\"\nand a second line".into(),
        negative_prompt: Some("blurry".into()),
        seed: Some(4_294_967_295),
        num_inference_steps: Some(999),
        guidance_scale: Some(0.1),
        width: Some(2048),
        height: Some(64),
        noise_scheduler: Some(NoiseScheduler::Dpmpp2mKarras),
        guidance_start: Some(0.1),
        guidance_stop: Some(0.7),
        cache_interval: Some(999),
        client_ref: Some("row 1".into()),
    };
    let full = NewJob { spec: spec.validate(&defaults()).unwrap(), source_line: Some(2) };
    let sparse = NewJob { source_line: None, ..new_job("a", 0) };
    let mut batch = fixture.new_batch("fields");
    batch.band = PriorityBand::Low;
    let submitted = fixture.catalog.submit_batch(&batch, &[full.clone(), sparse.clone()]).await.unwrap();
    assert_eq!((submitted.job_count, submitted.replayed), (2, false));
    let results = fixture.catalog.batch_results(submitted.batch_id, None, 10).await.unwrap();
    assert_eq!((&results[0].spec, results[0].source_line), (&full.spec, Some(2)));
    assert_eq!((&results[1].spec, results[1].source_line), (&sparse.spec, None));
    let bands = "SELECT count(*) FROM jobs WHERE band = 'low' AND max_attempts = 3";
    assert_eq!(fixture.count(bands).await, 2);
    let defaults = "SELECT count(*) FROM batches WHERE defaults ->> 'noise_scheduler' = 'pndm' AND source_name = 'prompts.csv'";
    assert_eq!(fixture.count(defaults).await, 1);
}

#[tokio::test]
async fn the_same_request_again_is_a_replay() {
    let fixture = Fixture::new().await;
    let (batch_id, _) = fixture.submit("key", 3).await;
    let again = fixture.catalog.submit_batch(&fixture.new_batch("key"), &new_jobs(3)).await.unwrap();
    assert_eq!((again.batch_id, again.job_count, again.replayed), (batch_id, 3, true));
    assert_eq!(fixture.count("SELECT count(*) FROM jobs").await, 3);
}

#[tokio::test]
async fn drawn_seeds_do_not_make_another_request() {
    let fixture = Fixture::new().await;
    let unseeded = |prompt: &str| {
        let spec = JobSpec { prompt: prompt.into(), ..JobSpec::default() };
        NewJob { spec: spec.validate(&defaults()).unwrap(), source_line: Some(1) }
    };
    let (first, second) = ([unseeded("a"), unseeded("b")], [unseeded("a"), unseeded("b")]);
    assert_ne!(first, second, "the draws differ");
    let batch = fixture.new_batch("drawn");
    fixture.catalog.submit_batch(&batch, &first).await.unwrap();
    assert!(fixture.catalog.submit_batch(&batch, &second).await.unwrap().replayed);
    // A seed of 0 that somebody chose is not a drawn one.
    let chosen = [new_job("a", 0), new_job("b", 0)];
    let error = fixture.catalog.submit_batch(&batch, &chosen).await.unwrap_err();
    assert!(matches!(error, SubmitError::IdempotencyConflict { .. }), "{error:?}");
}

#[tokio::test]
async fn another_request_under_the_same_key_is_a_conflict() {
    let fixture = Fixture::new().await;
    let (batch_id, _) = fixture.submit("key", 3).await;
    let changed = |change: fn(&mut schema::NewBatch)| {
        let mut batch = fixture.new_batch("key");
        change(&mut batch);
        batch
    };
    let mut reordered = new_jobs(3);
    reordered.swap(0, 1);
    for (batch, jobs) in [
        (fixture.new_batch("key"), new_jobs(2)),
        (fixture.new_batch("key"), reordered),
        (changed(|batch| batch.band = PriorityBand::High), new_jobs(3)),
        (changed(|batch| batch.max_attempts = 4), new_jobs(3)),
    ] {
        match fixture.catalog.submit_batch(&batch, &jobs).await.unwrap_err() {
            SubmitError::IdempotencyConflict { batch_id: known, .. } => assert_eq!(known, batch_id),
            other => panic!("{other:?}"),
        }
    }
    // The name is a label: by default the file's, which may be a fresh temporary one each time.
    let renamed = changed(|batch| batch.name = "other".into());
    assert!(fixture.catalog.submit_batch(&renamed, &new_jobs(3)).await.unwrap().replayed);
    // Another principal's key is another key.
    fixture.catalog.accept_licence("eve", fixture.model.licence_id, "cli", "I accept.").await.unwrap();
    let theirs = changed(|batch| batch.principal = "eve".into());
    assert!(!fixture.catalog.submit_batch(&theirs, &new_jobs(2)).await.unwrap().replayed);
}

#[tokio::test]
async fn of_simultaneous_submissions_of_one_key_one_writes() {
    let fixture = Fixture::new().await;
    let mut submissions = Vec::new();
    for index in 0..8 {
        let (catalog, mut batch) = (fixture.catalog.clone(), fixture.new_batch("key"));
        if index == 7 {
            batch.band = PriorityBand::High;
        }
        submissions.push(tokio::spawn(async move { catalog.submit_batch(&batch, &new_jobs(50)).await }));
    }
    let mut written = 0;
    let mut seen = std::collections::HashSet::new();
    for submission in submissions {
        match submission.await.unwrap() {
            Ok(submitted) => {
                written += usize::from(!submitted.replayed);
                seen.insert(submitted.batch_id);
            }
            Err(SubmitError::IdempotencyConflict { batch_id, .. }) => drop(seen.insert(batch_id)),
            Err(other) => panic!("{other:?}"),
        }
    }
    assert_eq!((written, seen.len()), (1, 1));
    assert_eq!(fixture.count("SELECT count(*) FROM jobs").await, 50);
}

#[tokio::test]
async fn what_cannot_be_submitted_is_told() {
    let fixture = Fixture::new().await;
    let error = fixture.catalog.submit_batch(&fixture.new_batch("empty"), &[]).await.unwrap_err();
    insta::assert_snapshot!(error, @"a batch has to have at least 1 job, but this one has none");
    let mut batch = fixture.new_batch("unknown");
    batch.model = "unknown".parse().unwrap();
    let error = fixture.catalog.submit_batch(&batch, &new_jobs(1)).await.unwrap_err();
    insta::assert_snapshot!(error, @r"
    no model is called `unknown`
    hint: `darkroom models list` shows those there are
    ");
    fixture.submit("key", 1).await;
    let error = fixture.catalog.submit_batch(&fixture.new_batch("key"), &new_jobs(2)).await.unwrap_err();
    let text = error.to_string();
    let (head, tail) = text.split_once("batch ").unwrap();
    insta::assert_snapshot!(format!("{head}batch [id]{}", &tail[36..]), @r"
    idempotency key `key` belongs to batch [id], which has other prompts or settings
    hint: submit a changed batch under a new key
    ");
}

/// One transaction, a few seconds, whatever the size. The bound is loose, since tests share the machine; a row at a
/// time would take minutes.
#[tokio::test]
async fn a_hundred_thousand_jobs_are_one_transaction() {
    let fixture = Fixture::new().await;
    let jobs = new_jobs(100_000);
    let start = Instant::now();
    let submitted = fixture.catalog.submit_batch(&fixture.new_batch("large"), &jobs).await.unwrap();
    let took = start.elapsed();
    assert_eq!(submitted.job_count, 100_000);
    assert_eq!(fixture.count("SELECT count(DISTINCT xmin::text) FROM jobs").await, 1);
    assert!(took.as_secs() < 60, "{took:?}");
    let start = Instant::now();
    let progress = fixture.catalog.batch_progress(submitted.batch_id).await.unwrap().unwrap();
    assert_eq!(progress.available, 100_000);
    let (progress_took, start) = (start.elapsed(), Instant::now());
    let counts = fixture.catalog.cancel_batch_if_not_final(submitted.batch_id).await.unwrap().unwrap();
    assert_eq!(counts.cancelled, 100_000);
    report(&[("submit", took), ("progress", progress_took), ("cancel", start.elapsed())]);
}

/// Shown with `--nocapture`.
#[expect(clippy::print_stderr, reason = "a test's measurements")]
fn report(measured: &[(&str, std::time::Duration)]) {
    for (what, took) in measured {
        eprintln!("100,000 jobs: {what} took {took:?}");
    }
}
