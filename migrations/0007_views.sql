-- Views for people who ask SQL. They are flat, named for what a row is, and stable where the tables may change.

CREATE VIEW v_images AS
SELECT images.image_id, images.job_id, batches.batch_id, batches.name AS batch_name, jobs.ordinal, jobs.source_line,
       jobs.client_ref, batches.principal, models.name AS model, jobs.prompt, jobs.negative_prompt, images.seed,
       jobs.num_inference_steps, jobs.guidance_scale, images.width, images.height, jobs.noise_scheduler,
       images.has_nsfw_concept, images.concept_scores, images.special_care_scores, images.prompt_truncated,
       images.bucket, images.object_key, images.sha256, images.size_bytes,
       licences.name AS licence, licences.text_sha256 AS licence_sha256, images.acceptance_id, acceptance.accepted_at,
       images.weights_sha256, workers.name AS worker, images.device, images.dtype, images.noise_dtype,
       attempts.attempt, attempts.microbatch_id, attempts.microbatch_size,
       images.text_encoder_ms, images.denoise_ms, images.vae_ms, images.safety_ms, images.encode_ms, images.upload_ms,
       batches.created_at AS submitted_at, attempts.started_at, images.created_at
FROM images
JOIN jobs USING (job_id)
JOIN batches ON batches.batch_id = images.batch_id
JOIN models ON models.model_id = jobs.model_id
JOIN licences ON licences.licence_id = batches.licence_id
JOIN licence_acceptances AS acceptance ON acceptance.acceptance_id = images.acceptance_id
JOIN workers ON workers.worker_id = images.worker_id
JOIN attempts ON attempts.job_id = images.job_id AND attempts.lease_generation = images.lease_generation;
COMMENT ON VIEW v_images IS 'One row an image, with its prompt, settings, verdict, place, licence and maker. A flagged image has no object_key.';

CREATE VIEW v_batch_progress AS
SELECT batches.batch_id, batches.name, batches.principal, models.name AS model, batches.band,
       batches.job_count::bigint AS job_count,
       count(*) FILTER (WHERE jobs.state = 'available') AS available,
       count(*) FILTER (WHERE jobs.state = 'running') AS running,
       count(*) FILTER (WHERE jobs.state = 'retryable') AS retryable,
       count(*) FILTER (WHERE jobs.state = 'completed') AS completed,
       count(*) FILTER (WHERE jobs.state = 'cancelled') AS cancelled,
       count(*) FILTER (WHERE jobs.state = 'discarded') AS discarded,
       (SELECT count(*) FROM images WHERE images.batch_id = batches.batch_id AND has_nsfw_concept) AS flagged,
       batches.created_at, batches.cancelled_at,
       min(jobs.started_at) AS first_started_at,
       min(jobs.finalized_at) AS first_finalized_at,
       max(jobs.finalized_at) AS last_finalized_at
FROM batches
JOIN models USING (model_id)
JOIN jobs USING (batch_id)
GROUP BY batches.batch_id, models.name;
COMMENT ON VIEW v_batch_progress IS 'One row a batch: its jobs by state. completed includes the flagged.';

CREATE VIEW v_failure_reasons AS
SELECT jobs.batch_id, batches.name AS batch_name, attempts.error_class, attempts.can_retry_help, attempts.error_message,
       count(*) AS attempt_count,
       count(DISTINCT attempts.job_id) AS job_count,
       count(DISTINCT attempts.job_id) FILTER (WHERE jobs.state = 'discarded') AS discarded_job_count,
       min(attempts.ended_at) AS first_at,
       max(attempts.ended_at) AS last_at
FROM attempts
JOIN jobs USING (job_id)
JOIN batches ON batches.batch_id = jobs.batch_id
WHERE attempts.outcome = 'error'
GROUP BY jobs.batch_id, batches.name, attempts.error_class, attempts.can_retry_help, attempts.error_message;
COMMENT ON VIEW v_failure_reasons IS 'Why attempts failed, by batch and message, and what became of their jobs.';

CREATE VIEW v_worker_utilisation AS
SELECT workers.worker_id, workers.name, workers.host, models.name AS model, workers.device,
       workers.started_at, workers.last_seen_at, workers.stopped_at,
       coalesce(work.image_count, 0) AS image_count,
       coalesce(work.microbatch_count, 0) AS microbatch_count,
       coalesce(work.busy_seconds, 0) AS busy_seconds,
       extract(epoch FROM greatest(workers.last_seen_at, workers.stopped_at) - workers.started_at) AS up_seconds
FROM workers
JOIN models USING (model_id)
LEFT JOIN LATERAL (
    SELECT count(*) FILTER (WHERE outcome = 'ok') AS image_count,
           count(DISTINCT microbatch_id) AS microbatch_count,
           (SELECT sum(extract(epoch FROM upper(busy) - lower(busy)))
            FROM unnest(range_agg(tstzrange(attempts.started_at, attempts.ended_at))) AS busy) AS busy_seconds
    FROM attempts WHERE attempts.worker_id = workers.worker_id AND ended_at IS NOT NULL
) AS work ON true;
COMMENT ON VIEW v_worker_utilisation IS 'One row a worker process: what it drew, and how long it held work out of the time it was up.';
