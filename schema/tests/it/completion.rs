//! Recording images: once, whole, and only for the holder of the lease.

use schema::{CatalogError, EngineFingerprint, JobState, Lease, LeaseLost, ObjectKey, Sha256Digest};

use crate::support::{Fixture, completed, flagged};

#[tokio::test]
async fn a_microbatch_is_recorded_whole_and_read_back() {
    let fixture = Fixture::new().await;
    let worker_id = fixture.worker().await;
    let (batch_id, job_ids) = fixture.submit("whole", 3).await;
    let claimed = fixture.claim(&job_ids, worker_id).await;
    let mut reports: Vec<_> = claimed.iter().map(|job| completed(job, worker_id)).collect();
    reports[1] = flagged(&claimed[1], worker_id);
    // A model without a checker has no verdict.
    reports[2].safety = None;
    let answers = fixture.catalog.complete_if_leased(&reports).await.unwrap();
    let image_ids: Vec<_> = answers.into_iter().map(|answer| answer.unwrap()).collect();

    let results = fixture.catalog.batch_results(batch_id, None, 10).await.unwrap();
    assert_eq!(results.len(), 3);
    for (index, result) in results.iter().enumerate() {
        let image = result.image.as_ref().unwrap();
        assert_eq!((result.job_id, result.ordinal as usize), (job_ids[index], index));
        assert_eq!((result.state, result.source_line), (JobState::Completed, Some(1)));
        assert_eq!(result.spec, claimed[index].spec);
        assert_eq!(image.image_id, image_ids[index]);
        assert_eq!((&image.object, &image.safety), (&reports[index].object, &reports[index].safety));
        assert_eq!(image.weights_sha256, fixture.model.weights_sha256);
    }
    for &job_id in &job_ids {
        assert_eq!(fixture.outcomes(job_id).await, ["ok"]);
    }
    // Size and seed come from the job, and the acceptance from the batch.
    let agree = "SELECT count(*) FROM images JOIN jobs USING (job_id, width, height, seed)
                 JOIN batches ON batches.batch_id = images.batch_id AND batches.acceptance_id = images.acceptance_id
                 WHERE denoise_ms = 12.5";
    assert_eq!(fixture.count(agree).await, 3);
}

#[tokio::test]
async fn the_flat_view_tells_all_of_an_image() {
    let fixture = Fixture::new().await;
    let worker_id = fixture.worker().await;
    let (_, job_ids) = fixture.submit("flat", 2).await;
    let claimed = fixture.claim(&job_ids, worker_id).await;
    let reports = [completed(&claimed[0], worker_id), flagged(&claimed[1], worker_id)];
    fixture.catalog.complete_if_leased(&reports).await.unwrap();
    let row = "SELECT count(*) FROM v_images
               WHERE batch_name = 'flat' AND model = 'demo' AND licence = 'Demo licence' AND principal = 'ada'
                 AND prompt LIKE 'a red circle%' AND worker = 'worker-1' AND attempt = 1 AND microbatch_size = 2
                 AND (has_nsfw_concept = (object_key IS NULL)) AND accepted_at <= submitted_at";
    assert_eq!(fixture.count(row).await, 2);
    let undocumented = "SELECT count(*) FROM pg_class
                        WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'v')
                          AND relname <> '_sqlx_migrations' AND obj_description(oid, 'pg_class') IS NULL";
    assert_eq!(fixture.count(undocumented).await, 0, "every table and view says what it is");
}

#[tokio::test]
async fn what_computed_a_picture_on_a_gpu_is_in_its_row_and_nothing_of_a_cpu() {
    let fixture = Fixture::new().await;
    let worker_id = fixture.worker().await;
    let (_, job_ids) = fixture.submit("engines", 2).await;
    let claimed = fixture.claim(&job_ids, worker_id).await;
    let engine = EngineFingerprint {
        gpu: "NVIDIA H200".into(),
        driver: "580.1".into(),
        torch: "2.11.0".into(),
        cudnn: "9.19.0".into(),
        kernels: "fused sm_90a".into(),
        batch_size: 33,
        decode_size: 4,
    };
    let on_gpu = schema::CompletedJob { engine: Some(engine), ..completed(&claimed[0], worker_id) };
    let on_cpu = completed(&claimed[1], worker_id);
    let answers = fixture.catalog.complete_if_leased(&[on_gpu, on_cpu]).await.unwrap();
    assert!(answers.iter().all(Result::is_ok));
    let rows = "SELECT count(*) FROM v_images WHERE job_id = '{}' AND
                (engine_gpu, engine_driver, engine_torch, engine_cudnn, engine_kernels, engine_batch_size, engine_decode_size)";
    let of = |index: usize| rows.replace("{}", &job_ids[index].to_string());
    let told = "= ('NVIDIA H200', '580.1', '2.11.0', '9.19.0', 'fused sm_90a', 33, 4)";
    assert_eq!(fixture.count(&format!("{} {told}", of(0))).await, 1);
    assert_eq!(fixture.count(&format!("{} IS NULL", of(1))).await, 1);
}

#[tokio::test]
async fn completing_again_answers_the_same_image() {
    let fixture = Fixture::new().await;
    let (mine, theirs) = (fixture.worker().await, fixture.worker().await);
    let job_id = fixture.submit_one("twice").await;
    let claimed = fixture.claim_one(job_id, mine).await;
    let report = completed(&claimed, mine);
    let first = fixture.catalog.complete_if_leased(std::slice::from_ref(&report)).await.unwrap();
    let again = fixture.catalog.complete_if_leased(std::slice::from_ref(&report)).await.unwrap();
    assert!(first[0].is_ok());
    assert_eq!(first, again, "the answer to a commit may have been lost");

    // Another picture, or another worker, is not that commit.
    let mut other_picture = report.clone();
    let sha256 = Sha256Digest::of(b"other pixels");
    let object = other_picture.object.as_mut().unwrap();
    object.object_key = ObjectKey::new(claimed.batch_id, claimed.ordinal, &sha256);
    object.sha256 = sha256;
    let lost = [Err(LeaseLost(claimed.lease))];
    assert_eq!(fixture.catalog.complete_if_leased(&[other_picture]).await.unwrap(), lost);
    assert_eq!(fixture.catalog.complete_if_leased(&[completed(&claimed, theirs)]).await.unwrap(), lost);
    assert_eq!(fixture.count("SELECT count(*) FROM images").await, 1);
}

#[tokio::test]
async fn simultaneous_twins_make_one_image() {
    let fixture = Fixture::new().await;
    let worker_id = fixture.worker().await;
    let (_, job_ids) = fixture.submit("twins", 8).await;
    let claimed = fixture.claim(&job_ids, worker_id).await;
    let reports: Vec<_> = claimed.iter().map(|job| completed(job, worker_id)).collect();
    let mut twins = Vec::new();
    for index in 0..8 {
        let (catalog, mut reports) = (fixture.catalog.clone(), reports.clone());
        reports.rotate_left(index);
        twins.push(tokio::spawn(async move { catalog.complete_if_leased(&reports).await.unwrap() }));
    }
    let mut image_ids = std::collections::HashSet::new();
    for twin in twins {
        // A twin that waited for the winner is answered with the winner's images.
        image_ids.extend(twin.await.unwrap().into_iter().map(|answer| answer.unwrap()));
    }
    assert_eq!(image_ids.len(), 8);
    assert_eq!(fixture.count("SELECT count(*) FROM images").await, 8);
    assert_eq!(fixture.count("SELECT count(*) FROM jobs WHERE state = 'completed'").await, 8);
}

#[tokio::test]
async fn a_lost_lease_does_not_spoil_its_neighbours() {
    let fixture = Fixture::new().await;
    let worker_id = fixture.worker().await;
    let (_, job_ids) = fixture.submit("mixed", 4).await;
    let claimed = fixture.claim(&job_ids, worker_id).await;
    let mut reports: Vec<_> = claimed.iter().map(|job| completed(job, worker_id)).collect();
    fixture.catalog.cancel_job_if_not_final(job_ids[1]).await.unwrap();
    reports[2].lease = Lease { lease_generation: 9, ..claimed[2].lease };
    let answers = fixture.catalog.complete_if_leased(&reports).await.unwrap();
    assert!(answers[0].is_ok() && answers[3].is_ok());
    assert_eq!(answers[1], Err(LeaseLost(claimed[1].lease)));
    assert_eq!(answers[2], Err(LeaseLost(reports[2].lease)));
    assert_eq!(fixture.state(job_ids[1]).await, JobState::Cancelled);
    assert_eq!(fixture.state(job_ids[2]).await, JobState::Running);
    assert_eq!(fixture.count("SELECT count(*) FROM images").await, 2);
    assert_eq!(fixture.catalog.complete_if_leased(&[]).await.unwrap(), []);
}

#[tokio::test]
async fn a_refused_row_records_nothing() {
    let fixture = Fixture::new().await;
    let worker_id = fixture.worker().await;
    let (_, job_ids) = fixture.submit("refused", 2).await;
    let claimed = fixture.claim(&job_ids, worker_id).await;
    let mut reports: Vec<_> = claimed.iter().map(|job| completed(job, worker_id)).collect();
    // A verdict of "flagged" with pixels.
    reports[1].safety.as_mut().unwrap().has_nsfw_concept = true;
    match fixture.catalog.complete_if_leased(&reports).await.unwrap_err() {
        CatalogError::Refused { rule, .. } => assert_eq!(rule, "images_flagged_xor_object"),
        other => panic!("{other:?}"),
    }
    // JSON has no NaN: a checker's arrives as null and is refused as such.
    reports[1] = completed(&claimed[1], worker_id);
    reports[1].safety.as_mut().unwrap().concept_scores[0] = f32::NAN;
    assert!(matches!(
        fixture.catalog.complete_if_leased(&reports).await.unwrap_err(),
        CatalogError::Refused { rule, .. } if rule == "images_scores_are_numbers"
    ));
    assert_eq!(fixture.count("SELECT count(*) FROM images").await, 0);
    assert_eq!(fixture.state(job_ids[0]).await, JobState::Running);
}
