//! Disks that are full, without a disk: the kernel refuses to let a server's files grow (RLIMIT_FSIZE).
//!
//! That needs no mount and no privilege. Postgres meets it as it meets a full disk: a page of which only half could be
//! written is SQLSTATE 53100, "disk full". Its log has to be spared, since a server that cannot write that stops altogether,
//! so tables are first made larger than a segment of the log.

use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use sqlx::PgPool;

use crate::process::stat;
use crate::servers::Servers;

/// Bytes of a page of a table.
const PAGE: i64 = 8192;
/// More than a segment of Postgres' log has, 16 MiB.
const PAGES: i64 = 2200;
/// Bytes of a text with which a row leaves no room for another of its kind in its page.
const ROW_A_PAGE: i32 = 7600;
/// What Postgres calls a full disk.
const DISK_FULL: &str = "53100";

/// A column of a table that holds a text, and a statement that inserts `$1` rows with a text of `$2` bytes there.
fn padding(table: &str) -> (&'static str, &'static str) {
    match table {
        "attempts" => (
            "error_message",
            "INSERT INTO attempts (job_id, lease_generation, attempt, worker_id, microbatch_id, microbatch_size, ended_at,
                                   outcome, error_class, error_message, can_retry_help)
             SELECT gen_random_uuid(), 1, 1, gen_random_uuid(), gen_random_uuid(), 1, now(),
                    'error', 'bug', repeat('x', $2), true FROM generate_series(1, $1)",
        ),
        "images" => (
            "device",
            "INSERT INTO images (image_id, job_id, batch_id, acceptance_id, lease_generation, worker_id, width, height, seed,
                                 has_nsfw_concept, concept_scores, special_care_scores, prompt_truncated, weights_sha256,
                                 device, dtype, noise_dtype, text_encoder_ms, denoise_ms, vae_ms, safety_ms, encode_ms,
                                 upload_ms)
             SELECT gen_random_uuid(), gen_random_uuid(), gen_random_uuid(), gen_random_uuid(), 1, gen_random_uuid(), 64, 64,
                    1, true, '{}', '{}', false, repeat('0', 64), repeat('x', $2), 'f32', 'f32', 0, 0, 0, 0, 0, 0
             FROM generate_series(1, $1)",
        ),
        "jobs" => (
            "prompt",
            "INSERT INTO jobs (job_id, batch_id, model_id, ordinal, band, prompt, negative_prompt, seed,
                               num_inference_steps, guidance_scale, width, height, noise_scheduler, max_attempts)
             SELECT gen_random_uuid(), gen_random_uuid(), gen_random_uuid(), 0, 'normal', repeat('x', $2), '', 1,
                    2, 7.5, 64, 64, 'pndm', 3 FROM generate_series(1, $1)",
        ),
        _ => panic!("{table} has no padding"),
    }
}

async fn pages(pool: &PgPool, table: &str) -> i64 {
    let sql = "SELECT pg_relation_size($1::regclass)";
    let bytes: i64 = sqlx::query_scalar(sql).bind(table).fetch_one(pool).await.expect("a table has a size");
    bytes / PAGE
}

/// Adds `count` rows to `table` whose text has `bytes` bytes, and rolls them back, which leaves them where they are until a
/// vacuum.
async fn pad(pool: &PgPool, table: &str, count: i64, bytes: i32) -> Result<(), sqlx::Error> {
    let (column, fill) = padding(table);
    let mut transaction = pool.begin().await?;
    // Neither triggers nor foreign keys, and no moving of long texts to another place.
    let prepare = format!(
        "SET LOCAL session_replication_role = replica; ALTER TABLE {table} ALTER {column} SET STORAGE PLAIN"
    );
    sqlx::raw_sql(&prepare).execute(&mut *transaction).await?;
    sqlx::query(fill).bind(count).bind(bytes).execute(&mut *transaction).await?;
    transaction.rollback().await
}

/// From now on there is no room for another row in any of `tables` (`jobs`, `attempts`, `images`).
///
/// # Panics
/// When Postgres does not say that its disk is full.
pub async fn fill_postgres(servers: &Servers, pool: &PgPool, tables: &[&str]) {
    let mut wanted = PAGES;
    for table in tables {
        let off = format!("ALTER TABLE {table} SET (autovacuum_enabled = off)");
        sqlx::raw_sql(&off).execute(pool).await.expect("a superuser may");
        wanted = wanted.max(pages(pool, table).await + 1);
    }
    for table in tables {
        let count = wanted - pages(pool, table).await;
        pad(pool, table, count, ROW_A_PAGE).await.unwrap_or_else(|error| panic!("{table}: {error}"));
        assert_eq!(pages(pool, table).await, wanted, "{table}: a row a page");
    }
    // Half a page more, so that a page is begun and cannot be ended.
    limit_postgres(servers, Some(wanted * PAGE + PAGE / 2));
    for table in tables {
        // The gaps that are left in pages, until rows as small as can be do not fit any more.
        let error = loop {
            if let Err(error) = pad(pool, table, 100, 1).await {
                break error.into_database_error().expect("Postgres says so");
            }
        };
        assert_eq!(error.code().as_deref(), Some(DISK_FULL), "{table}: {error}");
    }
}

/// Gives Postgres its room back.
pub fn free_postgres(servers: &Servers) {
    limit_postgres(servers, None);
}

/// From now on no file of the S3 server may grow beyond `bytes`.
pub fn fill_s3(servers: &Servers, bytes: i64) {
    limit(servers.id().cast_signed(), Some(bytes));
}

/// Gives the S3 server its room back.
pub fn free_s3(servers: &Servers) {
    limit(servers.id().cast_signed(), None);
}

fn limit_postgres(servers: &Servers, bytes: Option<i64>) {
    let server = servers.postgres_pid().expect("Postgres runs").as_raw();
    // In this order: a session that starts in between has the limit from its parent.
    limit(server, bytes);
    for session in children(server) {
        limit(session, bytes);
    }
}

/// Sets the soft limit of a process, acting as its owner: a root without all capabilities may not do it to others.
fn limit(pid: i32, bytes: Option<i64>) {
    let limit = bytes.map_or("unlimited".to_owned(), |bytes| bytes.to_string());
    // A session that has ended meanwhile needs none.
    let Ok(owner) = std::fs::metadata(format!("/proc/{pid}")) else { return };
    let output = Command::new("prlimit")
        .args(["--pid", &pid.to_string(), &format!("--fsize={limit}:")])
        .uid(owner.uid())
        .gid(owner.gid())
        .output()
        .expect("util-linux has prlimit");
    let gone = !std::path::Path::new(&format!("/proc/{pid}")).exists();
    assert!(output.status.success() || gone, "prlimit {pid}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The processes that `parent` started itself.
fn children(parent: i32) -> Vec<i32> {
    let processes = std::fs::read_dir("/proc").expect("Linux").flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let parent_of = |pid: i32| stat(pid.cast_unsigned())?.get(1)?.parse::<i32>().ok();
    pids.filter(|pid| parent_of(*pid) == Some(parent)).collect()
}
