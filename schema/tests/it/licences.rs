//! Models, licence texts and acceptances: P5 by rule and by method.

use schema::{AddModelError, SubmitError};

use crate::support::{Fixture, PRINCIPAL, new_jobs, new_model};

#[tokio::test]
async fn registering_the_same_model_again_changes_only_the_folder() {
    let fixture = Fixture::new().await;
    let mut new = new_model("demo");
    new.folder = "elsewhere".into();
    let again = fixture.catalog.add_model(&new).await.unwrap();
    assert!(again.was_known);
    assert_eq!(again.model.model_id, fixture.model.model_id);
    assert_eq!(again.model.folder, "elsewhere");
    assert_eq!(fixture.catalog.models().await.unwrap(), std::slice::from_ref(&again.model));
    assert_eq!(fixture.catalog.model_by_name(&new.name).await.unwrap(), Some(again.model));
    assert_eq!(fixture.catalog.model_by_name(&"none".parse().unwrap()).await.unwrap(), None);
}

#[tokio::test]
async fn a_name_means_one_set_of_weights_and_one_licence() {
    let fixture = Fixture::new().await;
    let mut weights = new_model("demo");
    weights.components[0].sha256 = schema::Sha256Digest::of(b"other");
    let error = fixture.catalog.add_model(&weights).await.unwrap_err();
    assert!(matches!(error, AddModelError::OtherWeights { .. }), "{error:?}");
    insta::assert_snapshot!(error, @r"
    the name `demo` belongs to a model with other weights (registered 43b879f5c7844ac4a4cd8e6f201ad1e51159a728ecb8a489f9c6f6489c2e5810, given 9156b8b6f424909ee62b736f33fc2a7dd965078451006f70e0fa42f966b9abc1)
    hint: register these under another name
    ");
    let mut licence = new_model("demo");
    licence.licence_text = "Be kinder.\n".into();
    let error = fixture.catalog.add_model(&licence).await.unwrap_err();
    assert!(matches!(error, AddModelError::OtherLicence { .. }), "{error:?}");
    insta::assert_snapshot!(error, @r"
    model `demo` is registered with another licence text (registered f32bf5e09516390e83144b4a66afea2f104e1b229bc809baed4f8efb0f3a1d39, given 4c8c231685505808b56a1f050f91ac6323e644ca722fc5ef822ef02849858c5f)
    hint: register it under another name, so that its users accept the new text
    ");
    assert_eq!(fixture.count("SELECT count(*) FROM licences").await, 1, "the refused text was not kept");
    let sql = "UPDATE models SET weights_sha256 = encode(sha256('x'), 'hex')";
    assert_eq!(fixture.refusal(sql).await, "models_mean_one_set_of_weights");
}

#[tokio::test]
async fn two_models_may_share_a_licence_and_its_acceptance() {
    let fixture = Fixture::new().await;
    let second = fixture.catalog.add_model(&new_model("second")).await.unwrap();
    assert!(!second.was_known);
    assert_eq!(second.model.licence_id, fixture.model.licence_id);
    let mut batch = fixture.new_batch("second");
    batch.model = second.model.name;
    fixture.catalog.submit_batch(&batch, &new_jobs(1)).await.unwrap();
}

#[tokio::test]
async fn accepting_twice_is_accepting_once() {
    let fixture = Fixture::new().await;
    let licence = fixture.catalog.licence_of_model(&fixture.model.name).await.unwrap().unwrap();
    assert_eq!(licence.text, "Be kind.\n");
    let again = fixture.catalog.accept_licence(PRINCIPAL, licence.licence_id, "cli", "Again.").await.unwrap();
    assert_eq!(again, fixture.acceptance);
    let valid = fixture.catalog.valid_acceptance(PRINCIPAL, licence.licence_id).await.unwrap();
    assert_eq!(valid.as_ref(), Some(&fixture.acceptance));
    assert_eq!(fixture.catalog.valid_acceptance("eve", licence.licence_id).await.unwrap(), None);
}

#[tokio::test]
async fn without_an_acceptance_nothing_is_submitted() {
    let fixture = Fixture::new().await;
    let mut batch = fixture.new_batch("eve's");
    batch.principal = "eve".into();
    let error = fixture.catalog.submit_batch(&batch, &new_jobs(2)).await.unwrap_err();
    assert!(matches!(error, SubmitError::LicenceNotAccepted { .. }), "{error:?}");
    insta::assert_snapshot!(error, @r"
    `eve` has not accepted Demo licence, the licence of model `demo` (text f32bf5e09516390e83144b4a66afea2f104e1b229bc809baed4f8efb0f3a1d39)
    hint: read it with `darkroom licence show demo`, accept it with `darkroom licence accept demo`
    ");
    assert_eq!(fixture.count("SELECT count(*) FROM batches").await, 0);
    assert_eq!(fixture.count("SELECT count(*) FROM jobs").await, 0);
}

#[tokio::test]
async fn a_revoked_acceptance_does_not_count() {
    let fixture = Fixture::new().await;
    let (batch_id, _) = fixture.submit("before", 1).await;
    let licence_id = fixture.model.licence_id;
    let revoked = fixture.catalog.revoke_acceptance_if_valid(PRINCIPAL, licence_id).await.unwrap().unwrap();
    assert_eq!(revoked.acceptance_id, fixture.acceptance.acceptance_id);
    assert!(revoked.revoked_at.is_some());
    assert_eq!(fixture.catalog.revoke_acceptance_if_valid(PRINCIPAL, licence_id).await.unwrap(), None);

    let error = fixture.catalog.submit_batch(&fixture.new_batch("after"), &new_jobs(1)).await.unwrap_err();
    assert!(matches!(error, SubmitError::LicenceNotAccepted { .. }), "{error:?}");
    // The batch from before keeps its acceptance, and submitting it again is no new batch.
    let replay = fixture.catalog.submit_batch(&fixture.new_batch("before"), &new_jobs(1)).await.unwrap();
    assert_eq!((replay.batch_id, replay.replayed), (batch_id, true));

    let anew = fixture.catalog.accept_licence(PRINCIPAL, licence_id, "cli", "I accept.").await.unwrap();
    assert_ne!(anew.acceptance_id, fixture.acceptance.acceptance_id);
    fixture.submit("after", 1).await;
}

#[tokio::test]
async fn a_submission_that_began_before_the_acceptance_does_not_lean_on_it() {
    let fixture = Fixture::new().await;
    let mut hold = fixture.pool.begin().await.unwrap();
    sqlx::query("LOCK TABLE models IN ACCESS EXCLUSIVE MODE").execute(&mut *hold).await.unwrap();
    let mut batch = fixture.new_batch("eve's");
    batch.principal = "eve".into();
    let catalog = fixture.catalog.clone();
    let early = batch.clone();
    let submit = tokio::spawn(async move { catalog.submit_batch(&early, &new_jobs(1)).await });
    fixture.wait_for_lock(&submit).await;
    fixture.catalog.accept_licence("eve", fixture.model.licence_id, "cli", "I accept.").await.unwrap();
    hold.commit().await.unwrap();
    let error = submit.await.unwrap().unwrap_err();
    assert!(matches!(error, SubmitError::LicenceNotAccepted { .. }), "{error:?}");

    fixture.catalog.submit_batch(&batch, &new_jobs(1)).await.unwrap();
    assert_eq!(fixture.catalog.broken_promises(None).await.unwrap(), []);
}

#[tokio::test]
async fn the_tables_hold_the_licence_rule_by_themselves() {
    let fixture = Fixture::new().await;
    let (batch_id, _) = fixture.submit("good", 1).await;
    let eve =
        fixture.catalog.accept_licence("eve", fixture.model.licence_id, "cli", "I accept.").await.unwrap();
    let mut licensed = new_model("licensed");
    licensed.licence_text = "Another text.\n".into();
    let other = fixture.catalog.add_model(&licensed).await.unwrap().model;
    let insert = |column: &str, value: String| {
        let value_of = |name: &str| if name == column { value.clone() } else { name.to_owned() };
        format!(
            "INSERT INTO batches (batch_id, name, principal, model_id, licence_id, acceptance_id, idempotency_key,
                                  request_sha256, source_name, defaults, band, job_count, max_attempts, created_at)
             SELECT gen_random_uuid(), name, {}, {}, {}, {}, 'other', request_sha256, source_name, defaults, band,
                    job_count, max_attempts, {} FROM batches WHERE batch_id = '{batch_id}'",
            value_of("principal"),
            value_of("model_id"),
            value_of("licence_id"),
            value_of("acceptance_id"),
            if column == "created_at" { value.clone() } else { "now()".to_owned() },
        )
    };
    // Somebody else's acceptance, another model's licence, no acceptance at all, one dated back.
    let refusals = [
        ("batches_acceptance_fkey", insert("acceptance_id", format!("'{}'", eve.acceptance_id))),
        ("batches_acceptance_fkey", insert("principal", "'mallory'".into())),
        ("batches_model_fkey", insert("model_id", format!("'{}'", other.model_id))),
        ("batches_acceptance_valid", insert("acceptance_id", "gen_random_uuid()".into())),
        ("batches_start_now", insert("created_at", "now() - interval '1 day'".into())),
    ];
    for (rule, sql) in &refusals {
        assert_eq!(fixture.refusal(sql).await, *rule, "{sql}");
    }
    fixture.catalog.revoke_acceptance_if_valid(PRINCIPAL, fixture.model.licence_id).await.unwrap();
    let revoked = insert("none", String::new());
    assert_eq!(fixture.refusal(&revoked).await, "batches_acceptance_valid");
}

#[tokio::test]
async fn acceptances_and_texts_are_kept() {
    let fixture = Fixture::new().await;
    fixture.catalog.revoke_acceptance_if_valid(PRINCIPAL, fixture.model.licence_id).await.unwrap();
    for (rule, sql) in [
        ("licence_acceptances_only_revoked", "UPDATE licence_acceptances SET revoked_at = NULL"),
        (
            "licence_acceptances_only_revoked",
            "UPDATE licence_acceptances SET revoked_at = now() + interval '1 day'",
        ),
        ("licence_acceptances_only_revoked", "UPDATE licence_acceptances SET principal = 'eve'"),
        ("licence_acceptances_are_kept", "DELETE FROM licence_acceptances"),
        ("licences_are_kept", "UPDATE licences SET name = 'other'"),
        ("licences_are_kept", "DELETE FROM licences"),
    ] {
        assert_eq!(fixture.refusal(sql).await, rule, "{sql}");
    }
    let two_valid = format!(
        "INSERT INTO licence_acceptances (acceptance_id, licence_id, principal, method, statement)
         SELECT gen_random_uuid(), '{}', 'eve', 'cli', 'I accept.' FROM generate_series(1, 2)",
        fixture.model.licence_id
    );
    assert_eq!(fixture.refusal(&two_valid).await, "licence_acceptances_one_valid");
    let wrong_digest = "INSERT INTO licences (licence_id, name, text, text_sha256, byte_length)
                        VALUES (gen_random_uuid(), 'n', 'text', encode(sha256('other'), 'hex'), 4)";
    assert_eq!(fixture.refusal(wrong_digest).await, "licences_digest_is_of_text");
}

/// "Valid when it was enqueued" has one answer even when a revocation runs at the same time: the submission
/// waits for it and then finds the acceptance revoked.
#[tokio::test]
async fn a_submission_waits_for_a_revocation_in_progress() {
    let fixture = Fixture::new().await;
    let mut revocation = fixture.pool.begin().await.unwrap();
    sqlx::query("UPDATE licence_acceptances SET revoked_at = now()").execute(&mut *revocation).await.unwrap();
    let (catalog, batch) = (fixture.catalog.clone(), fixture.new_batch("racing"));
    let submission = tokio::spawn(async move { catalog.submit_batch(&batch, &new_jobs(1)).await });
    fixture.wait_for_lock(&submission).await;
    revocation.commit().await.unwrap();
    let error = submission.await.unwrap().unwrap_err();
    assert!(matches!(error, SubmitError::LicenceNotAccepted { .. }), "{error:?}");
    assert_eq!(fixture.count("SELECT count(*) FROM batches").await, 0);
}

/// The other way around: a revocation that waits is later than every submission that it waits for, also than one that
/// began after it and went past it.
#[tokio::test]
async fn a_revocation_that_waited_is_later_than_what_it_waited_for() {
    let fixture = Fixture::new().await;
    let mut reader = fixture.pool.begin().await.unwrap();
    sqlx::query("SELECT FROM licence_acceptances FOR SHARE").execute(&mut *reader).await.unwrap();
    let (catalog, licence_id) = (fixture.catalog.clone(), fixture.model.licence_id);
    let revocation =
        tokio::spawn(async move { catalog.revoke_acceptance_if_valid(PRINCIPAL, licence_id).await });
    fixture.wait_for_lock(&revocation).await;
    // Both share the row, so this one does not wait.
    fixture.submit("racing", 1).await;
    reader.commit().await.unwrap();
    let revoked = revocation.await.unwrap().unwrap().expect("it was valid");
    let enqueued = "SELECT count(*) FROM batches JOIN licence_acceptances USING (acceptance_id)
                    WHERE batches.created_at < revoked_at";
    assert_eq!(fixture.count(enqueued).await, 1, "enqueued while the licence was accepted: {revoked:?}");
    assert_eq!(fixture.catalog.broken_promises(None).await.unwrap(), []);
    let error = fixture.catalog.submit_batch(&fixture.new_batch("after"), &new_jobs(1)).await.unwrap_err();
    assert!(matches!(error, SubmitError::LicenceNotAccepted { .. }), "{error:?}");
}
