//! The judge of the chaos run sees every kind of broken promise: here each is planted and has to be reported.

use std::time::Duration;

use fleet_tests::checker::{self, Violation};
use fleet_tests::{Fleet, Servers};

const SOON: Duration = Duration::from_secs(120);
const SMALL: [&str; 6] = ["--num-inference-steps", "2", "--width", "64", "--height", "64"];

/// Takes away what refuses a violation, in this test's own database.
const DISARM: &str = "
    DO $$ DECLARE item record; BEGIN
        FOR item IN SELECT conrelid::regclass AS place, conname FROM pg_constraint
            WHERE conrelid IN ('jobs'::regclass, 'images'::regclass, 'attempts'::regclass, 'batches'::regclass)
              AND contype IN ('c', 'f') LOOP
            EXECUTE format('ALTER TABLE %s DROP CONSTRAINT IF EXISTS %I CASCADE', item.place, item.conname);
        END LOOP;
    END $$;
    ALTER TABLE images DROP CONSTRAINT images_job_id_key CASCADE;
    ALTER TABLE images DROP CONSTRAINT images_object_key_key CASCADE;
    ALTER TABLE jobs DISABLE TRIGGER USER;
    ALTER TABLE images DISABLE TRIGGER USER;
    ALTER TABLE attempts DISABLE TRIGGER USER;
    ALTER TABLE batches DISABLE TRIGGER USER;
    DROP INDEX attempts_one_open;";

/// One completed batch of three jobs and a cancelled one of one, with nothing wrong, and nothing to refuse a wrong.
async fn disarmed() -> Fleet {
    let fleet = Fleet::new(Servers::shared()).await;
    fleet.submit("one\ntwo\nthree\n", &SMALL);
    let serve = fleet.serve();
    let worker = fleet.solid_color_worker(10, &[]);
    fleet.await_all_final(SOON).await;
    drop((serve, worker));
    let unwanted = fleet.submit("never mind\n", &SMALL);
    fleet.darkroom(&["cancel", &unwanted]).succeeded();
    assert_eq!(checker::violations(fleet.pool()).await.unwrap(), [], "nothing is wrong yet");
    sqlx::raw_sql(DISARM).execute(fleet.pool()).await.unwrap();
    fleet
}

/// Plants a violation, sees that it is reported, and takes it back.
async fn planted(fleet: &Fleet, sql: &str, promise: &str, words: &str) {
    let mut transaction = fleet.pool().begin().await.unwrap();
    sqlx::raw_sql(sql).execute(&mut *transaction).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
    let found: Vec<Violation> = checker::violations(&mut *transaction).await.unwrap();
    transaction.rollback().await.unwrap();
    let reported =
        found.iter().any(|violation| violation.promise == promise && violation.what.contains(words));
    assert!(reported, "{promise} {words:?} was planted and not found: {found:?}");
}

const OF_ONE: &str = "(SELECT job_id FROM jobs WHERE state = 'completed' ORDER BY ordinal LIMIT 1)";
const OF_CANCELLED: &str = "(SELECT job_id FROM jobs WHERE state = 'cancelled' LIMIT 1)";

/// An `INSERT` that copies the first image for `job`, under `key`.
fn another_image(job: &str, key: &str) -> String {
    format!(
        "CREATE TEMP TABLE twin AS SELECT * FROM images WHERE job_id = {OF_ONE} LIMIT 1;
         UPDATE twin SET image_id = gen_random_uuid(), job_id = {job}, object_key = {key};
         INSERT INTO images SELECT * FROM twin"
    )
}

/// An `INSERT` of an attempt of `job` that began an hour after everything.
fn another_attempt(job: &str, outcome: &str) -> String {
    let ended = if outcome == "NULL" { "NULL" } else { "now() + interval '2 hours'" };
    format!(
        "INSERT INTO attempts (job_id, lease_generation, attempt, worker_id, microbatch_id, microbatch_size,
                               started_at, ended_at, outcome)
         SELECT {job}, 9, 1, worker_id, gen_random_uuid(), 1, now() + interval '1 hour', {ended}, {outcome}
         FROM workers LIMIT 1"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn every_broken_promise_that_the_database_shows_is_reported() {
    let fleet = disarmed().await;
    for (promise, words, sql) in [
        (
            "P1",
            "not final",
            format!("UPDATE jobs SET state = 'running', finalized_at = NULL WHERE job_id = {OF_ONE}"),
        ),
        ("P1", "has 2 of 3 jobs", format!("DELETE FROM jobs WHERE job_id = {OF_ONE}")),
        ("P1", "has no image", format!("DELETE FROM images WHERE job_id = {OF_ONE}")),
        ("P1", "without a reason", format!("UPDATE jobs SET state = 'discarded' WHERE job_id = {OF_ONE}")),
        ("P2", "has 2 images", another_image(OF_ONE, "object_key || '-twin'")),
        ("P2", "2 images name one object", another_image("gen_random_uuid()", "object_key")),
        (
            "P4",
            "discarded and has an image",
            format!("UPDATE jobs SET state = 'discarded' WHERE job_id = {OF_ONE}"),
        ),
        (
            "P4",
            "of another attempt",
            format!("UPDATE images SET lease_generation = 9 WHERE job_id = {OF_ONE}"),
        ),
        ("P4", "2 attempts that went well", another_attempt(OF_ONE, "'ok'")),
        ("P4", "is open although", another_attempt(OF_ONE, "NULL")),
        ("P4", "began after the job was completed", another_attempt(OF_ONE, "'lost'")),
        ("P7", "cancelled and has an image", another_image(OF_CANCELLED, "object_key || '-twin'")),
        ("P7", "began after the job was cancelled", another_attempt(OF_CANCELLED, "'lost'")),
        ("P7", "of a cancelled job went well", another_attempt(OF_CANCELLED, "'ok'")),
    ] {
        planted(&fleet, &sql, promise, words).await;
    }
    assert_eq!(checker::violations(fleet.pool()).await.unwrap(), [], "everything was taken back");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_final_job_that_changes_is_reported() {
    let fleet = disarmed().await;
    let before = checker::final_jobs(fleet.pool()).await.unwrap();
    assert_eq!(before.len(), 4);
    assert_eq!(checker::changed_since(&before, &before), []);
    let sql = format!("UPDATE images SET sha256 = repeat('0', 64) WHERE job_id = {OF_ONE}");
    sqlx::raw_sql(&sql).execute(fleet.pool()).await.unwrap();
    let now = checker::final_jobs(fleet.pool()).await.unwrap();
    assert_eq!(checker::changed_since(&before, &now).len(), 1);
    sqlx::raw_sql("DELETE FROM jobs WHERE state = 'cancelled'").execute(fleet.pool()).await.unwrap();
    let now = checker::final_jobs(fleet.pool()).await.unwrap();
    assert_eq!(checker::changed_since(&before, &now).len(), 2, "gone is changed too");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_that_is_missing_or_differs_is_reported_and_orphans_are_counted() {
    let fleet = disarmed().await;
    let bucket = checker::check_bucket(&fleet).await.unwrap();
    assert_eq!((bucket.violations.len(), bucket.named, bucket.orphans), (0, 3, 0));
    for (sql, words) in [
        (format!("UPDATE images SET sha256 = repeat('0', 64) WHERE job_id = {OF_ONE}"), "other bytes"),
        ("UPDATE images SET size_bytes = size_bytes + 1 WHERE job_id = (SELECT job_id FROM jobs WHERE ordinal = 1)".to_owned(), "another size"),
        ("UPDATE images SET object_key = object_key || '-gone' WHERE job_id = (SELECT job_id FROM jobs WHERE ordinal = 2)".to_owned(), "missing"),
    ] {
        sqlx::raw_sql(&sql).execute(fleet.pool()).await.unwrap();
        let found = checker::check_bucket(&fleet).await.unwrap().violations;
        let reported = found.iter().any(|violation| violation.promise == "P3" && violation.what.contains(words));
        assert!(reported, "{words}: {found:?}");
    }
    let bucket = checker::check_bucket(&fleet).await.unwrap();
    assert_eq!((bucket.violations.len(), bucket.orphans), (3, 1));
}
