-- What computed a picture on a GPU: with the same here, the same spec and the same weights, its bits are the same (P8). So far it stood in the
-- PNG alone, where SQL does not see it. On the CPU the bits are the same everywhere, and the columns are null; so they are on the rows of
-- builds before this one.

ALTER TABLE images
    ADD COLUMN engine_gpu text,
    ADD COLUMN engine_driver text,
    ADD COLUMN engine_torch text,
    ADD COLUMN engine_cudnn text,
    ADD COLUMN engine_kernels text,
    ADD COLUMN engine_batch_size integer CONSTRAINT images_engine_batch_size CHECK (engine_batch_size >= 1),
    ADD COLUMN engine_decode_size integer CONSTRAINT images_engine_decode_size CHECK (engine_decode_size >= 1),
    ADD CONSTRAINT images_engine_whole CHECK (
        num_nulls(engine_gpu, engine_driver, engine_torch, engine_cudnn, engine_kernels, engine_batch_size,
                  engine_decode_size) IN (0, 7));
COMMENT ON COLUMN images.engine_gpu IS 'The GPU''s model; null, as are all engine columns, for a picture that was drawn on the CPU.';
COMMENT ON COLUMN images.engine_driver IS 'Version of the GPU''s driver.';
COMMENT ON COLUMN images.engine_torch IS 'Version of libtorch.';
COMMENT ON COLUMN images.engine_cudnn IS 'Version of cuDNN.';
COMMENT ON COLUMN images.engine_kernels IS 'The kernels: `plain`, or others and what they were compiled for.';
COMMENT ON COLUMN images.engine_batch_size IS 'Pictures that were computed at once, made-up ones included.';
COMMENT ON COLUMN images.engine_decode_size IS 'Pictures that the VAE decoded at once, at most.';

-- A view's columns can only be added at its end.
CREATE OR REPLACE VIEW v_images AS
SELECT images.image_id, images.job_id, batches.batch_id, batches.name AS batch_name, jobs.ordinal, jobs.source_line,
       jobs.client_ref, batches.principal, models.name AS model, jobs.prompt, jobs.negative_prompt, images.seed,
       jobs.num_inference_steps, jobs.guidance_scale, images.width, images.height, jobs.noise_scheduler,
       images.has_nsfw_concept, images.concept_scores, images.special_care_scores, images.prompt_truncated,
       images.bucket, images.object_key, images.sha256, images.size_bytes,
       licences.name AS licence, licences.text_sha256 AS licence_sha256, images.acceptance_id, acceptance.accepted_at,
       images.weights_sha256, workers.name AS worker, images.device, images.dtype, images.noise_dtype,
       attempts.attempt, attempts.microbatch_id, attempts.microbatch_size,
       images.text_encoder_ms, images.denoise_ms, images.vae_ms, images.safety_ms, images.encode_ms, images.upload_ms,
       batches.created_at AS submitted_at, attempts.started_at, images.created_at,
       images.guidance_start, images.guidance_stop, images.cache_interval,
       images.engine_gpu, images.engine_driver, images.engine_torch, images.engine_cudnn, images.engine_kernels,
       images.engine_batch_size, images.engine_decode_size
FROM images
JOIN jobs USING (job_id)
JOIN batches ON batches.batch_id = images.batch_id
JOIN models ON models.model_id = jobs.model_id
JOIN licences ON licences.licence_id = batches.licence_id
JOIN licence_acceptances AS acceptance ON acceptance.acceptance_id = images.acceptance_id
JOIN workers ON workers.worker_id = images.worker_id
JOIN attempts ON attempts.job_id = images.job_id AND attempts.lease_generation = images.lease_generation;
