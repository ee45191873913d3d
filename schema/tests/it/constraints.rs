//! Every rule about batches and jobs refuses what it is there for, told by its name.

use schema::{CatalogError, JobSpec, JobState, MicrobatchId, NewJob};

use crate::support::{Fixture, LEASE, defaults, new_job, new_jobs, rule_of};

/// Asserts that each statement is refused by the rule beside it.
pub async fn assert_refused(fixture: &Fixture, refusals: &[(&str, String)]) {
    for (rule, sql) in refusals {
        assert_eq!(fixture.refusal(sql).await, *rule, "{sql}");
    }
}

#[tokio::test]
async fn a_jobs_columns_agree_with_its_state() {
    let fixture = Fixture::new().await;
    let worker_id = fixture.worker().await;
    let job_id = fixture.submit_one("available").await;
    let running = fixture.submit_one("running").await;
    fixture.claim_one(running, worker_id).await;
    let set = |change: &str| format!("UPDATE jobs SET {change} WHERE job_id = '{job_id}'");
    let set_running = |change: &str| format!("UPDATE jobs SET {change} WHERE job_id = '{running}'");
    let refusals = [
        ("jobs_final_iff_finalized", set("finalized_at = now()")),
        ("jobs_final_iff_finalized", set("state = 'cancelled'")),
        ("jobs_running_iff_leased", set(&format!("leased_by = '{worker_id}'"))),
        ("jobs_running_iff_leased", set("lease_expires_at = now()")),
        ("jobs_running_iff_leased", set("state = 'running', lease_generation = 1, attempt = 1")),
        ("jobs_running_iff_leased", set_running("leased_by = NULL")),
        ("jobs_running_iff_leased", set_running("lease_expires_at = NULL")),
        ("jobs_running_has_attempt", set_running("attempt = 0")),
        ("jobs_completed_iff_image", set_running("image_id = job_id")),
        (
            "jobs_completed_iff_image",
            set_running(
                "state = 'completed', leased_by = NULL, lease_expires_at = NULL, finalized_at = now()",
            ),
        ),
        ("jobs_retryable_iff_scheduled", set("scheduled_at = now()")),
        (
            "jobs_retryable_iff_scheduled",
            set_running("state = 'retryable', leased_by = NULL, lease_expires_at = NULL"),
        ),
        (
            "jobs_discarded_has_error",
            set_running(
                "state = 'discarded', leased_by = NULL, lease_expires_at = NULL, finalized_at = now()",
            ),
        ),
        ("jobs_error_whole", set("error_class = 'bug'")),
        ("jobs_error_whole", set("error_message = 'why'")),
        ("jobs_error_whole", set("can_retry_help = true")),
        ("jobs_attempt", set("attempt = 4")),
        ("jobs_attempt", set("attempt = -1")),
        ("jobs_generation_grows", set_running("lease_generation = 0")),
        ("jobs_worker_fkey", set_running("leased_by = job_id, lease_generation = 2")),
    ];
    assert_refused(&fixture, &refusals).await;
    assert_eq!(fixture.state(job_id).await, JobState::Available);
    assert_eq!(fixture.state(running).await, JobState::Running);
}

#[tokio::test]
async fn a_claim_needs_a_new_generation() {
    let fixture = Fixture::new().await;
    let (first, second) = (fixture.worker().await, fixture.worker().await);
    let job_id = fixture.submit_one("one").await;
    let claim = "state = 'running', attempt = 1, lease_expires_at = now()";
    let refusals = [(
        "jobs_claim_draws_a_generation",
        format!("UPDATE jobs SET {claim}, leased_by = '{first}' WHERE job_id = '{job_id}'"),
    )];
    assert_refused(&fixture, &refusals).await;
    fixture.claim_one(job_id, first).await;
    let steal = format!("UPDATE jobs SET leased_by = '{second}' WHERE job_id = '{job_id}'");
    assert_refused(&fixture, &[("jobs_claim_draws_a_generation", steal)]).await;
}

#[tokio::test]
async fn what_a_job_asks_for_is_fixed() {
    let fixture = Fixture::new().await;
    let job_id = fixture.submit_one("fixed").await;
    for change in [
        "prompt = 'other'",
        "negative_prompt = 'other'",
        "seed = 1",
        "num_inference_steps = 1",
        "guidance_scale = 1",
        "width = 64",
        "height = 64",
        "noise_scheduler = 'lms'",
        "client_ref = 'other'",
        "ordinal = 1",
        "source_line = 2",
        "created_at = created_at - interval '1 day'",
        "batch_id = job_id",
        "model_id = job_id",
        "job_id = batch_id",
    ] {
        let sql = format!("UPDATE jobs SET {change} WHERE job_id = '{job_id}'");
        assert_eq!(fixture.refusal(&sql).await, "jobs_keep_their_spec", "{change}");
    }
    for change in ["guidance_start = 0.1", "guidance_stop = 0.9", "cache_interval = 2"] {
        let sql = format!("UPDATE jobs SET {change} WHERE job_id = '{job_id}'");
        assert_eq!(fixture.refusal(&sql).await, "jobs_keep_their_recipe", "{change}");
    }
    // Those two look only at statements that name these columns, which is enough while no trigger writes to them.
    let writers = "SELECT count(*) FROM pg_trigger WHERE tgrelid = 'jobs'::regclass AND NOT tgisinternal
                   AND tgfoid NOT IN ('refuse'::regproc, 'require_known_transition'::regproc)";
    assert_eq!(fixture.count(writers).await, 0, "a trigger that may change a job");
}

/// A job can only come with its batch: inserting a copy with one thing changed.
#[tokio::test]
async fn jobs_keep_the_limits_of_the_spec() {
    let fixture = Fixture::new().await;
    let (_, job_ids) = fixture.submit("limits", 1).await;
    // All in one statement, so that the new batch and its job meet at its end.
    let insert = |column: &str, value: &str| {
        let mut columns: Vec<(&str, &str)> = vec![
            ("job_id", "gen_random_uuid()"),
            ("batch_id", "fresh.batch_id"),
            ("model_id", "job.model_id"),
            ("ordinal", "0"),
            ("source_line", "1"),
            ("client_ref", "NULL"),
            ("band", "job.band"),
            ("prompt", "'a'"),
            ("negative_prompt", "''"),
            ("seed", "0"),
            ("num_inference_steps", "50"),
            ("guidance_scale", "7.5"),
            ("width", "512"),
            ("height", "512"),
            ("noise_scheduler", "'pndm'"),
            ("max_attempts", "3"),
        ];
        match columns.iter_mut().find(|(name, _)| *name == column) {
            Some(known) => known.1 = value,
            None => columns.push((column, value)),
        }
        let names: Vec<_> = columns.iter().map(|(name, _)| *name).collect();
        let values: Vec<_> = columns.iter().map(|(_, value)| *value).collect();
        format!(
            "WITH job AS (SELECT * FROM jobs WHERE job_id = '{}'), fresh AS (
                 INSERT INTO batches (batch_id, name, principal, model_id, licence_id, acceptance_id, idempotency_key,
                                      request_sha256, source_name, defaults, band, job_count, max_attempts)
                 SELECT gen_random_uuid(), name, principal, batches.model_id, licence_id, acceptance_id,
                        gen_random_uuid()::text, request_sha256, source_name, defaults, batches.band, 1, 3
                 FROM batches JOIN job USING (batch_id)
                 RETURNING batch_id)
             INSERT INTO jobs ({}) SELECT {} FROM job, fresh",
            job_ids[0],
            names.join(", "),
            values.join(", "),
        )
    };
    sqlx::raw_sql(&insert("width", "64")).execute(&fixture.pool).await.expect("a good row goes in");
    let refusals: Vec<(&str, String)> = [
        ("jobs_prompt", "prompt", "''"),
        ("jobs_prompt", "prompt", "repeat('x', 10001)"),
        ("jobs_negative_prompt", "negative_prompt", "repeat('x', 10001)"),
        ("jobs_seed", "seed", "-1"),
        ("jobs_seed", "seed", "4294967296"),
        ("jobs_num_inference_steps", "num_inference_steps", "0"),
        ("jobs_num_inference_steps", "num_inference_steps", "1000"),
        ("jobs_guidance_scale", "guidance_scale", "-0.5"),
        ("jobs_guidance_scale", "guidance_scale", "50.5"),
        ("jobs_guidance_scale", "guidance_scale", "'NaN'"),
        ("jobs_guidance_scale", "guidance_scale", "'Infinity'"),
        ("jobs_width", "width", "56"),
        ("jobs_width", "width", "500"),
        ("jobs_height", "height", "2056"),
        ("jobs_guidance_start", "guidance_start", "-0.1"),
        // NaN is greater than all numbers, and the rules are looked at in the order of their names.
        ("jobs_guidance_interval", "guidance_start", "'NaN'"),
        ("jobs_guidance_stop", "guidance_stop", "1.1"),
        ("jobs_guidance_stop", "guidance_stop", "'NaN'"),
        ("jobs_guidance_interval", "guidance_start, guidance_stop", "0.7, 0.2"),
        ("jobs_cache_interval", "cache_interval", "0"),
        ("jobs_cache_interval", "cache_interval", "1000"),
        ("jobs_client_ref", "client_ref", "repeat('x', 201)"),
        ("jobs_ordinal", "ordinal", "-1"),
        ("jobs_source_line", "source_line", "0"),
        ("jobs_start_available", "attempt", "1"),
        ("jobs_start_available", "lease_generation", "1"),
        ("jobs_start_available", "published_at", "now()"),
        ("jobs_start_available", "created_at", "now() - interval '1 day'"),
        ("jobs_start_available", "state", "'running'"),
        ("jobs_batch_fkey", "batch_id", "gen_random_uuid()"),
        ("jobs_batch_fkey", "model_id", "gen_random_uuid()"),
    ]
    .into_iter()
    .map(|(rule, column, value)| (rule, insert(column, value)))
    .collect();
    assert_refused(&fixture, &refusals).await;
}

#[tokio::test]
async fn rust_and_sql_agree_on_the_largest_size() {
    let fixture = Fixture::new().await;
    let prompt = "wide".to_owned();
    let biggest = JobSpec { prompt, width: Some(2048), height: Some(1024), ..JobSpec::default() };
    let jobs = [NewJob { spec: biggest.validate(&defaults()).unwrap(), source_line: None }];
    fixture.catalog.submit_batch(&fixture.new_batch("wide"), &jobs).await.unwrap();
    let constraint = "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = 'jobs_pixels'";
    let text: String = sqlx::query_scalar(constraint).fetch_one(&fixture.pool).await.unwrap();
    assert!(text.contains("2048 * 1024"), "{text}");
    assert_eq!(schema::limits::MAX_PIXELS, 2048 * 1024);
}

#[tokio::test]
async fn a_batch_comes_with_all_its_jobs_and_no_later_ones() {
    let fixture = Fixture::new().await;
    let (batch_id, job_ids) = fixture.submit("whole", 2).await;
    let copy_batch = format!(
        "INSERT INTO batches (batch_id, name, principal, model_id, licence_id, acceptance_id, idempotency_key,
                              request_sha256, source_name, defaults, band, job_count, max_attempts)
         SELECT gen_random_uuid(), name, principal, model_id, licence_id, acceptance_id, 'other', request_sha256,
                source_name, defaults, band, 1, max_attempts FROM batches WHERE batch_id = '{batch_id}'"
    );
    let late_job = format!(
        "INSERT INTO jobs (job_id, batch_id, model_id, ordinal, band, prompt, negative_prompt, seed,
                           num_inference_steps, guidance_scale, width, height, noise_scheduler, max_attempts {{more}})
         SELECT gen_random_uuid(), batch_id, model_id, 7, band, prompt, negative_prompt, seed,
                num_inference_steps, guidance_scale, width, height, noise_scheduler, max_attempts {{value}}
         FROM jobs WHERE job_id = '{}'",
        job_ids[0]
    );
    let refusals = [
        ("batches_have_all_jobs", copy_batch),
        // At its own time there is no such batch, and at the batch's time it is not now.
        ("jobs_batch_fkey", late_job.replace("{more}", "").replace("{value}", "")),
        (
            "jobs_start_available",
            late_job.replace("{more}", ", created_at").replace("{value}", ", created_at"),
        ),
    ];
    assert_refused(&fixture, &refusals).await;
}

#[tokio::test]
async fn a_batch_keeps_its_terms() {
    let fixture = Fixture::new().await;
    let (batch_id, _) = fixture.submit("terms", 1).await;
    for change in [
        "principal = 'eve'",
        "job_count = 2",
        "acceptance_id = gen_random_uuid()",
        "licence_id = gen_random_uuid()",
        "model_id = gen_random_uuid()",
        "idempotency_key = 'other'",
        "created_at = now()",
    ] {
        let sql = format!("UPDATE batches SET {change} WHERE batch_id = '{batch_id}'");
        assert_eq!(fixture.refusal(&sql).await, "batches_keep_their_terms", "{change}");
    }
}

#[tokio::test]
async fn a_worker_cannot_hold_another_models_job() {
    let fixture = Fixture::new().await;
    let other = fixture.catalog.add_model(&crate::support::new_model("other")).await.unwrap().model;
    let mut batch = fixture.new_batch("other");
    batch.model = other.name;
    let submitted = fixture.catalog.submit_batch(&batch, &new_jobs(1)).await.unwrap();
    let job_id = schema::JobId::of(submitted.batch_id, 0);
    let worker_id = fixture.worker().await;
    let error =
        fixture.catalog.claim_if_available(&[job_id], worker_id, MicrobatchId::generate(), LEASE).await;
    match error.unwrap_err() {
        CatalogError::Refused { rule, .. } => assert_eq!(rule, "jobs_worker_fkey"),
        other => panic!("{other:?}"),
    }
    assert_eq!(fixture.state(job_id).await, JobState::Available);
}

#[tokio::test]
async fn a_refusal_names_its_rule_and_its_reason() {
    let fixture = Fixture::new().await;
    let mut batch = fixture.new_batch("bad");
    batch.max_attempts = 0;
    let error = fixture.catalog.submit_batch(&batch, &[new_job("a", 1)]).await.unwrap_err();
    insta::assert_snapshot!(error, @"the catalog refused a change, by its rule `batches_max_attempts`");
    let sql = "UPDATE job_state_transitions SET to_state = 'running' WHERE to_state = 'cancelled'";
    let duplicate = sqlx::query(sql).execute(&fixture.pool).await.unwrap_err();
    assert_eq!(rule_of(duplicate), "job_state_transitions_pkey");
}
