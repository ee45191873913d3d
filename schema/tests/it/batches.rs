//! Looking at batches: lists, progress, results, and what a person means by a few letters.

use schema::{ErrorClass, JobState, ResolveBatchError};

use crate::support::{Fixture, completed, failure, flagged};

#[tokio::test]
async fn progress_counts_every_state() {
    let fixture = Fixture::new().await;
    let worker_id = fixture.worker().await;
    let (batch_id, job_ids) = fixture.submit("progress", 8).await;
    let before = fixture.catalog.batch_progress(batch_id).await.unwrap().unwrap();
    assert_eq!((before.available, before.job_count, before.is_finished()), (8, 8, false));
    assert_eq!((before.first_started_at, before.last_finalized_at), (None, None));

    let claimed = fixture.claim(&job_ids[..6], worker_id).await;
    let catalog = &fixture.catalog;
    let reports = [completed(&claimed[0], worker_id), flagged(&claimed[1], worker_id)];
    catalog.complete_if_leased(&reports).await.unwrap();
    catalog.fail_if_leased(claimed[2].lease, &failure(ErrorClass::Infra, true)).await.unwrap().unwrap();
    catalog.fail_if_leased(claimed[3].lease, &failure(ErrorClass::Input, false)).await.unwrap().unwrap();
    catalog.cancel_job_if_not_final(job_ids[4]).await.unwrap();
    let progress = catalog.batch_progress(batch_id).await.unwrap().unwrap();
    let by_state = [
        progress.available,
        progress.running,
        progress.retryable,
        progress.completed,
        progress.cancelled,
        progress.discarded,
    ];
    assert_eq!(by_state, [2, 1, 1, 2, 1, 1]);
    assert_eq!((progress.flagged, progress.final_count(), progress.is_finished()), (1, 4, false));
    assert!(progress.first_started_at <= progress.first_finalized_at);
    assert!(progress.first_finalized_at <= progress.last_finalized_at);
    assert_eq!((progress.name.as_str(), progress.model.as_str()), ("progress", "demo"));
    assert_eq!(catalog.batch_progress(schema::BatchId::generate()).await.unwrap(), None);
}

#[tokio::test]
async fn batches_are_listed_latest_first() {
    let fixture = Fixture::new().await;
    for name in ["first", "second", "third"] {
        fixture.submit(name, 2).await;
    }
    let listed = fixture.catalog.batches(2).await.unwrap();
    let names: Vec<&str> = listed.iter().map(|batch| batch.name.as_str()).collect();
    assert_eq!(names, ["third", "second"]);
    assert_eq!((listed[0].job_count, listed[0].final_count), (2, 0));
    fixture.catalog.cancel_batch_if_not_final(listed[0].batch_id).await.unwrap();
    let listed = fixture.catalog.batches(1).await.unwrap();
    assert_eq!(listed[0].final_count, 2);
    assert!(listed[0].cancelled_at.is_some());
}

#[tokio::test]
async fn results_come_in_pages() {
    let fixture = Fixture::new().await;
    let worker_id = fixture.worker().await;
    let (batch_id, job_ids) = fixture.submit("pages", 5).await;
    let claimed = fixture.claim_one(job_ids[3], worker_id).await;
    fixture
        .catalog
        .fail_if_leased(claimed.lease, &failure(ErrorClass::NonFinite, false))
        .await
        .unwrap()
        .unwrap();
    let mut ordinals = Vec::new();
    let mut after = None;
    loop {
        let page = fixture.catalog.batch_results(batch_id, after, 2).await.unwrap();
        let Some(last) = page.last() else { break };
        after = Some(last.ordinal);
        for result in page {
            if result.ordinal == 3 {
                assert_eq!(
                    (result.state, result.error_class),
                    (JobState::Discarded, Some(ErrorClass::NonFinite))
                );
                assert_eq!(result.error_message.as_deref(), Some("the fault, and what caused it"));
            }
            assert_eq!(result.image, None);
            ordinals.push(result.ordinal);
        }
    }
    assert_eq!(ordinals, [0, 1, 2, 3, 4]);
}

#[tokio::test]
async fn a_few_letters_name_a_batch() {
    let fixture = Fixture::new().await;
    let (first, _) = fixture.submit("first", 1).await;
    let (second, _) = fixture.submit("second", 1).await;
    let resolve = |text: &str| {
        let (catalog, text) = (fixture.catalog.clone(), text.to_owned());
        async move { catalog.resolve_batch(&text).await }
    };
    assert_eq!(resolve("first").await.unwrap(), first);
    assert_eq!(resolve(&second.to_string()).await.unwrap(), second);
    assert_eq!(resolve(&second.to_string().to_uppercase()).await.unwrap(), second);
    assert_eq!(resolve("latest").await.unwrap(), second);
    // Ids of the same instant begin alike.
    match resolve(&first.to_string()[..2]).await.unwrap_err() {
        ResolveBatchError::Ambiguous { candidates, .. } => assert_eq!(candidates, [second, first]),
        other => panic!("{other:?}"),
    }
    insta::assert_snapshot!(resolve("%").await.unwrap_err(), @r"
    no batch has the name `%` or an id that starts with it
    hint: `darkroom batches` shows those there are
    ");
    assert!(matches!(resolve("").await, Err(ResolveBatchError::Ambiguous { .. })));
}
