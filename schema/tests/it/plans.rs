//! What every microbatch asks finds its jobs by their ids, however many others run and whatever Postgres believes about it.

use schema::{JobId, Lease, LeaseReturn, MicrobatchId, PgCatalog};

use crate::support::{Fixture, LEASE, completed};

const RUNNING: u32 = 2_000;
/// Far fewer than run, and some for each that is asked about.
const FEW: i64 = 100;

#[tokio::test]
async fn other_running_jobs_are_not_walked_through() {
    let fixture = Fixture::new().await;
    let worker_id = fixture.worker().await;
    let (_, job_ids) = fixture.submit("many", RUNNING).await;
    // Statistics of a time when nothing ran: none of its rows is `running`, so a plan may take the index of those for a short way.
    sqlx::query("ANALYZE jobs").execute(&fixture.pool).await.unwrap();
    let claimed = fixture.claim(&job_ids, worker_id).await;
    assert_eq!(claimed.len(), job_ids.len());
    let leases: Vec<Lease> = claimed.iter().map(|job| job.lease).collect();
    let reports: Vec<_> = claimed[..4].iter().map(|job| completed(job, worker_id)).collect();
    fixture.catalog.close().await;
    // What this reads is counted now: a session reports when it is told to, after a statement.
    let mut session = fixture.pool.acquire().await.unwrap();
    let due = "UPDATE jobs SET lease_expires_at = now() WHERE job_id = ANY ($1)";
    sqlx::query(due).bind(job_ids[8..12].to_vec()).execute(&mut *session).await.unwrap();
    sqlx::query("SELECT pg_stat_force_next_flush()").execute(&mut *session).await.unwrap();
    drop(session);

    let mut before = fixture.rows_read().await;
    for what in ["read", "extend", "complete", "release"] {
        let catalog = PgCatalog::connect(&fixture.url(), 1).await.unwrap();
        let found = match what {
            "read" => catalog.extend_leases_if_held(&leases[..4], worker_id, LEASE).await.unwrap().len(),
            "extend" => catalog.extend_leases_if_held(&leases[8..12], worker_id, LEASE).await.unwrap().len(),
            "complete" => catalog.complete_if_leased(&reports).await.unwrap().iter().flatten().count(),
            _ => catalog.release_if_leased(&leases[4..8], LeaseReturn::MessageSettled).await.unwrap().len(),
        };
        assert_eq!(found, 4, "{what}");
        catalog.close().await;
        let read = fixture.rows_read().await - before;
        assert!(read < FEW, "to {what} four of {RUNNING} running jobs cost {read} rows");
        before += read;
    }
}

/// A worker that connects to a new database plans its statements while the tables have a page or two, which would be read
/// fastest as a whole; and Postgres keeps a plan until it has looked at the tables again, a minute later.
#[tokio::test]
async fn plans_of_a_time_when_tables_were_small_read_no_whole_table() {
    let fixture = Fixture::new().await;
    let worker_id = fixture.worker().await;
    let catalog = PgCatalog::connect(&fixture.url(), 1).await.unwrap();
    let draw = async |job_ids: &[JobId]| {
        for four in job_ids.chunks(4) {
            let microbatch_id = MicrobatchId::generate();
            let claimed = catalog.claim_if_available(four, worker_id, microbatch_id, LEASE).await.unwrap();
            let leases: Vec<Lease> = claimed.iter().map(|job| job.lease).collect();
            assert_eq!(catalog.extend_leases_if_held(&leases, worker_id, LEASE).await.unwrap().len(), 4);
            let reports: Vec<_> = claimed.iter().map(|job| completed(job, worker_id)).collect();
            assert_eq!(catalog.complete_if_leased(&reports).await.unwrap().iter().flatten().count(), 4);
        }
    };
    // After five times a plan is kept.
    let (_, few) = fixture.submit("few", 32).await;
    draw(&few).await;
    let (_, many) = fixture.submit("many", 3 * RUNNING).await;
    for some in many[..RUNNING as usize].chunks(100) {
        fixture.claim(some, worker_id).await;
    }
    draw(&many[RUNNING as usize..][..80]).await;
    catalog.close().await;
    fixture.catalog.close().await;
    let sql = "SELECT sum(seq_tup_read + coalesce(idx_tup_fetch, 0))::bigint FROM pg_stat_user_tables";
    fixture.rows_read().await;
    let read = fixture.count(sql).await;
    // Some rows for each that was written, and not thousands for each of twenty microbatches.
    assert!(read < 15 * i64::from(3 * RUNNING), "{read} rows were read");
}
