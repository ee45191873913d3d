-- Messages that nobody could read, taken out of the broker's dead-letter queue, so that people ask SQL about them and not a queue that
-- grows unseen. The broker gets its acknowledgement after the commit, so a crash in between counts a message twice and loses none.

CREATE TABLE dead_letters (
    dead_letter_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    queue          text NOT NULL,
    reason         text NOT NULL,
    body_sha256    sha256_hex NOT NULL,
    size_bytes     bigint NOT NULL CONSTRAINT dead_letters_size_bytes CHECK (size_bytes >= 0),
    body           bytea NOT NULL CONSTRAINT dead_letters_body CHECK (octet_length(body) <= 65536),
    seen_count     bigint NOT NULL DEFAULT 1 CONSTRAINT dead_letters_seen_count CHECK (seen_count >= 1),
    first_seen_at  timestamptz NOT NULL DEFAULT now(),
    last_seen_at   timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT dead_letters_one_a_message UNIQUE (queue, reason, body_sha256)
);
CREATE INDEX dead_letters_latest ON dead_letters (last_seen_at);
COMMENT ON TABLE dead_letters IS 'Unreadable messages. Equal ones from one queue share a row.';
COMMENT ON COLUMN dead_letters.queue IS 'Where the message was before it was given up.';
COMMENT ON COLUMN dead_letters.reason IS 'The broker''s word: rejected, expired, maxlen, delivery_limit; unknown if it said nothing.';
COMMENT ON COLUMN dead_letters.body_sha256 IS 'Of the whole body.';
COMMENT ON COLUMN dead_letters.body IS 'Its first 64 KiB.';
COMMENT ON COLUMN dead_letters.seen_count IS 'How often it came; a crash may count one too many.';
