-- Jobs that were lost with their worker, and workers that are unfit. A crash is not a failure and spends no attempt; but a job
-- that kills every worker that draws it must not go around forever. So each loss halves the company that a job may share a
-- microbatch with, until it runs alone on a worker that holds nothing else; what is lost alone again and again is discarded.

ALTER TABLE jobs
    ADD COLUMN microbatch_limit integer CONSTRAINT jobs_microbatch_limit CHECK (microbatch_limit >= 1),
    ADD COLUMN losses_alone smallint NOT NULL DEFAULT 0 CONSTRAINT jobs_losses_alone CHECK (
        losses_alone >= 0 AND (losses_alone = 0 OR microbatch_limit = 1));
COMMENT ON COLUMN jobs.microbatch_limit IS 'The most jobs that it may share a microbatch with, itself included; null until it was lost with its worker.';
COMMENT ON COLUMN jobs.losses_alone IS 'How often it was lost with its worker while that held no other job.';

-- How often a job may be lost while it runs alone: one more is proof enough that it is the job and not its workers.
CREATE FUNCTION max_losses_alone() RETURNS smallint LANGUAGE sql IMMUTABLE AS $$ SELECT 3::smallint $$;
COMMENT ON FUNCTION max_losses_alone() IS 'A job that was lost so often while it ran alone is discarded.';

ALTER TABLE workers ADD COLUMN is_unfit boolean NOT NULL DEFAULT false
    CONSTRAINT workers_unfit_has_stopped CHECK (NOT is_unfit OR stopped_at IS NOT NULL);
COMMENT ON COLUMN workers.is_unfit IS 'It stopped because one fault kept coming back, whatever the job; stop_reason says which.';
