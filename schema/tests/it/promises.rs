//! Each kind of broken promise, planted in a database whose rules are taken away, is reported; and nothing else is.

use schema::{BatchId, BrokenPromise, JobId};

use crate::support::{Fixture, completed, failure, flagged};

/// A batch with a job of every fate: 0 completed, 1 flagged, 2 discarded, 3 cancelled, 4 running, 5 available.
struct Planted {
    fixture: Fixture,
    batch_id: BatchId,
    job_ids: Vec<JobId>,
}

impl Planted {
    async fn new() -> Self {
        let fixture = Fixture::new().await;
        let worker_id = fixture.worker().await;
        let (batch_id, job_ids) = fixture.submit("planted", 6).await;
        let claimed = fixture.claim(&job_ids[..3], worker_id).await;
        let drawn = [completed(&claimed[0], worker_id), flagged(&claimed[1], worker_id)];
        for recorded in fixture.catalog.complete_if_leased(&drawn).await.unwrap() {
            recorded.unwrap();
        }
        let gone_for_good = failure(schema::ErrorClass::Input, false);
        fixture.catalog.fail_if_leased(claimed[2].lease, &gone_for_good).await.unwrap().unwrap();
        let cancel = "UPDATE jobs SET state = 'cancelled', finalized_at = now() WHERE job_id = $1";
        sqlx::query(cancel).bind(job_ids[3]).execute(&fixture.pool).await.unwrap();
        fixture.claim_one(job_ids[4], worker_id).await;
        Self { fixture, batch_id, job_ids }
    }

    /// Runs `sql` with no rule in its way but types: `$0` to `$5` stand for the jobs, `$batch` for the batch.
    async fn plant(&self, sql: &str) {
        // Triggers are off in this transaction, foreign keys and deferred ones among them.
        let mut sql = format!("SET LOCAL session_replication_role = replica; {sql}");
        for (index, job_id) in self.job_ids.iter().enumerate() {
            sql = sql.replace(&format!("${index}"), &format!("'{job_id}'"));
        }
        let sql = sql.replace("$batch", &format!("'{}'", self.batch_id));
        let mut transaction = self.fixture.pool.begin().await.unwrap();
        sqlx::raw_sql(&sql).execute(&mut *transaction).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
        transaction.commit().await.unwrap();
    }

    async fn broken(&self) -> Vec<BrokenPromise> {
        let of_batch = self.fixture.catalog.broken_promises(Some(self.batch_id)).await.unwrap();
        let of_all = self.fixture.catalog.broken_promises(None).await.unwrap();
        assert_eq!(of_batch, of_all, "there is one batch");
        of_batch
    }
}

/// A copy of job 0's image row with these columns changed.
fn copy_of_image(changes: &[(&str, &str)]) -> String {
    let mut fields = String::from("'image_id', gen_random_uuid()");
    for (column, value) in changes {
        fields.push_str(&format!(", '{column}', {value}"));
    }
    format!(
        "INSERT INTO images SELECT (jsonb_populate_record(images, jsonb_build_object({fields}))).*
         FROM images WHERE job_id = $0"
    )
}

#[tokio::test]
async fn a_fleet_at_work_breaks_nothing() {
    let planted = Planted::new().await;
    assert_eq!(planted.broken().await, []);
    let account = planted.fixture.catalog.batch_account(planted.batch_id).await.unwrap().unwrap();
    let counts = [account.completed, account.cancelled, account.discarded, account.unfinished];
    assert_eq!((account.enqueued, counts, account.withheld, account.lost()), (6, [2, 1, 1, 2], 1, 0));
    assert_eq!((account.images, account.attempts), (2, 4));
    let unfinished = planted.fixture.catalog.unfinished_jobs(planted.batch_id, 10).await.unwrap();
    assert_eq!(unfinished, [(4, schema::JobState::Running), (5, schema::JobState::Available)]);
    assert_eq!(planted.fixture.catalog.batch_account(BatchId::generate()).await.unwrap(), None);
}

#[tokio::test]
async fn each_kind_of_broken_promise_is_reported() {
    let drop_checks = |table: &str, names: &[&str]| {
        names
            .iter()
            .map(|name| format!("ALTER TABLE {table} DROP CONSTRAINT {name} CASCADE; "))
            .collect::<String>()
    };
    let second_attempt = |job: usize, generation: u32, outcome: &str| {
        format!(
            "INSERT INTO attempts (job_id, lease_generation, attempt, worker_id, microbatch_id, microbatch_size, ended_at, outcome)
             SELECT ${job}, {generation}, 1, worker_id, gen_random_uuid(), 1, {}, {outcome} FROM workers",
            if outcome == "NULL" { "NULL" } else { "now()" }
        )
    };
    let other_licence = "INSERT INTO licence_acceptances (acceptance_id, licence_id, principal, method, statement)
                         SELECT gen_random_uuid(), licence_id, 'somebody else', 'cli', 'Yes.' FROM licences; ";
    let others = "(SELECT acceptance_id FROM licence_acceptances WHERE principal = 'somebody else')";
    // What is planted; the promise, the job and a part of the words that it is reported in.
    let cases: Vec<(String, &str, Option<usize>, &str)> = vec![
        ("DELETE FROM jobs WHERE job_id = $5".into(), "P1", None, "6 jobs were enqueued, but 5 are there"),
        (
            drop_checks("jobs", &["jobs_running_iff_leased"])
                + "UPDATE jobs SET lease_expires_at = NULL WHERE job_id = $4",
            "P1",
            Some(4),
            "nothing moves on",
        ),
        (
            drop_checks("jobs", &["jobs_retryable_iff_scheduled"])
                + "UPDATE jobs SET state = 'retryable' WHERE job_id = $5",
            "P1",
            Some(5),
            "nothing moves on",
        ),
        ("DELETE FROM attempts WHERE job_id = $4".into(), "P1", Some(4), "without an open attempt"),
        (
            second_attempt(5, 1, "NULL") + "; UPDATE jobs SET lease_generation = 1 WHERE job_id = $5",
            "P1",
            Some(5),
            "available with an open attempt",
        ),
        ("DELETE FROM images WHERE job_id = $0".into(), "P2", Some(0), "without an image row"),
        (
            drop_checks("images", &["images_job_id_key", "images_object_key_key"]) + &copy_of_image(&[]),
            "P2",
            Some(0),
            "2 image rows",
        ),
        (
            copy_of_image(&[("job_id", "$3"), ("object_key", "object_key || '2'")]),
            "P2",
            Some(3),
            "cancelled and has an image row",
        ),
        ("UPDATE jobs SET image_id = gen_random_uuid() WHERE job_id = $0".into(), "P2", Some(0), "does not count"),
        (
            second_attempt(0, 2, "'ok'") + "; UPDATE jobs SET lease_generation = 2 WHERE job_id = $0",
            "P2",
            Some(0),
            "2 attempts that ended well",
        ),
        (
            second_attempt(3, 1, "'ok'") + "; UPDATE jobs SET lease_generation = 1 WHERE job_id = $3",
            "P2",
            Some(3),
            "but an attempt ended well",
        ),
        ("UPDATE attempts SET outcome = 'lost' WHERE job_id = $0".into(), "P2", Some(0), "no attempt ended well"),
        ("UPDATE images SET lease_generation = 7 WHERE job_id = $0".into(), "P2", Some(0), "another attempt"),
        (
            drop_checks("images", &["images_flagged_xor_object"])
                + "UPDATE images SET has_nsfw_concept = true WHERE job_id = $0",
            "P3",
            Some(0),
            "withheld, but the image row names an object",
        ),
        (
            drop_checks("images", &["images_flagged_xor_object"])
                + "UPDATE images SET has_nsfw_concept = false WHERE job_id = $1",
            "P3",
            Some(1),
            "names no object",
        ),
        (
            drop_checks("images", &["images_object_whole"])
                + "UPDATE images SET size_bytes = NULL WHERE job_id = $0",
            "P3",
            Some(0),
            "without its bucket, digest or size",
        ),
        (
            "UPDATE images SET object_key = replace(object_key, '/00000000-', '/00000001-') WHERE job_id = $0".into(),
            "P3",
            Some(0),
            "is not this job's",
        ),
        (
            "UPDATE images SET sha256 = repeat('0', 64) WHERE job_id = $0".into(),
            "P3",
            Some(0),
            "is not this job's",
        ),
        (
            drop_checks("images", &["images_object_key_key", "images_job_id_key"]) + &copy_of_image(&[]),
            "P3",
            Some(0),
            "named by 2 image rows",
        ),
        (
            "UPDATE attempts SET ended_at = NULL, outcome = NULL WHERE job_id = $0".into(),
            "P4",
            Some(0),
            "completed with an open attempt",
        ),
        (
            drop_checks("jobs", &["jobs_running_iff_leased"])
                + "UPDATE jobs SET lease_expires_at = now() WHERE job_id = $2",
            "P4",
            Some(2),
            "discarded and held",
        ),
        (
            drop_checks("jobs", &["jobs_final_iff_finalized"])
                + "UPDATE jobs SET finalized_at = NULL WHERE job_id = $3",
            "P4",
            Some(3),
            "without a time",
        ),
        (
            "UPDATE attempts SET started_at = now() + interval '1 hour' WHERE job_id = $2".into(),
            "P4",
            Some(2),
            "began after it was discarded",
        ),
        (second_attempt(3, 9, "'lost'"), "P4", Some(3), "has generation 9, but the job only 0"),
        ("UPDATE batches SET acceptance_id = gen_random_uuid(); UPDATE images SET acceptance_id = batches.acceptance_id FROM batches".into(), "P5", None, "names no licence acceptance"),
        (
            format!("{other_licence} UPDATE batches SET acceptance_id = {others}; UPDATE images SET acceptance_id = {others}"),
            "P5",
            None,
            "accepted by another principal",
        ),
        (
            "UPDATE licence_acceptances SET licence_id = gen_random_uuid()".into(),
            "P5",
            None,
            "is not its model's",
        ),
        (
            "UPDATE licence_acceptances SET accepted_at = now() + interval '1 hour'".into(),
            "P5",
            None,
            "before the licence was accepted",
        ),
        (
            "UPDATE licence_acceptances SET accepted_at = now() - interval '2 hours', revoked_at = now() - interval '1 hour'".into(),
            "P5",
            None,
            "after the acceptance was revoked",
        ),
        (
            format!("{other_licence} UPDATE images SET acceptance_id = {others} WHERE job_id = $0"),
            "P5",
            Some(0),
            "another licence acceptance than its batch",
        ),
        (
            "UPDATE images SET cache_interval = 3 WHERE job_id = $0".into(),
            "P8",
            Some(0),
            "cache interval 1, but its picture has guidance 0 to 1 and cache interval 3",
        ),
        ("UPDATE jobs SET guidance_stop = 0.5 WHERE job_id = $1".into(), "P8", Some(1), "it asks for guidance 0 to 0.5"),
    ];
    for (sql, promise, job, words) in cases {
        let planted = Planted::new().await;
        planted.plant(&sql).await;
        let broken = planted.broken().await;
        let job_id = job.map(|index| planted.job_ids[index]);
        let reported = broken.iter().any(|broken| {
            broken.promise == promise
                && broken.job_id == job_id
                && broken.batch_id == planted.batch_id
                && broken.what.contains(words)
        });
        assert!(reported, "{promise}, job {job:?}, `{words}` is not among {broken:#?}\nafter {sql}");
    }
}

#[tokio::test]
async fn an_image_of_a_job_that_is_gone_is_reported() {
    let planted = Planted::new().await;
    planted.plant("DELETE FROM jobs WHERE job_id = $0").await;
    let broken = planted.broken().await;
    assert!(
        broken.iter().any(|broken| broken.promise == "P2" && broken.what.contains("a job that is not there")),
        "{broken:#?}"
    );
}

#[tokio::test]
async fn another_batch_does_not_answer_for_it() {
    let planted = Planted::new().await;
    let (other, _) = planted.fixture.submit("other", 1).await;
    planted.plant("DELETE FROM images WHERE job_id = $0").await;
    assert_eq!(planted.fixture.catalog.broken_promises(Some(other)).await.unwrap(), []);
    let everywhere = planted.fixture.catalog.broken_promises(None).await.unwrap();
    assert!(everywhere.iter().all(|broken| broken.batch_id == planted.batch_id) && !everywhere.is_empty());
}
