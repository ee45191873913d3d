-- Batches: what a person enqueued. Here the licence rule is held (P5): a batch names an acceptance of its model's licence by
-- its own principal, which is valid at that moment, and its jobs are written in the same transaction.

CREATE TABLE batches (
    batch_id        uuid PRIMARY KEY,
    name            text NOT NULL CONSTRAINT batches_name CHECK (length(name) BETWEEN 1 AND 200),
    principal       text NOT NULL,
    model_id        uuid NOT NULL,
    licence_id      uuid NOT NULL,
    acceptance_id   uuid NOT NULL,
    idempotency_key text NOT NULL CONSTRAINT batches_idempotency_key CHECK (length(idempotency_key) BETWEEN 1 AND 200),
    request_sha256  sha256_hex NOT NULL,
    source_name     text NOT NULL,
    defaults        jsonb NOT NULL,
    band            priority_band NOT NULL,
    job_count       integer NOT NULL CONSTRAINT batches_job_count CHECK (job_count >= 1),
    max_attempts    smallint NOT NULL CONSTRAINT batches_max_attempts CHECK (max_attempts >= 1),
    created_at      timestamptz NOT NULL DEFAULT now(),
    cancelled_at    timestamptz,
    CONSTRAINT batches_one_per_key UNIQUE (principal, idempotency_key),
    CONSTRAINT batches_for_images UNIQUE (batch_id, acceptance_id),
    CONSTRAINT batches_for_jobs UNIQUE (batch_id, model_id, created_at),
    CONSTRAINT batches_model_fkey FOREIGN KEY (model_id, licence_id) REFERENCES models (model_id, licence_id),
    CONSTRAINT batches_acceptance_fkey FOREIGN KEY (acceptance_id, licence_id, principal)
        REFERENCES licence_acceptances (acceptance_id, licence_id, principal)
);
CREATE INDEX batches_latest ON batches (created_at);
CREATE INDEX batches_by_name ON batches (name);
COMMENT ON TABLE batches IS 'What a person enqueued: a file of prompts and its settings.';
COMMENT ON COLUMN batches.acceptance_id IS 'The acceptance of the model''s licence by the principal that was valid when the batch was enqueued.';
COMMENT ON COLUMN batches.idempotency_key IS 'One key of one principal, one batch, however often it is sent.';
COMMENT ON COLUMN batches.request_sha256 IS 'Digest of the request without its key: tells a repetition from a conflict.';
COMMENT ON COLUMN batches.defaults IS 'What the jobs got where their specs said nothing.';

-- The lock makes a revocation that is under way finish first, so that "valid when enqueued" has one answer.
CREATE FUNCTION require_valid_acceptance() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM FROM licence_acceptances
        WHERE acceptance_id = NEW.acceptance_id AND revoked_at IS NULL FOR SHARE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'licence acceptance % is revoked or does not exist', NEW.acceptance_id
            USING ERRCODE = 'check_violation', CONSTRAINT = 'batches_acceptance_valid', TABLE = TG_TABLE_NAME;
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER batches_acceptance_valid BEFORE INSERT ON batches
    FOR EACH ROW EXECUTE FUNCTION require_valid_acceptance();

-- Jobs point at (batch_id, model_id, created_at) and may only be written at that very time: this batch starts now.
CREATE TRIGGER batches_start_now BEFORE INSERT ON batches
    FOR EACH ROW WHEN (NEW.created_at <> now() OR NEW.cancelled_at IS NOT NULL)
    EXECUTE FUNCTION refuse('batches_start_now', 'a batch is written as it is enqueued, not cancelled');

CREATE TRIGGER batches_keep_their_terms BEFORE UPDATE ON batches
    FOR EACH ROW WHEN (
        (OLD.batch_id, OLD.principal, OLD.model_id, OLD.licence_id, OLD.acceptance_id, OLD.idempotency_key,
         OLD.request_sha256, OLD.source_name, OLD.defaults, OLD.job_count, OLD.created_at)
            IS DISTINCT FROM
        (NEW.batch_id, NEW.principal, NEW.model_id, NEW.licence_id, NEW.acceptance_id, NEW.idempotency_key,
         NEW.request_sha256, NEW.source_name, NEW.defaults, NEW.job_count, NEW.created_at))
    EXECUTE FUNCTION refuse('batches_keep_their_terms', 'what was enqueued is not changed afterwards');
