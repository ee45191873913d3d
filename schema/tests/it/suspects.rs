//! Jobs that are lost with their workers: in smaller and smaller company, then alone, then discarded.

use schema::{JobId, JobState, LeaseReturn, PriorityBand, WorkerId};

use crate::support::{Fixture, completed};

/// Claims all that are still available in microbatches as large as they allow, and lets the worker of every microbatch with
/// `guilty` in it die; the others complete.
async fn round(fixture: &Fixture, job_ids: &[JobId], guilty: JobId, worker_id: WorkerId) {
    let publishable =
        fixture.catalog.jobs_to_publish(fixture.model.model_id, PriorityBand::Normal, 100).await.unwrap();
    let mut waiting: Vec<(JobId, usize)> = publishable
        .iter()
        .map(|job| (job.job_id, job.message().microbatch_limit.map_or(job_ids.len(), |limit| limit as usize)))
        .collect();
    while let Some(&(_, limit)) = waiting.first() {
        let microbatch: Vec<JobId> =
            waiting.iter().filter(|job| job.1 == limit).take(limit).map(|job| job.0).collect();
        waiting.retain(|job| !microbatch.contains(&job.0));
        let claimed = fixture.claim(&microbatch, worker_id).await;
        assert_eq!(claimed.len(), microbatch.len());
        for job in &claimed {
            assert!(job.microbatch_limit.is_none_or(|limit| limit as usize >= claimed.len()));
        }
        if microbatch.contains(&guilty) {
            for job in &claimed {
                fixture.expire(job.lease).await;
            }
            assert_eq!(fixture.catalog.rescue_if_lease_expired(100).await.unwrap().len(), claimed.len());
        } else {
            let done: Vec<_> = claimed.iter().map(|job| completed(job, worker_id)).collect();
            for answer in fixture.catalog.complete_if_leased(&done).await.unwrap() {
                answer.unwrap();
            }
        }
    }
}

#[tokio::test]
async fn a_job_that_kills_its_workers_is_found_and_its_neighbors_complete_uncharged() {
    let fixture = Fixture::new().await;
    let worker_id = fixture.worker().await;
    let (_, job_ids) = fixture.submit("poison", 8).await;
    let guilty = job_ids[5];
    // 8, 4, 2, 1 together; the loss in a microbatch of 1 that nobody asked for proves nothing yet; then three alone.
    let mut rounds = 0;
    while fixture.state(guilty).await == JobState::Available {
        round(&fixture, &job_ids, guilty, worker_id).await;
        rounds += 1;
        assert!(rounds < 20, "it goes around forever");
    }
    assert_eq!(rounds, 6, "8, 4, 2, and three times alone");
    assert_eq!(fixture.state(guilty).await, JobState::Discarded);
    assert_eq!(fixture.column(guilty, "error_class").await.as_deref(), Some("bug"));
    insta::assert_snapshot!(
        fixture.column(guilty, "error_message").await.unwrap(),
        @"its worker died or hung 3 times while it ran alone"
    );
    assert_eq!(fixture.column(guilty, "attempt").await.as_deref(), Some("0"), "a crash is not a failure");
    assert_eq!(fixture.outcomes(guilty).await, ["lost"; 6]);
    for &job_id in job_ids.iter().filter(|job_id| **job_id != guilty) {
        assert_eq!(fixture.state(job_id).await, JobState::Completed);
        assert_eq!(fixture.column(job_id, "attempt").await.as_deref(), Some("1"), "never charged");
        assert_eq!(fixture.column(job_id, "error_class").await, None);
    }
}

#[tokio::test]
async fn a_worker_that_knows_that_it_breaks_says_so_at_once() {
    let fixture = Fixture::new().await;
    let worker_id = fixture.worker().await;
    let (_, job_ids) = fixture.submit("suspects", 3).await;
    fixture.catalog.mark_published_if_available(&job_ids).await.unwrap();
    let claimed = fixture.claim(&job_ids, worker_id).await;
    let leases: Vec<_> = claimed.iter().map(|job| job.lease).collect();
    let released = fixture.catalog.release_if_leased(&leases, LeaseReturn::Suspected).await.unwrap();
    assert_eq!(released.len(), 3);
    for &job_id in &job_ids {
        assert_eq!(fixture.state(job_id).await, JobState::Available);
        assert_eq!(fixture.column(job_id, "microbatch_limit").await.as_deref(), Some("1"));
        assert_eq!(fixture.column(job_id, "losses_alone").await.as_deref(), Some("0"));
        assert_eq!(fixture.column(job_id, "published_at").await, None, "its message is spent");
        assert_eq!(fixture.outcomes(job_id).await, ["lost"]);
    }
    assert!(fixture.catalog.release_if_leased(&leases, LeaseReturn::Suspected).await.unwrap().is_empty());
}

#[tokio::test]
async fn an_unfit_worker_says_why_it_stopped() {
    let fixture = Fixture::new().await;
    let worker_id = fixture.worker().await;
    fixture.catalog.worker_unfit(worker_id, "5 jobs in a row failed alike: full").await.unwrap();
    fixture.catalog.worker_stopped(worker_id, "asked to stop").await.unwrap();
    let listed = fixture.catalog.workers().await.unwrap();
    assert!(listed[0].is_unfit);
    assert_eq!(listed[0].stop_reason.as_deref(), Some("5 jobs in a row failed alike: full"));
    let unstopped =
        sqlx::query("UPDATE workers SET stopped_at = NULL, stop_reason = NULL").execute(&fixture.pool).await;
    assert_eq!(crate::support::rule_of(unstopped.unwrap_err()), "workers_unfit_has_stopped");
}
