-- Recipes: what a job leaves out of the denoising for speed. Each changes the picture, so none is ever used unless asked for, and what was
-- used stands on both rows. The defaults are the exact picture, which is what all rows before this were and what a build that does not
-- know these columns writes. Such a build would also draw the exact picture of a job with a recipe; the trigger on images refuses it.
--
-- Fractions are double precision because they are multiplied with the number of steps and cut: as `real`, 0.7 of ten steps would be six.

ALTER TABLE jobs
    ADD COLUMN guidance_start double precision NOT NULL DEFAULT 0
        CONSTRAINT jobs_guidance_start CHECK (guidance_start BETWEEN 0 AND 1),
    ADD COLUMN guidance_stop double precision NOT NULL DEFAULT 1
        CONSTRAINT jobs_guidance_stop CHECK (guidance_stop BETWEEN 0 AND 1),
    ADD COLUMN cache_interval integer NOT NULL DEFAULT 1
        CONSTRAINT jobs_cache_interval CHECK (cache_interval BETWEEN 1 AND 999),
    ADD CONSTRAINT jobs_guidance_interval CHECK (guidance_start <= guidance_stop);
COMMENT ON COLUMN jobs.guidance_start IS 'First step with classifier-free guidance, as a fraction of all steps. 0, with guidance_stop 1, is all of them: exact.';
COMMENT ON COLUMN jobs.guidance_stop IS 'End of the steps with classifier-free guidance, as a fraction of all steps.';
COMMENT ON COLUMN jobs.cache_interval IS 'Every so many steps the whole UNet is run, and only its outermost layer between them (DeepCache). 1 is always the whole: exact.';

CREATE TRIGGER jobs_keep_their_recipe BEFORE UPDATE ON jobs
    FOR EACH ROW WHEN (
        (OLD.guidance_start, OLD.guidance_stop, OLD.cache_interval)
            IS DISTINCT FROM (NEW.guidance_start, NEW.guidance_stop, NEW.cache_interval))
    EXECUTE FUNCTION refuse('jobs_keep_their_recipe', 'what a job asks for is not changed after it was enqueued');

ALTER TABLE images
    ADD COLUMN guidance_start double precision NOT NULL DEFAULT 0,
    ADD COLUMN guidance_stop double precision NOT NULL DEFAULT 1,
    ADD COLUMN cache_interval integer NOT NULL DEFAULT 1;
COMMENT ON COLUMN images.guidance_start IS 'As the worker drew it; equal to its job''s, as are guidance_stop and cache_interval.';
COMMENT ON COLUMN images.guidance_stop IS 'As the worker drew it.';
COMMENT ON COLUMN images.cache_interval IS 'As the worker drew it.';

CREATE FUNCTION require_the_jobs_recipe() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    -- A job that is not there is for the foreign key to tell.
    PERFORM FROM jobs WHERE job_id = NEW.job_id
        AND (guidance_start, guidance_stop, cache_interval) <> (NEW.guidance_start, NEW.guidance_stop, NEW.cache_interval);
    IF FOUND THEN
        RAISE EXCEPTION 'image % was not drawn by the recipe of its job', NEW.image_id
            USING ERRCODE = 'check_violation', CONSTRAINT = 'images_recipe_is_the_jobs', TABLE = TG_TABLE_NAME;
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER images_recipe_is_the_jobs BEFORE INSERT ON images
    FOR EACH ROW EXECUTE FUNCTION require_the_jobs_recipe();

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
       images.guidance_start, images.guidance_stop, images.cache_interval
FROM images
JOIN jobs USING (job_id)
JOIN batches ON batches.batch_id = images.batch_id
JOIN models ON models.model_id = jobs.model_id
JOIN licences ON licences.licence_id = batches.licence_id
JOIN licence_acceptances AS acceptance ON acceptance.acceptance_id = images.acceptance_id
JOIN workers ON workers.worker_id = images.worker_id
JOIN attempts ON attempts.job_id = images.job_id AND attempts.lease_generation = images.lease_generation;
