//! Which objects may be deleted, what is remembered of those that went missing, and dead letters.

use schema::{
    BatchId, DeadLetter, ErrorClass, ImageId, KeyStanding, ObjectFault, ObjectFaultKind, ObjectKey,
    Sha256Digest,
};

use crate::support::{Fixture, completed, failure};

fn key(batch_id: BatchId, ordinal: u32, bytes: &[u8]) -> ObjectKey {
    ObjectKey::new(batch_id, ordinal, &Sha256Digest::of(bytes))
}

#[tokio::test]
async fn only_what_no_row_can_come_to_name_is_an_orphan() {
    let fixture = Fixture::new().await;
    let worker_id = fixture.worker().await;
    let (batch_id, job_ids) = fixture.submit("orphans", 4).await;
    let claimed = fixture.claim(&job_ids[..3], worker_id).await;
    let drawn = completed(&claimed[0], worker_id);
    let named = drawn.object.clone().unwrap().object_key;
    fixture.catalog.complete_if_leased(&[drawn]).await.unwrap()[0].unwrap();
    let gone = failure(ErrorClass::Input, false);
    fixture.catalog.fail_if_leased(claimed[1].lease, &gone).await.unwrap().unwrap();

    let twin = key(batch_id, 0, b"a late twin's");
    let discarded = key(batch_id, 1, b"of a discarded job");
    let running = key(batch_id, 2, b"of a running job");
    let available = key(batch_id, 3, b"of an attempt that was killed, to be found again");
    let foreign = key(BatchId::generate(), 0, b"of another fleet");
    let keys = [named.clone(), twin.clone(), discarded.clone(), running, available, foreign];
    use KeyStanding::{Foreign, Named, Open, Orphaned};
    let standings = fixture.catalog.standing_of_keys(&keys).await.unwrap();
    assert_eq!(standings, [Named, Orphaned, Orphaned, Open, Open, Foreign]);

    let hold = fixture.catalog.hold_if_orphaned(&keys).await.unwrap();
    let mut held = hold.keys().to_vec();
    held.sort();
    assert_eq!(held, [twin, discarded]);

    // Whoever would reopen the discarded job has to wait until the deletion is over.
    let pool = fixture.pool.clone();
    let reopened = job_ids[1];
    let reopening = tokio::spawn(async move {
        let mut transaction = pool.begin().await.unwrap();
        sqlx::query("SET LOCAL session_replication_role = replica").execute(&mut *transaction).await.unwrap();
        let sql = "UPDATE jobs SET state = 'available', finalized_at = NULL WHERE job_id = $1";
        sqlx::query(sql).bind(reopened).execute(&mut *transaction).await.unwrap();
        transaction.commit().await.unwrap();
    });
    fixture.wait_for_lock(&reopening).await;
    hold.end().await.unwrap();
    reopening.await.unwrap();
    let discarded = &keys[2..3];
    assert_eq!(fixture.catalog.standing_of_keys(discarded).await.unwrap(), [Open]);
    assert!(fixture.catalog.hold_if_orphaned(discarded).await.unwrap().keys().is_empty());
}

#[tokio::test]
async fn a_fault_is_recorded_once_and_cleared_when_it_heals() {
    let fixture = Fixture::new().await;
    let worker_id = fixture.worker().await;
    let (batch_id, job_ids) = fixture.submit("faults", 2).await;
    let claimed = fixture.claim(&job_ids, worker_id).await;
    let drawn: Vec<_> = claimed.iter().map(|claimed| completed(claimed, worker_id)).collect();
    for recorded in fixture.catalog.complete_if_leased(&drawn).await.unwrap() {
        recorded.unwrap();
    }
    let named = fixture.catalog.objects_of_batch(batch_id, None, 10).await.unwrap();
    assert_eq!(named.len(), 2);
    assert_eq!(
        fixture.catalog.objects_of_batch(batch_id, Some(named[0].image_id), 10).await.unwrap(),
        named[1..]
    );
    assert_eq!(fixture.catalog.sample_of_objects(1).await.unwrap().len(), 1);

    let seen: Vec<ImageId> = named.iter().map(|named| named.image_id).collect();
    let fault = |kind, found: &str| ObjectFault { image_id: seen[0], kind, found: found.into() };
    let missing = fault(ObjectFaultKind::Missing, &"ü".repeat(2000));
    for _ in 0..2 {
        fixture.catalog.record_object_faults(&seen, std::slice::from_ref(&missing)).await.unwrap();
    }
    let open = "SELECT count(*) FROM object_faults WHERE cleared_at IS NULL";
    assert_eq!(fixture.count(open).await, 1);
    // It came back, but damaged: another fault, and the first is over.
    let damaged = fault(ObjectFaultKind::WrongDigest, "other bytes");
    fixture.catalog.record_object_faults(&seen, &[damaged]).await.unwrap();
    assert_eq!(fixture.count(open).await, 1);
    // Who looks at others says nothing about this one.
    fixture.catalog.record_object_faults(&seen[1..], &[]).await.unwrap();
    assert_eq!(fixture.count(open).await, 1);
    fixture.catalog.record_object_faults(&seen, &[]).await.unwrap();
    assert_eq!(fixture.count(open).await, 0);
    assert_eq!(fixture.count("SELECT count(*) FROM object_faults").await, 2, "what healed is remembered");
}

#[tokio::test]
async fn equal_dead_letters_share_a_row() {
    let fixture = Fixture::new().await;
    let letter =
        |queue: &str, body: Vec<u8>| DeadLetter { queue: queue.into(), reason: "rejected".into(), body };
    let garbage = letter("darkroom.jobs.demo.low", b"not\0a job".to_vec());
    let large = letter("darkroom.jobs.demo.low", vec![0xff; 70_000]);
    let odd = letter("a\0b", Vec::new());
    let letters = [garbage.clone(), large, garbage.clone(), odd];
    fixture.catalog.record_dead_letters(&letters).await.unwrap();
    fixture.catalog.record_dead_letters(&[garbage]).await.unwrap();
    fixture.catalog.record_dead_letters(&[]).await.unwrap();
    let sql =
        "SELECT size_bytes, octet_length(body)::bigint, seen_count FROM dead_letters ORDER BY size_bytes";
    let rows: Vec<(i64, i64, i64)> = sqlx::query_as(sql).fetch_all(&fixture.pool).await.unwrap();
    assert_eq!(rows, [(0, 0, 1), (9, 9, 3), (70_000, 65_536, 1)]);
}

#[tokio::test]
async fn the_server_tells_its_settings_and_how_long_things_took() {
    let fixture = Fixture::new().await;
    let health = fixture.catalog.server_health().await.unwrap();
    assert!(health.version_number >= 150_000 && !health.in_recovery, "{health:?}");
    assert!(health.connection_limit > 0 && health.connection_count > 0, "{health:?}");
    let day = std::time::Duration::from_secs(86_400);
    assert_eq!(fixture.catalog.microbatch_times(day).await.unwrap(), []);

    let worker_id = fixture.worker().await;
    let (_, job_ids) = fixture.submit("times", 3).await;
    let claimed = fixture.claim(&job_ids, worker_id).await;
    fixture.catalog.complete_if_leased(&[completed(&claimed[0], worker_id)]).await.unwrap()[0].unwrap();
    fixture.expire(claimed[1].lease).await;
    fixture.catalog.rescue_if_lease_expired(10).await.unwrap();
    fixture.catalog.worker_seen(worker_id).await.unwrap();
    let times = fixture.catalog.microbatch_times(day).await.unwrap();
    assert_eq!(times.len(), 1, "{times:?}");
    assert_eq!((times[0].attempt_count, times[0].lost_by_the_living), (1, 1), "{times:?}");
    assert!(times[0].longest_seconds.is_some_and(|seconds| seconds > 0.0 && seconds < 60.0), "{times:?}");
    assert_eq!((times[0].lease_seconds, times[0].max_microbatch), (Some(60), Some(4)), "as it was started");
    assert_eq!((times[0].model.as_str(), times[0].slowest_worker.as_str()), ("demo", "worker-1"));

    // A slower one with the same settings, and one of a build that recorded none.
    let (slow, old) = (fixture.worker().await, fixture.worker().await);
    for (worker_id, job_id, change) in [
        (slow, job_ids[1], "name = 'worker-2'"),
        (
            old,
            fixture.submit_one("old").await,
            "name = 'worker-3', lease_seconds = NULL, max_microbatch = NULL",
        ),
    ] {
        let sql = format!("UPDATE workers SET {change} WHERE worker_id = '{worker_id}'");
        sqlx::query(&sql).execute(&fixture.pool).await.unwrap();
        let claimed = fixture.claim_one(job_id, worker_id).await;
        let longer = "UPDATE attempts SET started_at = now() - interval '90 seconds' WHERE ended_at IS NULL AND worker_id = $1";
        sqlx::query(longer).bind(worker_id).execute(&fixture.pool).await.unwrap();
        fixture.catalog.complete_if_leased(&[completed(&claimed, worker_id)]).await.unwrap()[0].unwrap();
    }
    let times = fixture.catalog.microbatch_times(day).await.unwrap();
    let told: Vec<_> = times
        .iter()
        .map(|times| {
            (times.lease_seconds, times.worker_count, times.slowest_worker.as_str(), times.attempt_count)
        })
        .collect();
    assert_eq!(told, [(Some(60), 2, "worker-2", 2), (None, 1, "worker-3", 1)]);
    assert!(
        times.iter().all(|times| times.longest_seconds.is_some_and(|seconds| seconds >= 90.0)),
        "{times:?}"
    );
    assert!((chrono::Utc::now() - fixture.catalog.clock().await.unwrap()).num_seconds().abs() < 60);
}
