-- The workers: one row for each run of a worker process, kept after it ended, since attempts and images name it.
-- A worker serves one model. `jobs` points at (worker, model), so a worker cannot hold a lease on another model's job.

CREATE TABLE workers (
    worker_id    uuid PRIMARY KEY,
    name         text NOT NULL CONSTRAINT workers_name CHECK (length(name) BETWEEN 1 AND 200),
    host         text NOT NULL,
    model_id     uuid NOT NULL REFERENCES models,
    pipeline     text NOT NULL,
    device       text NOT NULL,
    dtype        text NOT NULL,
    version      text NOT NULL,
    started_at   timestamptz NOT NULL DEFAULT now(),
    last_seen_at timestamptz NOT NULL DEFAULT now(),
    stopped_at   timestamptz,
    stop_reason  text,
    CONSTRAINT workers_model UNIQUE (worker_id, model_id),
    CONSTRAINT workers_stop_reason CHECK ((stopped_at IS NULL) = (stop_reason IS NULL))
);
COMMENT ON TABLE workers IS 'Every run of a worker process. One that is gone without a word has no stopped_at and an old last_seen_at.';
COMMENT ON COLUMN workers.pipeline IS 'What draws: stable-diffusion, or solid-color for tests of the fleet.';
