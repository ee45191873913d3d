//! Wake-ups: sent with the commit, told apart, and heard by whoever listens.

use std::time::Duration;

use schema::{CatalogListener, CatalogNotice, LeaseReturn};

use crate::support::Fixture;

async fn next(listener: &mut CatalogListener) -> CatalogNotice {
    tokio::time::timeout(Duration::from_secs(30), listener.next()).await.expect("a notice comes").unwrap()
}

#[tokio::test]
async fn every_reason_to_wake_up_sends_a_notice() {
    let fixture = Fixture::new().await;
    let worker_id = fixture.worker().await;
    let mut listener = fixture.catalog.listen().await.unwrap();
    let (batch_id, job_ids) = fixture.submit("notices", 4).await;
    assert_eq!(next(&mut listener).await, CatalogNotice::JobsAvailable);

    let claimed = fixture.claim(&job_ids, worker_id).await;
    fixture.catalog.release_if_leased(&[claimed[0].lease], LeaseReturn::MessageSettled).await.unwrap();
    assert_eq!(next(&mut listener).await, CatalogNotice::JobsAvailable);
    // A requeued message needs no relay, so the next notice is the rescue's.
    fixture.catalog.release_if_leased(&[claimed[1].lease], LeaseReturn::MessageRequeued).await.unwrap();
    fixture.expire(claimed[2].lease).await;
    fixture.catalog.rescue_if_lease_expired(10).await.unwrap();
    assert_eq!(next(&mut listener).await, CatalogNotice::JobsAvailable);
    fixture.catalog.cancel_job_if_not_final(job_ids[3]).await.unwrap();
    assert_eq!(next(&mut listener).await, CatalogNotice::JobCancelled(job_ids[3]));
    fixture.catalog.cancel_batch_if_not_final(batch_id).await.unwrap();
    assert_eq!(next(&mut listener).await, CatalogNotice::BatchCancelled(batch_id));
    // Nothing left to cancel: nobody is woken. The next notice is the next submission's.
    fixture.catalog.cancel_batch_if_not_final(batch_id).await.unwrap();
    fixture.submit("more", 1).await;
    assert_eq!(next(&mut listener).await, CatalogNotice::JobsAvailable);
}

#[tokio::test]
async fn a_lost_connection_is_told_and_made_again() {
    let fixture = Fixture::new().await;
    let mut listener = fixture.catalog.listen().await.unwrap();
    let kill = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
                WHERE datname = current_database() AND query LIKE 'LISTEN%'";
    assert_eq!(fixture.count(kill).await, 1);
    assert_eq!(next(&mut listener).await, CatalogNotice::Reconnected);
    fixture.submit("after", 1).await;
    assert_eq!(next(&mut listener).await, CatalogNotice::JobsAvailable);
}
