//! What the relay is told to publish: fairly among batches, and again when the broker has lost it.

use std::collections::HashMap;
use std::time::Duration;

use schema::{BatchId, JobId, PriorityBand, PublishableJob};

use crate::support::{Fixture, new_jobs};

const BAND: PriorityBand = PriorityBand::Normal;

async fn to_publish(fixture: &Fixture, limit: u32) -> Vec<PublishableJob> {
    fixture.catalog.jobs_to_publish(fixture.model.model_id, BAND, limit).await.unwrap()
}

/// Publishes up to `limit` jobs as the relay does, and returns how many of each batch.
async fn publish(fixture: &Fixture, limit: u32) -> HashMap<BatchId, usize> {
    let jobs = to_publish(fixture, limit).await;
    let job_ids: Vec<JobId> = jobs.iter().map(|job| job.job_id).collect();
    assert_eq!(fixture.catalog.mark_published_if_available(&job_ids).await.unwrap(), job_ids.len() as u64);
    let mut by_batch = HashMap::new();
    for job in jobs {
        *by_batch.entry(job.batch_id).or_default() += 1;
    }
    by_batch
}

#[tokio::test]
async fn batches_take_turns_whatever_their_size() {
    let fixture = Fixture::new().await;
    let (large, _) = fixture.submit("large", 200).await;
    let (small, _) = fixture.submit("small", 5).await;
    let (middle, _) = fixture.submit("middle", 30).await;
    assert_eq!(publish(&fixture, 12).await, HashMap::from([(large, 4), (small, 4), (middle, 4)]));
    assert_eq!(publish(&fixture, 5).await, HashMap::from([(large, 2), (small, 1), (middle, 2)]));
    assert_eq!(publish(&fixture, 20).await, HashMap::from([(large, 10), (middle, 10)]));
    let rest = publish(&fixture, 1000).await;
    assert_eq!(rest, HashMap::from([(large, 184), (middle, 14)]));
    assert!(publish(&fixture, 10).await.is_empty());
}

#[tokio::test]
async fn whoever_has_fewest_on_the_way_goes_first() {
    let fixture = Fixture::new().await;
    let worker_id = fixture.worker().await;
    let (early, early_jobs) = fixture.submit("early", 50).await;
    publish(&fixture, 8).await;
    fixture.claim(&early_jobs[..4], worker_id).await;
    let (late, _) = fixture.submit("late", 50).await;
    // Eight of the early batch are on the way, running or published; the late one catches up first.
    assert_eq!(publish(&fixture, 8).await, HashMap::from([(late, 8)]));
    assert_eq!(publish(&fixture, 8).await, HashMap::from([(early, 4), (late, 4)]));
}

#[tokio::test]
async fn small_steps_starve_nobody() {
    let fixture = Fixture::new().await;
    let worker_id = fixture.worker().await;
    let mut batches = Vec::new();
    for index in 0..5 {
        batches.push(fixture.submit(&format!("batch {index}"), 100).await.0);
    }
    // Two at a time for five batches, each done before the next two are asked for, so that nothing is ever on the way.
    let mut served: HashMap<BatchId, usize> = HashMap::new();
    for _ in 0..60 {
        let jobs = to_publish(&fixture, 2).await;
        let job_ids: Vec<JobId> = jobs.iter().map(|job| job.job_id).collect();
        let claimed = fixture.claim(&job_ids, worker_id).await;
        let reports: Vec<_> = claimed.iter().map(|job| crate::support::completed(job, worker_id)).collect();
        fixture.catalog.complete_if_leased(&reports).await.unwrap();
        for job in jobs {
            *served.entry(job.batch_id).or_default() += 1;
        }
    }
    // 120 of 500: 24 each on average. Chance leaves a batch below 5 once in 10^7 runs.
    for batch_id in batches {
        let count = served.get(&batch_id).copied().unwrap_or(0);
        assert!(count >= 5, "{served:?}");
    }
}

#[tokio::test]
async fn a_batchs_jobs_keep_their_order_and_carry_what_the_message_needs() {
    let fixture = Fixture::new().await;
    let mut batch = fixture.new_batch("ordered");
    batch.traceparent = Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into());
    let jobs = new_jobs(20);
    let batch_id = fixture.catalog.submit_batch(&batch, &jobs).await.unwrap().batch_id;
    let published = to_publish(&fixture, 20).await;
    for (ordinal, job) in (0_u32..).zip(&published) {
        assert_eq!((job.batch_id, job.job_id), (batch_id, JobId::of(batch_id, ordinal)));
        assert_eq!(job.microbatch_key, jobs[0].spec.microbatch_key());
        assert_eq!(job.traceparent, batch.traceparent);
        assert_eq!(job.message().job_id, job.job_id);
    }
}

#[tokio::test]
async fn models_and_bands_are_apart() {
    let fixture = Fixture::new().await;
    let mut urgent = fixture.new_batch("urgent");
    urgent.band = PriorityBand::High;
    fixture.catalog.submit_batch(&urgent, &new_jobs(3)).await.unwrap();
    fixture.submit("usual", 2).await;
    let other = fixture.catalog.add_model(&crate::support::new_model("other")).await.unwrap().model;
    let count =
        async |model_id, band| fixture.catalog.jobs_to_publish(model_id, band, 10).await.unwrap().len();
    assert_eq!(count(fixture.model.model_id, PriorityBand::High).await, 3);
    assert_eq!(count(fixture.model.model_id, PriorityBand::Normal).await, 2);
    assert_eq!(count(fixture.model.model_id, PriorityBand::Low).await, 0);
    assert_eq!(count(other.model_id, PriorityBand::Normal).await, 0);
}

#[tokio::test]
async fn only_available_jobs_are_marked_and_counted() {
    let fixture = Fixture::new().await;
    let worker_id = fixture.worker().await;
    let (_, job_ids) = fixture.submit("marks", 4).await;
    let unclaimed =
        async || fixture.catalog.published_unclaimed_count(fixture.model.model_id, BAND).await.unwrap();
    // Claimed and cancelled between publishing and marking.
    fixture.claim_one(job_ids[0], worker_id).await;
    fixture.catalog.cancel_job_if_not_final(job_ids[1]).await.unwrap();
    assert_eq!(fixture.catalog.mark_published_if_available(&job_ids).await.unwrap(), 2);
    assert_eq!(unclaimed().await, 2);
    fixture.claim_one(job_ids[2], worker_id).await;
    assert_eq!(unclaimed().await, 1);
}

#[tokio::test]
async fn what_the_broker_lost_is_published_again() {
    let fixture = Fixture::new().await;
    let (_, job_ids) = fixture.submit("lost", 3).await;
    fixture.catalog.mark_published_if_available(&job_ids).await.unwrap();
    let republish = |after| fixture.catalog.republish_if_unclaimed_for(fixture.model.model_id, BAND, after);
    assert_eq!(republish(Duration::from_secs(60)).await.unwrap(), 0);
    let older = "UPDATE jobs SET published_at = now() - interval '2 minutes' WHERE ordinal < 2";
    sqlx::query(older).execute(&fixture.pool).await.unwrap();
    assert_eq!(republish(Duration::from_secs(60)).await.unwrap(), 2);
    assert_eq!(to_publish(&fixture, 10).await.len(), 2);
    assert_eq!(republish(Duration::ZERO).await.unwrap(), 1);
}

#[tokio::test]
async fn one_relay_publishes_at_a_time() {
    let fixture = Fixture::new().await;
    let turn = fixture.catalog.try_relay_turn().await.unwrap().expect("nobody else publishes");
    assert!(fixture.catalog.try_relay_turn().await.unwrap().is_none());
    turn.end().await.unwrap();
    let turn = fixture.catalog.try_relay_turn().await.unwrap();
    assert!(turn.is_some(), "a turn that ended is free to take");
}

/// A long backlog may not make the relay's question slow: it hops along the index from batch to batch.
#[tokio::test]
async fn a_long_backlog_is_not_walked_through() {
    let fixture = Fixture::new().await;
    fixture.submit("long", 20_000).await;
    fixture.submit("short", 10).await;
    fixture.catalog.close().await;
    // The planner has to find the way with the statistics of the table, which a big COPY leaves behind for a while, too.
    for analyze in [false, true] {
        if analyze {
            sqlx::query("ANALYZE jobs").execute(&fixture.pool).await.unwrap();
        }
        let before = fixture.rows_read().await;
        let catalog = schema::PgCatalog::connect(&fixture.url(), 1).await.unwrap();
        let jobs = catalog.jobs_to_publish(fixture.model.model_id, BAND, 20).await.unwrap();
        assert_eq!(jobs.len(), 20);
        catalog.close().await;
        let read = fixture.rows_read().await - before;
        assert!(read < 500, "20 of 20,010 jobs cost {read} rows (analyzed: {analyze})");
    }
}

#[tokio::test]
async fn workers_that_run_and_were_seen_lately_count_with_their_microbatches() {
    let fixture = Fixture::new().await;
    let capacity = async || fixture.catalog.microbatch_capacity(fixture.model.model_id).await.unwrap();
    assert_eq!(capacity().await, 0);
    let (stays, stops, vanishes) = (fixture.worker().await, fixture.worker().await, fixture.worker().await);
    assert_eq!(capacity().await, 12);
    fixture.catalog.worker_stopped(stops, "a test").await.unwrap();
    assert_eq!(capacity().await, 8);
    let set = async |worker_id, what: &str| {
        let sql = format!("UPDATE workers SET {what} WHERE worker_id = '{worker_id}'");
        sqlx::query(&sql).execute(&fixture.pool).await.unwrap();
    };
    set(vanishes, "last_seen_at = now() - interval '121 seconds'").await;
    set(stays, "last_seen_at = now() - interval '60 seconds'").await;
    assert_eq!(capacity().await, 4);
    set(stays, "max_microbatch = NULL").await;
    assert_eq!(capacity().await, 0, "of a build that did not say");
    let others = fixture.catalog.microbatch_capacity(schema::ModelId::generate()).await.unwrap();
    assert_eq!(others, 0);
}
