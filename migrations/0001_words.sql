-- The words that every process agrees on, and the moves that a job may make.
-- They are enums so that a misspelt state is an error and not a row that no loop ever looks at. `schema/src/state.rs`
-- lists the same words in the same order; a test compares the two.

CREATE TYPE job_state AS ENUM ('available', 'running', 'retryable', 'completed', 'cancelled', 'discarded');
CREATE TYPE attempt_outcome AS ENUM ('ok', 'error', 'lost', 'preempted', 'cancelled');
CREATE TYPE error_class AS ENUM ('input', 'safety', 'infra', 'out_of_memory', 'non_finite', 'bug');
CREATE TYPE priority_band AS ENUM ('high', 'normal', 'low');
CREATE TYPE noise_scheduler AS ENUM (
    'pndm', 'ddim', 'euler', 'euler_a', 'dpmpp_2m', 'dpmpp_2m_karras', 'unipc', 'lms'
);

CREATE DOMAIN sha256_hex AS text CHECK (VALUE ~ '^[0-9a-f]{64}$');
COMMENT ON DOMAIN sha256_hex IS 'A SHA-256 digest as 64 lower-case hexadecimal digits.';

CREATE TABLE job_state_transitions (
    from_state job_state NOT NULL,
    to_state   job_state NOT NULL,
    PRIMARY KEY (from_state, to_state)
);
COMMENT ON TABLE job_state_transitions IS 'Every move a job may make; a trigger on jobs refuses all others.';
INSERT INTO job_state_transitions (from_state, to_state) VALUES
    ('available', 'running'),
    ('available', 'cancelled'),
    ('running', 'completed'),
    ('running', 'available'),
    ('running', 'retryable'),
    ('running', 'discarded'),
    ('running', 'cancelled'),
    ('retryable', 'available'),
    ('retryable', 'cancelled');

-- A trigger's refusal looks like a violated constraint of the given name, so that callers sort both alike.
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '%', TG_ARGV[1]
        USING ERRCODE = 'check_violation', CONSTRAINT = TG_ARGV[0], TABLE = TG_TABLE_NAME;
END $$;
COMMENT ON FUNCTION refuse() IS 'Refuses whatever fired it: refuse(rule, message).';
