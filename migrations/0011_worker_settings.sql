-- What a worker was started with, as far as others have to know it. Whether a lease is long enough can only be told by comparing it with
-- how long that worker's microbatches take, and both are the worker's own: `darkroom doctor` asks here. Null in rows of builds before this.

ALTER TABLE workers
    ADD COLUMN lease_seconds integer CONSTRAINT workers_lease_seconds CHECK (lease_seconds >= 1),
    ADD COLUMN max_microbatch integer CONSTRAINT workers_max_microbatch CHECK (max_microbatch >= 1);
COMMENT ON COLUMN workers.lease_seconds IS 'How long a job stays its own after its last sign of life; null if it did not say.';
COMMENT ON COLUMN workers.max_microbatch IS 'The most jobs that it lets share a forward pass; null if it did not say.';
