-- Objects that are not as their image rows say. An image row is never changed, not even when its object turns out to be gone, so
-- what the reconciler finds stands beside it. A fault that heals (a restored bucket, say) is cleared, and its row stays.

CREATE TYPE object_fault_kind AS ENUM ('missing', 'wrong_size', 'wrong_digest');

CREATE TABLE object_faults (
    image_id      uuid NOT NULL CONSTRAINT object_faults_image_fkey REFERENCES images,
    kind          object_fault_kind NOT NULL,
    found         text NOT NULL CONSTRAINT object_faults_found CHECK (length(found) <= 1000),
    first_seen_at timestamptz NOT NULL DEFAULT now(),
    last_seen_at  timestamptz NOT NULL DEFAULT now(),
    cleared_at    timestamptz,
    PRIMARY KEY (image_id, kind)
);
CREATE INDEX object_faults_open ON object_faults (last_seen_at) WHERE cleared_at IS NULL;
COMMENT ON TABLE object_faults IS 'Objects that were missing or not what their image rows say, when somebody looked.';
COMMENT ON COLUMN object_faults.found IS 'What was there in place of what the image row says.';
COMMENT ON COLUMN object_faults.cleared_at IS 'When the object was first seen to be right again; null while the fault stands.';
