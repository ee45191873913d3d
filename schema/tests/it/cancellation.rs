//! Cancelling: what is not final becomes cancelled, what is final stays, and a running worker's lease ends.

use schema::{CancelCounts, ErrorClass, JobState, LeaseLost, MicrobatchId};

use crate::support::{Fixture, LEASE, completed, failure};

#[tokio::test]
async fn a_batch_is_cancelled_except_for_what_is_final() {
    let fixture = Fixture::new().await;
    let worker_id = fixture.worker().await;
    let (batch_id, job_ids) = fixture.submit("cancel", 6).await;
    let (_, bystanders) = fixture.submit("bystander", 1).await;
    let claimed = fixture.claim(&job_ids[..4], worker_id).await;
    let catalog = &fixture.catalog;
    catalog.complete_if_leased(&[completed(&claimed[0], worker_id)]).await.unwrap()[0].unwrap();
    catalog.fail_if_leased(claimed[1].lease, &failure(ErrorClass::Infra, true)).await.unwrap().unwrap();
    // Now: completed, retryable, running, running, available, available.
    let counts = catalog.cancel_batch_if_not_final(batch_id).await.unwrap().unwrap();
    assert_eq!(counts, CancelCounts { cancelled: 5, of_them_running: 2, already_final: 1 });
    assert_eq!(fixture.state(job_ids[0]).await, JobState::Completed);
    for &job_id in &job_ids[1..] {
        assert_eq!(fixture.state(job_id).await, JobState::Cancelled);
    }
    assert_eq!(fixture.state(bystanders[0]).await, JobState::Available);
    assert_eq!(fixture.outcomes(job_ids[1]).await, ["error"]);
    assert_eq!(fixture.outcomes(job_ids[2]).await, ["cancelled"]);

    // The worker notices at its next extension, and cannot complete.
    let lease = claimed[2].lease;
    assert!(catalog.extend_leases_if_held(&[lease], worker_id, LEASE).await.unwrap().is_empty());
    let late = catalog.complete_if_leased(&[completed(&claimed[2], worker_id)]).await.unwrap();
    assert_eq!(late, [Err(LeaseLost(lease))]);
    let failed = catalog.fail_if_leased(lease, &failure(ErrorClass::Bug, true)).await.unwrap();
    assert_eq!(failed, Err(LeaseLost(lease)));
    assert_eq!(fixture.column(job_ids[2], "lease_generation").await.as_deref(), Some("2"));
    assert_eq!(fixture.column(job_ids[4], "lease_generation").await.as_deref(), Some("0"));

    let again = catalog.cancel_batch_if_not_final(batch_id).await.unwrap().unwrap();
    assert_eq!(again, CancelCounts { cancelled: 0, of_them_running: 0, already_final: 6 });
    let progress = catalog.batch_progress(batch_id).await.unwrap().unwrap();
    assert_eq!((progress.completed, progress.cancelled), (1, 5));
    assert!(progress.is_finished() && progress.cancelled_at.is_some());
}

#[tokio::test]
async fn one_job_is_cancelled_once() {
    let fixture = Fixture::new().await;
    let worker_id = fixture.worker().await;
    let (batch_id, job_ids) = fixture.submit("one", 2).await;
    fixture.claim_one(job_ids[0], worker_id).await;
    let cancel = |job_id| fixture.catalog.cancel_job_if_not_final(job_id);
    let running = CancelCounts { cancelled: 1, of_them_running: 1, already_final: 0 };
    assert_eq!(cancel(job_ids[0]).await.unwrap(), Some(running));
    let already = CancelCounts { cancelled: 0, of_them_running: 0, already_final: 1 };
    assert_eq!(cancel(job_ids[0]).await.unwrap(), Some(already));
    assert_eq!(fixture.state(job_ids[1]).await, JobState::Available);
    assert_eq!(cancel(schema::JobId::of(batch_id, 99)).await.unwrap(), None);
    assert_eq!(fixture.catalog.cancel_batch_if_not_final(schema::BatchId::generate()).await.unwrap(), None);
}

/// A cancellation and a completion of the same jobs at once: each job ends one way, and both sides are told which.
#[tokio::test]
async fn cancelling_and_completing_at_once_agree() {
    let fixture = Fixture::new().await;
    let worker_id = fixture.worker().await;
    for round in 0..8 {
        let (batch_id, job_ids) = fixture.submit(&format!("round {round}"), 6).await;
        let claimed = fixture.claim(&job_ids, worker_id).await;
        let completions = claimed.chunks(2).map(|pair| {
            let reports: Vec<_> = pair.iter().map(|job| completed(job, worker_id)).collect();
            let catalog = fixture.catalog.clone();
            tokio::spawn(async move { catalog.complete_if_leased(&reports).await.unwrap() })
        });
        let completions: Vec<_> = completions.collect();
        let counts = fixture.catalog.cancel_batch_if_not_final(batch_id).await.unwrap().unwrap();
        let mut recorded = 0;
        for completion in completions {
            recorded += completion.await.unwrap().iter().filter(|answer| answer.is_ok()).count() as u64;
        }
        assert_eq!((counts.cancelled, counts.already_final), (6 - recorded, recorded));
        let progress = fixture.catalog.batch_progress(batch_id).await.unwrap().unwrap();
        assert_eq!((progress.completed as u64, progress.cancelled as u64), (recorded, 6 - recorded));
    }
}

/// A cancellation that waits while a claim commits has to end the attempt that the claim opened, which its own first
/// statement cannot see. Found by the chaos run.
#[tokio::test]
async fn a_cancellation_ends_an_attempt_that_was_opened_while_it_waited() {
    let fixture = Fixture::new().await;
    let worker_id = fixture.worker().await;
    for whole_batch in [true, false] {
        let (batch_id, job_ids) = fixture.submit(&format!("whole {whole_batch}"), 1).await;
        let job_id = job_ids[0];
        let mut hold = fixture.pool.begin().await.unwrap();
        sqlx::query("SELECT FROM jobs WHERE job_id = $1 FOR UPDATE")
            .bind(job_id)
            .execute(&mut *hold)
            .await
            .unwrap();
        let catalog = fixture.catalog.clone();
        let claim = tokio::spawn(async move {
            catalog.claim_if_available(&[job_id], worker_id, MicrobatchId::generate(), LEASE).await
        });
        fixture.wait_for_lock(&claim).await;
        let catalog = fixture.catalog.clone();
        let cancel = tokio::spawn(async move {
            if whole_batch {
                catalog.cancel_batch_if_not_final(batch_id).await
            } else {
                catalog.cancel_job_if_not_final(job_id).await
            }
        });
        // Behind the claim, which goes first.
        let waiting = "SELECT count(*) FROM pg_stat_activity
                       WHERE wait_event_type = 'Lock' AND datname = current_database()";
        while fixture.count(waiting).await < 2 {
            assert!(!cancel.is_finished(), "it did not wait for the claim");
            tokio::task::yield_now().await;
        }
        hold.commit().await.unwrap();
        assert_eq!(claim.await.unwrap().unwrap().len(), 1);
        let counts = cancel.await.unwrap().unwrap().unwrap();
        assert_eq!(counts, CancelCounts { cancelled: 1, of_them_running: 1, already_final: 0 });
        assert_eq!(fixture.state(job_id).await, JobState::Cancelled);
        assert_eq!(fixture.outcomes(job_id).await, ["cancelled"]);
    }
}
