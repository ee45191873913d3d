//! Leases: claimed by one, extended, given back, failed, rescued, staged; and what a late holder is told.

use std::time::Duration;

use schema::{ErrorClass, FailDisposition, JobId, JobState, Lease, LeaseLost, LeaseReturn, MicrobatchId};

use crate::support::{Fixture, LEASE, completed, failure};

#[tokio::test]
async fn a_claim_answers_with_all_that_a_worker_needs() {
    let fixture = Fixture::new().await;
    let worker_id = fixture.worker().await;
    let mut batch = fixture.new_batch("claimed");
    batch.traceparent = Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into());
    let jobs = crate::support::new_jobs(3);
    let batch_id = fixture.catalog.submit_batch(&batch, &jobs).await.unwrap().batch_id;
    // In another order than that of the ids or the ordinals.
    let ordinals = [2_u32, 0, 1];
    let job_ids = ordinals.map(|ordinal| JobId::of(batch_id, ordinal));
    let microbatch_id = MicrobatchId::generate();
    let claimed =
        fixture.catalog.claim_if_available(&job_ids, worker_id, microbatch_id, LEASE).await.unwrap();
    assert_eq!(claimed.len(), 3);
    for (job, ordinal) in claimed.iter().zip(ordinals) {
        assert_eq!(job.lease, Lease { job_id: JobId::of(batch_id, ordinal), lease_generation: 1 });
        assert_eq!((job.batch_id, job.ordinal, job.attempt, job.max_attempts), (batch_id, ordinal, 1, 3));
        assert_eq!(job.spec, jobs[ordinal as usize].spec);
        assert_eq!(job.weights_sha256, fixture.model.weights_sha256);
        assert_eq!(job.acceptance_id, fixture.acceptance.acceptance_id);
        assert_eq!(job.traceparent, batch.traceparent);
    }
    let in_microbatch = format!(
        "SELECT count(*) FROM attempts WHERE microbatch_id = '{microbatch_id}' AND microbatch_size = 3
           AND worker_id = '{worker_id}' AND ended_at IS NULL AND attempt = 1"
    );
    assert_eq!(fixture.count(&in_microbatch).await, 3);
    let on_time = "SELECT count(*) FROM jobs WHERE lease_expires_at BETWEEN now() + interval '590 s' AND now() + interval '600 s'";
    assert_eq!(fixture.count(on_time).await, 3);
}

#[tokio::test]
async fn what_is_not_available_is_left_out() {
    let fixture = Fixture::new().await;
    let (mine, theirs) = (fixture.worker().await, fixture.worker().await);
    let (_, job_ids) = fixture.submit("some", 4).await;
    fixture.claim_one(job_ids[0], theirs).await;
    fixture.catalog.cancel_job_if_not_final(job_ids[1]).await.unwrap();
    let unknown = JobId::of(schema::BatchId::generate(), 0);
    let wanted = [job_ids[0], unknown, job_ids[1], job_ids[2], job_ids[2]];
    let claimed = fixture.claim(&wanted, mine).await;
    assert_eq!(claimed.iter().map(|job| job.lease.job_id).collect::<Vec<_>>(), [job_ids[2]]);
    assert!(fixture.claim(&wanted, mine).await.is_empty(), "a duplicate message claims nothing");
    assert!(fixture.claim(&[], mine).await.is_empty());
}

#[tokio::test]
async fn of_many_simultaneous_claims_exactly_one_wins() {
    let fixture = Fixture::new().await;
    let (_, job_ids) = fixture.submit("race", 60).await;
    let mut workers = Vec::new();
    for _ in 0..16 {
        workers.push(fixture.worker().await);
    }
    let catalog = schema::PgCatalog::connect(&fixture.url(), 16).await.unwrap();
    let claims = workers.iter().enumerate().map(|(index, &worker_id)| {
        let catalog = catalog.clone();
        let mut wanted = job_ids.clone();
        // Each asks in another order; locks are taken in one.
        wanted.rotate_left(index * 7 % 60);
        tokio::spawn(async move {
            let mut won = Vec::new();
            for chunk in wanted.chunks(10) {
                won.extend(
                    catalog
                        .claim_if_available(chunk, worker_id, MicrobatchId::generate(), LEASE)
                        .await
                        .unwrap(),
                );
            }
            won
        })
    });
    let claims: Vec<_> = claims.collect();
    let mut won = Vec::new();
    for claim in claims {
        won.extend(claim.await.unwrap().into_iter().map(|job| job.lease));
    }
    assert!(won.iter().all(|lease| lease.lease_generation == 1), "nobody claimed a job that was held");
    let mut won: Vec<JobId> = won.into_iter().map(|lease| lease.job_id).collect();
    won.sort();
    let mut all = job_ids.clone();
    all.sort();
    assert_eq!(won, all, "each job was won once");
    assert_eq!(fixture.count("SELECT count(*) FROM attempts").await, 60);
}

/// The relay may still be marking a job as published when its message arrives. A claim that skipped the locked row would
/// lose the message.
#[tokio::test]
async fn a_claim_waits_for_a_row_that_is_locked() {
    let fixture = Fixture::new().await;
    let worker_id = fixture.worker().await;
    let job_id = fixture.submit_one("locked").await;
    let mut marking = fixture.pool.begin().await.unwrap();
    sqlx::query("UPDATE jobs SET published_at = now()").execute(&mut *marking).await.unwrap();
    let catalog = fixture.catalog.clone();
    let claim = tokio::spawn(async move {
        catalog.claim_if_available(&[job_id], worker_id, MicrobatchId::generate(), LEASE).await
    });
    fixture.wait_for_lock(&claim).await;
    marking.commit().await.unwrap();
    assert_eq!(claim.await.unwrap().unwrap().len(), 1);
}

#[tokio::test]
async fn a_lease_is_extended_for_its_holder_alone() {
    let fixture = Fixture::new().await;
    let (mine, theirs) = (fixture.worker().await, fixture.worker().await);
    let (_, job_ids) = fixture.submit("leases", 4).await;
    let leases: Vec<Lease> = fixture.claim(&job_ids, mine).await.iter().map(|job| job.lease).collect();
    let hour = Duration::from_secs(3600);
    let extend = async |leases: &[Lease], worker_id| {
        let mut held = fixture.catalog.extend_leases_if_held(leases, worker_id, hour).await.unwrap();
        held.sort_by_key(|held| job_ids.iter().position(|job_id| job_id == held));
        held
    };
    assert_eq!(extend(&leases, mine).await, job_ids);
    let extended = "SELECT count(*) FROM jobs WHERE lease_expires_at > now() + interval '59 minutes'";
    assert_eq!(fixture.count(extended).await, 4);
    assert_eq!(extend(&leases, theirs).await, []);
    // One is cancelled, one is rescued and claimed by another, one is late but nobody has taken it.
    fixture.catalog.cancel_job_if_not_final(job_ids[0]).await.unwrap();
    fixture.expire(leases[1]).await;
    assert_eq!(
        fixture.catalog.rescue_if_lease_expired(10).await.unwrap(),
        [(job_ids[1], JobState::Available)]
    );
    fixture.claim_one(job_ids[1], theirs).await;
    fixture.expire(leases[2]).await;
    assert_eq!(extend(&leases, mine).await, [job_ids[2], job_ids[3]]);
    let stale = Lease { lease_generation: 0, ..leases[3] };
    let future = Lease { lease_generation: 2, ..leases[3] };
    assert_eq!(extend(&[stale, future], mine).await, []);
}

/// A worker asks every second; what has most of its time left is answered without writing a row.
#[tokio::test]
async fn a_lease_with_most_of_its_time_left_is_read_and_not_written() {
    let fixture = Fixture::new().await;
    let worker_id = fixture.worker().await;
    let (_, job_ids) = fixture.submit("fresh", 2).await;
    let leases: Vec<Lease> = fixture.claim(&job_ids, worker_id).await.iter().map(|job| job.lease).collect();
    let aged = format!(
        "UPDATE jobs SET lease_expires_at = now() + interval '{} seconds' WHERE job_id = '{}'",
        LEASE.as_secs() / 2,
        job_ids[1]
    );
    sqlx::query(&aged).execute(&fixture.pool).await.unwrap();
    let version = async |job_id| fixture.column(job_id, "xmin").await;
    let before = (version(job_ids[0]).await, version(job_ids[1]).await);
    let mut held = fixture.catalog.extend_leases_if_held(&leases, worker_id, LEASE).await.unwrap();
    held.sort_by_key(|held| job_ids.iter().position(|job_id| job_id == held));
    assert_eq!(held, job_ids);
    assert_eq!(version(job_ids[0]).await, before.0, "a fresh lease was written");
    assert_ne!(version(job_ids[1]).await, before.1, "a lease that is half over was not extended");
    let extended = "SELECT count(*) FROM jobs WHERE lease_expires_at > now() + interval '590 seconds'";
    assert_eq!(fixture.count(extended).await, 2);
}

#[tokio::test]
async fn a_released_job_is_as_if_never_claimed() {
    let fixture = Fixture::new().await;
    let worker_id = fixture.worker().await;
    let (_, job_ids) = fixture.submit("released", 2).await;
    fixture.catalog.mark_published_if_available(&job_ids).await.unwrap();
    let claimed = fixture.claim(&job_ids, worker_id).await;
    let (requeued, settled) = (claimed[0].lease, claimed[1].lease);
    let release =
        async |lease, messages| fixture.catalog.release_if_leased(&[lease], messages).await.unwrap();
    assert_eq!(release(requeued, LeaseReturn::MessageRequeued).await, [job_ids[0]]);
    assert_eq!(release(settled, LeaseReturn::MessageSettled).await, [job_ids[1]]);
    for &job_id in &job_ids {
        assert_eq!(fixture.state(job_id).await, JobState::Available);
        assert_eq!(fixture.column(job_id, "attempt").await.as_deref(), Some("0"));
        assert_eq!(fixture.outcomes(job_id).await, ["preempted"]);
    }
    assert!(fixture.column(job_ids[0], "published_at").await.is_some(), "the broker has its message");
    assert!(fixture.column(job_ids[1], "published_at").await.is_none(), "the relay has to publish it again");
    assert!(release(settled, LeaseReturn::MessageSettled).await.is_empty(), "released once");
    assert_eq!(fixture.claim_one(job_ids[0], worker_id).await.lease.lease_generation, 2);
    assert!(release(requeued, LeaseReturn::MessageSettled).await.is_empty(), "a stale lease");
    assert_eq!(fixture.state(job_ids[0]).await, JobState::Running);
}

#[tokio::test]
async fn a_failed_job_is_tried_again_until_its_budget_is_spent() {
    let fixture = Fixture::new().await;
    let worker_id = fixture.worker().await;
    let job_id = fixture.submit_one("failing").await;
    // Three attempts: after 5 s and 20 s, a tenth more or less; then no more.
    for (attempt, delay) in [(1, Some((4.5, 5.5))), (2, Some((18.0, 22.0))), (3, None)] {
        let claimed = fixture.claim_one(job_id, worker_id).await;
        assert_eq!(claimed.attempt, attempt);
        let failed = fixture.catalog.fail_if_leased(claimed.lease, &failure(ErrorClass::Infra, true)).await;
        match (failed.unwrap().unwrap(), delay) {
            (FailDisposition::Retryable { .. }, Some((from, to))) => {
                assert_eq!(fixture.state(job_id).await, JobState::Retryable);
                let sql = "SELECT extract(epoch FROM scheduled_at - (SELECT max(ended_at) FROM attempts))::float8 FROM jobs";
                let waits: f64 = sqlx::query_scalar(sql).fetch_one(&fixture.pool).await.unwrap();
                assert!((from - 0.5..to).contains(&waits), "attempt {attempt} waits {waits} s");
                assert!(fixture.catalog.stage_if_due(10).await.unwrap().is_empty(), "not yet");
                sqlx::query("UPDATE jobs SET scheduled_at = now()").execute(&fixture.pool).await.unwrap();
                assert_eq!(fixture.catalog.stage_if_due(10).await.unwrap(), [job_id]);
                assert_eq!(fixture.state(job_id).await, JobState::Available);
            }
            (FailDisposition::Discarded, None) => {
                assert_eq!(fixture.state(job_id).await, JobState::Discarded)
            }
            other => panic!("attempt {attempt}: {other:?}"),
        }
        let late =
            fixture.catalog.fail_if_leased(claimed.lease, &failure(ErrorClass::Bug, true)).await.unwrap();
        assert_eq!(late, Err(LeaseLost(claimed.lease)), "an attempt fails once");
    }
    assert_eq!(fixture.outcomes(job_id).await, ["error", "error", "error"]);
    assert_eq!(fixture.column(job_id, "error_class").await.as_deref(), Some("infra"));
    let reasons = "SELECT count(*) FROM v_failure_reasons
                   WHERE error_class = 'infra' AND attempt_count = 3 AND job_count = 1 AND discarded_job_count = 1";
    assert_eq!(fixture.count(reasons).await, 1);
}

#[tokio::test]
async fn a_job_that_no_retry_can_help_is_discarded_at_once() {
    let fixture = Fixture::new().await;
    let worker_id = fixture.worker().await;
    let job_id = fixture.submit_one("hopeless").await;
    let claimed = fixture.claim_one(job_id, worker_id).await;
    let mut hopeless = failure(ErrorClass::Input, false);
    hopeless.message = format!("nul \0 and {}", "long ".repeat(2000));
    let disposition = fixture.catalog.fail_if_leased(claimed.lease, &hopeless).await.unwrap().unwrap();
    assert_eq!(disposition, FailDisposition::Discarded);
    let message = fixture.column(job_id, "error_message").await.unwrap();
    assert!(message.starts_with("nul  and long") && message.len() == 4000, "{}", message.len());
}

#[tokio::test]
async fn retry_delays_grow_to_half_an_hour() {
    let fixture = Fixture::new().await;
    let sql = "SELECT extract(epoch FROM retry_delay(attempt::smallint))::float8 FROM generate_series(1, 40) AS attempt";
    let delays: Vec<f64> = sqlx::query_scalar(sql).fetch_all(&fixture.pool).await.unwrap();
    for (index, delay) in delays.iter().enumerate() {
        let nominal = (5.0 * 4_f64.powi(index.min(10) as i32)).min(1800.0);
        assert!((nominal * 0.9..=nominal * 1.1).contains(delay), "attempt {}: {delay}", index + 1);
    }
}

#[tokio::test]
async fn an_expired_lease_is_rescued_and_its_holder_told() {
    let fixture = Fixture::new().await;
    let (slow, quick) = (fixture.worker().await, fixture.worker().await);
    let (_, job_ids) = fixture.submit("rescue", 3).await;
    fixture.catalog.mark_published_if_available(&job_ids).await.unwrap();
    let claimed = fixture.claim(&job_ids, slow).await;
    assert!(fixture.catalog.rescue_if_lease_expired(10).await.unwrap().is_empty(), "all leases run");
    fixture.expire(claimed[0].lease).await;
    fixture.expire(claimed[1].lease).await;
    assert_eq!(fixture.catalog.rescue_if_lease_expired(1).await.unwrap().len(), 1, "the limit holds");
    assert_eq!(fixture.catalog.rescue_if_lease_expired(10).await.unwrap().len(), 1);
    for &job_id in &job_ids[..2] {
        assert_eq!(fixture.state(job_id).await, JobState::Available);
        assert_eq!(fixture.column(job_id, "attempt").await.as_deref(), Some("0"), "not the job's failure");
        assert_eq!(fixture.column(job_id, "published_at").await, None);
        assert_eq!(fixture.outcomes(job_id).await, ["lost"]);
    }
    assert_eq!(fixture.state(job_ids[2]).await, JobState::Running);

    // Before anybody claims it again, and after: the slow worker's answer is the same.
    let late = [completed(&claimed[0], slow)];
    assert_eq!(fixture.catalog.complete_if_leased(&late).await.unwrap(), [Err(LeaseLost(claimed[0].lease))]);
    let again = fixture.claim_one(job_ids[0], quick).await;
    assert_eq!((again.lease.lease_generation, again.attempt), (2, 1));
    assert_eq!(fixture.catalog.complete_if_leased(&late).await.unwrap(), [Err(LeaseLost(claimed[0].lease))]);
    let failed =
        fixture.catalog.fail_if_leased(claimed[0].lease, &failure(ErrorClass::Bug, false)).await.unwrap();
    assert_eq!(failed, Err(LeaseLost(claimed[0].lease)));
    insta::assert_snapshot!(
        LeaseLost(Lease { job_id: "18e2d600-1338-5e33-8ec4-383ff772c9ab".parse().unwrap(), lease_generation: 1 }),
        @"the lease on job `18e2d600-1338-5e33-8ec4-383ff772c9ab` (generation 1) is lost; nothing was changed"
    );
    fixture.catalog.complete_if_leased(&[completed(&again, quick)]).await.unwrap()[0].unwrap();
    assert_eq!(fixture.state(job_ids[0]).await, JobState::Completed);
    assert_eq!(fixture.outcomes(job_ids[0]).await, ["lost", "ok"]);
}

#[tokio::test]
async fn workers_are_listed_with_what_they_hold() {
    let fixture = Fixture::new().await;
    let worker_id = fixture.worker().await;
    let (_, job_ids) = fixture.submit("held", 2).await;
    fixture.claim(&job_ids, worker_id).await;
    assert!(fixture.catalog.worker_seen(worker_id).await.unwrap());
    let listed = fixture.catalog.workers().await.unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].name.as_str(), listed[0].model.as_str()), ("worker-1", "demo"));
    assert_eq!((listed[0].running_count, listed[0].stopped_at), (2, None));
    fixture.catalog.worker_stopped(worker_id, "SIGTERM").await.unwrap();
    fixture.catalog.worker_stopped(worker_id, "again").await.unwrap();
    assert!(!fixture.catalog.worker_seen(worker_id).await.unwrap(), "it said that it had stopped");
    let listed = fixture.catalog.workers().await.unwrap();
    assert_eq!(listed[0].stop_reason.as_deref(), Some("SIGTERM"));
    sqlx::query("UPDATE workers SET stopped_at = now() - interval '2 days'")
        .execute(&fixture.pool)
        .await
        .unwrap();
    assert!(fixture.catalog.workers().await.unwrap().is_empty());
    let row = "SELECT count(*) FROM v_worker_utilisation WHERE image_count = 0 AND busy_seconds = 0";
    assert_eq!(fixture.count(row).await, 1);
}
