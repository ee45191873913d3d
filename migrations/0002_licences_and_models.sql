-- Models, the licence texts they come under, and who accepted which text.
-- An acceptance is of one exact text, told by its digest: a changed text is another licence and has to be accepted anew. The
-- wide unique keys exist so that batches can point at "this acceptance, of this licence, by this principal" as one thing.

CREATE TABLE licences (
    licence_id    uuid PRIMARY KEY,
    name          text NOT NULL CONSTRAINT licences_name CHECK (length(name) BETWEEN 1 AND 200),
    text          text NOT NULL,
    text_sha256   sha256_hex NOT NULL UNIQUE,
    byte_length   integer NOT NULL CONSTRAINT licences_byte_length CHECK (byte_length = octet_length(text) AND byte_length > 0),
    registered_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT licences_digest_is_of_text CHECK (text_sha256 = encode(sha256(convert_to(text, 'UTF8')), 'hex'))
);
COMMENT ON TABLE licences IS 'Licence texts, each once, never changed.';

CREATE TRIGGER licences_are_kept BEFORE UPDATE OR DELETE ON licences
    FOR EACH ROW EXECUTE FUNCTION refuse('licences_are_kept', 'a licence text is never changed or removed');

CREATE TABLE licence_acceptances (
    acceptance_id uuid PRIMARY KEY,
    licence_id    uuid NOT NULL REFERENCES licences,
    principal     text NOT NULL CONSTRAINT licence_acceptances_principal CHECK (principal = btrim(principal) AND length(principal) BETWEEN 1 AND 200),
    accepted_at   timestamptz NOT NULL DEFAULT now(),
    revoked_at    timestamptz CONSTRAINT licence_acceptances_revoked_after CHECK (revoked_at >= accepted_at),
    method        text NOT NULL CONSTRAINT licence_acceptances_method CHECK (length(method) BETWEEN 1 AND 50),
    statement     text NOT NULL CONSTRAINT licence_acceptances_statement CHECK (length(statement) BETWEEN 1 AND 10000),
    CONSTRAINT licence_acceptances_whole UNIQUE (acceptance_id, licence_id, principal)
);
CREATE UNIQUE INDEX licence_acceptances_one_valid ON licence_acceptances (licence_id, principal) WHERE revoked_at IS NULL;
COMMENT ON TABLE licence_acceptances IS 'Who accepted which licence text, when and how. Rows stay; a revocation sets revoked_at, once.';
COMMENT ON COLUMN licence_acceptances.statement IS 'The sentence that was agreed to.';

CREATE TRIGGER licence_acceptances_are_kept BEFORE DELETE ON licence_acceptances
    FOR EACH ROW EXECUTE FUNCTION refuse('licence_acceptances_are_kept', 'a licence acceptance is never removed');
CREATE TRIGGER licence_acceptances_only_revoked BEFORE UPDATE ON licence_acceptances
    FOR EACH ROW WHEN (
        (OLD.acceptance_id, OLD.licence_id, OLD.principal, OLD.accepted_at, OLD.method, OLD.statement)
            IS DISTINCT FROM (NEW.acceptance_id, NEW.licence_id, NEW.principal, NEW.accepted_at, NEW.method, NEW.statement)
        OR (OLD.revoked_at IS NOT NULL AND OLD.revoked_at IS DISTINCT FROM NEW.revoked_at))
    EXECUTE FUNCTION refuse('licence_acceptances_only_revoked', 'a licence acceptance can only be revoked, and only once');

CREATE TABLE models (
    model_id                uuid PRIMARY KEY,
    name                    text NOT NULL UNIQUE CONSTRAINT models_name CHECK (name ~ '^[a-z0-9][a-z0-9._-]{0,62}$'),
    kind                    text NOT NULL DEFAULT 'stable-diffusion-v1' CONSTRAINT models_kind CHECK (kind IN ('stable-diffusion-v1')),
    folder                  text NOT NULL,
    licence_id              uuid NOT NULL REFERENCES licences,
    weights_sha256          sha256_hex NOT NULL,
    components              jsonb NOT NULL CONSTRAINT models_components CHECK (jsonb_typeof(components) = 'array'),
    default_width           integer NOT NULL CONSTRAINT models_default_width CHECK (default_width BETWEEN 64 AND 2048 AND default_width % 8 = 0),
    default_height          integer NOT NULL CONSTRAINT models_default_height CHECK (default_height BETWEEN 64 AND 2048 AND default_height % 8 = 0),
    default_noise_scheduler noise_scheduler NOT NULL,
    registered_at           timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT models_licence UNIQUE (model_id, licence_id)
);
COMMENT ON TABLE models IS 'Registered models. A name means one set of weights for ever; only the folder may change.';
COMMENT ON COLUMN models.folder IS 'Where the files lie, as workers see it.';
COMMENT ON COLUMN models.components IS 'Its files: path, sha256, size_bytes of each.';
COMMENT ON COLUMN models.weights_sha256 IS 'One digest over the paths and digests of all components, sorted by path.';

CREATE TRIGGER models_mean_one_set_of_weights BEFORE UPDATE ON models
    FOR EACH ROW WHEN (
        (OLD.model_id, OLD.name, OLD.kind, OLD.licence_id, OLD.weights_sha256, OLD.components, OLD.registered_at)
            IS DISTINCT FROM (NEW.model_id, NEW.name, NEW.kind, NEW.licence_id, NEW.weights_sha256, NEW.components, NEW.registered_at))
    EXECUTE FUNCTION refuse('models_mean_one_set_of_weights', 'other weights or another licence need another model name');
