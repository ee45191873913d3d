-- Attempts and images: what was tried and what came out. Analysts ask these tables, so the columns are typed and nothing hides in
-- JSON. An image row says that its object exists, with that digest and size (P3), is the only one of its job (P2), and names the
-- licence acceptance it was made under (P5). It is never changed and never removed.

CREATE TABLE attempts (
    job_id           uuid NOT NULL CONSTRAINT attempts_job_fkey REFERENCES jobs,
    lease_generation bigint NOT NULL CONSTRAINT attempts_lease_generation CHECK (lease_generation >= 1),
    attempt          smallint NOT NULL CONSTRAINT attempts_attempt CHECK (attempt >= 1),
    worker_id        uuid NOT NULL CONSTRAINT attempts_worker_fkey REFERENCES workers,
    microbatch_id    uuid NOT NULL,
    microbatch_size  integer NOT NULL CONSTRAINT attempts_microbatch_size CHECK (microbatch_size >= 1),
    started_at       timestamptz NOT NULL DEFAULT now(),
    ended_at         timestamptz,
    outcome          attempt_outcome,
    error_class      error_class,
    error_message    text,
    can_retry_help   boolean,
    CONSTRAINT attempts_pkey PRIMARY KEY (job_id, lease_generation),
    CONSTRAINT attempts_ended_iff_outcome CHECK ((ended_at IS NULL) = (outcome IS NULL)),
    CONSTRAINT attempts_error_iff_class CHECK ((outcome IS NOT DISTINCT FROM 'error') = (error_class IS NOT NULL)),
    CONSTRAINT attempts_error_whole CHECK (
        (error_class IS NULL) = (error_message IS NULL) AND (error_class IS NULL) = (can_retry_help IS NULL))
) WITH (fillfactor = 80);
CREATE INDEX attempts_by_worker ON attempts (worker_id, started_at);
-- A job has one lease at a time, so it has one open attempt at a time.
CREATE UNIQUE INDEX attempts_one_open ON attempts (job_id) WHERE ended_at IS NULL;
COMMENT ON TABLE attempts IS 'Every claim of a job, and how it ended. The same attempt number comes again when an attempt was given back.';
COMMENT ON COLUMN attempts.microbatch_id IS 'Equal for the jobs that were claimed to share a forward pass.';

CREATE TRIGGER attempts_end_once BEFORE UPDATE ON attempts
    FOR EACH ROW WHEN (OLD.ended_at IS NOT NULL)
    EXECUTE FUNCTION refuse('attempts_end_once', 'an attempt that has ended is not changed any more');

CREATE TABLE images (
    image_id            uuid PRIMARY KEY,
    job_id              uuid NOT NULL UNIQUE,
    batch_id            uuid NOT NULL,
    acceptance_id       uuid NOT NULL,
    lease_generation    bigint NOT NULL,
    worker_id           uuid NOT NULL CONSTRAINT images_worker_fkey REFERENCES workers,
    bucket              text,
    object_key          text UNIQUE,
    sha256              sha256_hex,
    size_bytes          bigint CONSTRAINT images_size_bytes CHECK (size_bytes > 0),
    width               integer NOT NULL,
    height              integer NOT NULL,
    seed                bigint NOT NULL,
    has_nsfw_concept    boolean,
    concept_scores      real[],
    special_care_scores real[],
    prompt_truncated    boolean NOT NULL,
    weights_sha256      sha256_hex NOT NULL,
    device              text NOT NULL,
    dtype               text NOT NULL,
    noise_dtype         text NOT NULL,
    text_encoder_ms     real NOT NULL,
    denoise_ms          real NOT NULL,
    vae_ms              real NOT NULL,
    safety_ms           real NOT NULL,
    encode_ms           real NOT NULL,
    upload_ms           real NOT NULL,
    created_at          timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT images_of_job UNIQUE (image_id, job_id),
    CONSTRAINT images_attempt_fkey FOREIGN KEY (job_id, lease_generation) REFERENCES attempts (job_id, lease_generation),
    CONSTRAINT images_acceptance_fkey FOREIGN KEY (batch_id, acceptance_id) REFERENCES batches (batch_id, acceptance_id),
    CONSTRAINT images_flagged_xor_object CHECK ((has_nsfw_concept IS TRUE) = (object_key IS NULL)),
    CONSTRAINT images_object_whole CHECK (
        (object_key IS NULL) = (bucket IS NULL) AND (object_key IS NULL) = (sha256 IS NULL)
        AND (object_key IS NULL) = (size_bytes IS NULL)),
    CONSTRAINT images_key_is_of_batch CHECK (object_key LIKE '%/' || batch_id || '/%'),
    CONSTRAINT images_verdict_whole CHECK (
        (has_nsfw_concept IS NULL) = (concept_scores IS NULL) AND (has_nsfw_concept IS NULL) = (special_care_scores IS NULL)),
    CONSTRAINT images_scores_are_numbers CHECK (
        array_position(concept_scores, NULL) IS NULL AND array_position(concept_scores, 'NaN') IS NULL
        AND array_position(special_care_scores, NULL) IS NULL AND array_position(special_care_scores, 'NaN') IS NULL)
);
CREATE INDEX images_by_batch ON images (batch_id, has_nsfw_concept);
CREATE INDEX images_by_time ON images USING brin (created_at);
COMMENT ON TABLE images IS 'One row for each completed job. Never changed, never removed.';
COMMENT ON COLUMN images.object_key IS 'Where the PNG lies in the bucket; null for a flagged picture, whose pixels are not kept.';
COMMENT ON COLUMN images.sha256 IS 'Of the PNG.';
COMMENT ON COLUMN images.has_nsfw_concept IS 'The safety checker''s verdict; null when the model has no checker.';
COMMENT ON COLUMN images.concept_scores IS 'Cosine similarity less threshold, one a concept; above zero is a find.';
COMMENT ON COLUMN images.prompt_truncated IS 'Whether the text encoder read only the beginning of the prompt.';
COMMENT ON COLUMN images.noise_dtype IS 'The dtype that the noise was drawn in: the same seed draws other noise in another.';
COMMENT ON COLUMN images.denoise_ms IS 'Of the whole microbatch, as are text_encoder_ms, vae_ms and safety_ms.';

CREATE TRIGGER images_are_kept BEFORE UPDATE OR DELETE ON images
    FOR EACH ROW EXECUTE FUNCTION refuse('images_are_kept', 'an image row is never changed or removed');
CREATE TRIGGER images_are_not_truncated BEFORE TRUNCATE ON images
    FOR EACH STATEMENT EXECUTE FUNCTION refuse('images_are_kept', 'an image row is never changed or removed');

ALTER TABLE jobs ADD CONSTRAINT jobs_image_fkey FOREIGN KEY (image_id, job_id) REFERENCES images (image_id, job_id);

-- The other direction: an image row counts, that is, its job is completed and names it.
CREATE FUNCTION require_completed_job() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM FROM jobs WHERE job_id = NEW.job_id AND state = 'completed' AND image_id = NEW.image_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'image % is not the image of a completed job', NEW.image_id
            USING ERRCODE = 'check_violation', CONSTRAINT = 'image_counts', TABLE = TG_TABLE_NAME;
    END IF;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER image_counts AFTER INSERT ON images
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION require_completed_job();
