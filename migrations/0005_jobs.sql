-- Jobs: one picture owed, one prompt, one seed, one row, one state. The backlog of the whole fleet is this table, so that cancelling,
-- fairness and priority over a million queued jobs are one statement; the broker holds hints for a few minutes' worth.
--
-- Most updates are claims, lease extensions and completions. The fill factor leaves room for them on the page, and no index
-- contains `lease_expires_at`, so that an extension touches no index.

CREATE TABLE jobs (
    job_id              uuid PRIMARY KEY,
    batch_id            uuid NOT NULL,
    model_id            uuid NOT NULL,
    ordinal             integer NOT NULL CONSTRAINT jobs_ordinal CHECK (ordinal >= 0),
    source_line         integer CONSTRAINT jobs_source_line CHECK (source_line >= 1),
    client_ref          text CONSTRAINT jobs_client_ref CHECK (length(client_ref) <= 200),
    band                priority_band NOT NULL,

    prompt              text NOT NULL CONSTRAINT jobs_prompt CHECK (length(prompt) BETWEEN 1 AND 10000),
    negative_prompt     text NOT NULL CONSTRAINT jobs_negative_prompt CHECK (length(negative_prompt) <= 10000),
    seed                bigint NOT NULL CONSTRAINT jobs_seed CHECK (seed BETWEEN 0 AND 4294967295),
    num_inference_steps integer NOT NULL CONSTRAINT jobs_num_inference_steps CHECK (num_inference_steps BETWEEN 1 AND 999),
    guidance_scale      real NOT NULL CONSTRAINT jobs_guidance_scale CHECK (guidance_scale BETWEEN 0 AND 50),
    width               integer NOT NULL CONSTRAINT jobs_width CHECK (width BETWEEN 64 AND 2048 AND width % 8 = 0),
    height              integer NOT NULL CONSTRAINT jobs_height CHECK (height BETWEEN 64 AND 2048 AND height % 8 = 0),
    noise_scheduler     noise_scheduler NOT NULL,
    traceparent         text,

    state               job_state NOT NULL DEFAULT 'available',
    attempt             smallint NOT NULL DEFAULT 0,
    max_attempts        smallint NOT NULL,
    lease_generation    bigint NOT NULL DEFAULT 0 CONSTRAINT jobs_lease_generation CHECK (lease_generation >= 0),
    leased_by           uuid,
    lease_expires_at    timestamptz,
    scheduled_at        timestamptz,
    published_at        timestamptz,
    started_at          timestamptz,
    finalized_at        timestamptz,
    image_id            uuid,
    error_class         error_class,
    error_message       text,
    can_retry_help      boolean,
    created_at          timestamptz NOT NULL DEFAULT now(),

    CONSTRAINT jobs_one_per_ordinal UNIQUE (batch_id, ordinal),
    CONSTRAINT jobs_batch_fkey FOREIGN KEY (batch_id, model_id, created_at) REFERENCES batches (batch_id, model_id, created_at),
    CONSTRAINT jobs_worker_fkey FOREIGN KEY (leased_by, model_id) REFERENCES workers (worker_id, model_id),
    CONSTRAINT jobs_pixels CHECK (width * height <= 2048 * 1024),
    CONSTRAINT jobs_attempt CHECK (attempt BETWEEN 0 AND max_attempts),
    CONSTRAINT jobs_final_iff_finalized CHECK (
        (state IN ('completed', 'cancelled', 'discarded')) = (finalized_at IS NOT NULL)),
    CONSTRAINT jobs_running_iff_leased CHECK (
        (state = 'running') = (leased_by IS NOT NULL) AND (state = 'running') = (lease_expires_at IS NOT NULL)),
    CONSTRAINT jobs_running_has_attempt CHECK (state <> 'running' OR (attempt >= 1 AND lease_generation >= 1)),
    CONSTRAINT jobs_completed_iff_image CHECK ((state = 'completed') = (image_id IS NOT NULL)),
    CONSTRAINT jobs_retryable_iff_scheduled CHECK ((state = 'retryable') = (scheduled_at IS NOT NULL)),
    CONSTRAINT jobs_discarded_has_error CHECK (state <> 'discarded' OR error_class IS NOT NULL),
    CONSTRAINT jobs_error_whole CHECK (
        (error_class IS NULL) = (error_message IS NULL) AND (error_class IS NULL) = (can_retry_help IS NULL))
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.02);

COMMENT ON TABLE jobs IS 'One picture owed each. States and moves: job_state_transitions.';
COMMENT ON COLUMN jobs.ordinal IS 'Place in the batch, from 0.';
COMMENT ON COLUMN jobs.source_line IS 'Line of the submitted file, from 1.';
COMMENT ON COLUMN jobs.client_ref IS 'The submitter''s own name for the job.';
COMMENT ON COLUMN jobs.seed IS 'Of the picture''s noise; 32 bits, as torch''s CPU generator keeps them.';
COMMENT ON COLUMN jobs.attempt IS 'Attempts that count: claims, less those given back by a shutdown or a lost worker.';
COMMENT ON COLUMN jobs.lease_generation IS 'Fencing token: each claim adds one, nothing takes away. A writer with a smaller one is too late.';
COMMENT ON COLUMN jobs.published_at IS 'When its message was confirmed by the broker; null means the relay has yet to publish it.';
COMMENT ON COLUMN jobs.error_class IS 'Of the latest failed attempt, also when a later one went well.';
COMMENT ON COLUMN jobs.can_retry_help IS 'Whether another attempt may go better than the latest failed one.';

-- The outbox: what the relay has yet to publish, batch by batch in order. There is no other.
CREATE INDEX jobs_outbox ON jobs (model_id, band, batch_id, ordinal) WHERE state = 'available' AND published_at IS NULL;
-- What the broker should hold, and what workers hold: both stay small.
CREATE INDEX jobs_published ON jobs (model_id, band, batch_id) WHERE state = 'available' AND published_at IS NOT NULL;
CREATE INDEX jobs_running ON jobs (model_id, band, batch_id) WHERE state = 'running';
CREATE INDEX jobs_due ON jobs (scheduled_at) WHERE state = 'retryable';
CREATE INDEX jobs_by_state ON jobs (batch_id, state);

-- A job is written together with its batch, in its first state. Its batch's acceptance was checked in this transaction.
CREATE TRIGGER jobs_start_available BEFORE INSERT ON jobs
    FOR EACH ROW WHEN (
        NEW.state <> 'available' OR NEW.attempt <> 0 OR NEW.lease_generation <> 0 OR NEW.published_at IS NOT NULL
        OR NEW.error_class IS NOT NULL OR NEW.created_at <> now())
    EXECUTE FUNCTION refuse('jobs_start_available', 'a job is written as its batch is enqueued, available and unpublished');

CREATE FUNCTION require_all_jobs() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE written bigint;
BEGIN
    SELECT count(*) INTO written FROM jobs WHERE batch_id = NEW.batch_id;
    IF written <> NEW.job_count THEN
        RAISE EXCEPTION 'batch % has % jobs, but % were written', NEW.batch_id, NEW.job_count, written
            USING ERRCODE = 'check_violation', CONSTRAINT = 'batches_have_all_jobs', TABLE = TG_TABLE_NAME;
    END IF;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER batches_have_all_jobs AFTER INSERT ON batches
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION require_all_jobs();

CREATE FUNCTION require_known_transition() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM FROM job_state_transitions WHERE from_state = OLD.state AND to_state = NEW.state;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'a job does not go from % to %', OLD.state, NEW.state
            USING ERRCODE = 'check_violation', CONSTRAINT = 'jobs_transition', TABLE = TG_TABLE_NAME;
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER jobs_transition BEFORE UPDATE ON jobs
    FOR EACH ROW WHEN (OLD.state <> NEW.state) EXECUTE FUNCTION require_known_transition();

-- Fires before `jobs_transition` (triggers fire in the order of their names), and its message says more.
CREATE TRIGGER jobs_final_absorbs BEFORE UPDATE ON jobs
    FOR EACH ROW WHEN (OLD.state IN ('completed', 'cancelled', 'discarded'))
    EXECUTE FUNCTION refuse('jobs_final_absorbs', 'a job that is final is not changed any more');

CREATE TRIGGER jobs_generation_grows BEFORE UPDATE ON jobs
    FOR EACH ROW WHEN (NEW.lease_generation < OLD.lease_generation)
    EXECUTE FUNCTION refuse('jobs_generation_grows', 'a lease generation never goes down');

CREATE TRIGGER jobs_claim_draws_a_generation BEFORE UPDATE ON jobs
    FOR EACH ROW WHEN (NEW.state = 'running' AND NEW.lease_generation <= OLD.lease_generation
        AND (OLD.state <> 'running' OR OLD.leased_by <> NEW.leased_by))
    EXECUTE FUNCTION refuse('jobs_claim_draws_a_generation', 'a claim needs a new lease generation');

CREATE TRIGGER jobs_keep_their_spec BEFORE UPDATE ON jobs
    FOR EACH ROW WHEN (
        (OLD.job_id, OLD.batch_id, OLD.model_id, OLD.ordinal, OLD.source_line, OLD.client_ref, OLD.prompt,
         OLD.negative_prompt, OLD.seed, OLD.num_inference_steps, OLD.guidance_scale, OLD.width, OLD.height,
         OLD.noise_scheduler, OLD.created_at)
            IS DISTINCT FROM
        (NEW.job_id, NEW.batch_id, NEW.model_id, NEW.ordinal, NEW.source_line, NEW.client_ref, NEW.prompt,
         NEW.negative_prompt, NEW.seed, NEW.num_inference_steps, NEW.guidance_scale, NEW.width, NEW.height,
         NEW.noise_scheduler, NEW.created_at))
    EXECUTE FUNCTION refuse('jobs_keep_their_spec', 'what a job asks for is not changed after it was enqueued');

-- 5 s, 20 s, 80 s, … up to half an hour, a tenth more or less, so that jobs that failed together do not come back together.
CREATE FUNCTION retry_delay(attempt smallint) RETURNS interval LANGUAGE sql VOLATILE AS $$
    SELECT least(interval '30 minutes', interval '5 seconds' * 4 ^ least(attempt - 1, 10)) * (0.9 + 0.2 * random())
$$;
COMMENT ON FUNCTION retry_delay(smallint) IS 'How long a job waits after its nth failed attempt.';
