//! Every rule about images and attempts refuses what it is there for, told by its name.

use schema::JobState;

use crate::constraints::assert_refused;
use crate::support::{Fixture, completed, flagged};

#[tokio::test]
async fn an_image_row_counts_and_stays() {
    let fixture = Fixture::new().await;
    let worker_id = fixture.worker().await;
    let (batch_id, job_ids) = fixture.submit("images", 2).await;
    let (other_batch_id, _) = fixture.submit("other", 1).await;
    let claimed = fixture.claim(&job_ids, worker_id).await;
    fixture.catalog.complete_if_leased(&[completed(&claimed[0], worker_id)]).await.unwrap()[0].unwrap();

    // A copy of the first job's row, for the second job, with some columns changed.
    let copy = |changes: &[(&str, &str)]| {
        let mut columns = String::new();
        let mut values = String::new();
        let second = format!("'{}'", job_ids[1]);
        for name in [
            "image_id",
            "job_id",
            "batch_id",
            "acceptance_id",
            "lease_generation",
            "worker_id",
            "bucket",
            "object_key",
            "sha256",
            "size_bytes",
            "width",
            "height",
            "seed",
            "has_nsfw_concept",
            "concept_scores",
            "special_care_scores",
            "prompt_truncated",
            "weights_sha256",
            "device",
            "dtype",
            "noise_dtype",
            "engine_gpu",
            "engine_driver",
            "engine_torch",
            "engine_cudnn",
            "engine_kernels",
            "engine_batch_size",
            "engine_decode_size",
            "text_encoder_ms",
            "denoise_ms",
            "vae_ms",
            "safety_ms",
            "encode_ms",
            "upload_ms",
        ] {
            let value = match (changes.iter().find(|(column, _)| *column == name), name) {
                (Some((_, value)), _) => value,
                (None, "image_id") => "gen_random_uuid()",
                (None, "job_id") => second.as_str(),
                (None, "object_key") => "object_key || '2'",
                (None, name) => name,
            };
            columns.push_str(&format!("{name}, "));
            values.push_str(&format!("{value}, "));
        }
        format!(
            "INSERT INTO images ({}) SELECT {} FROM images",
            columns.trim_end_matches(", "),
            values.trim_end_matches(", ")
        )
    };
    let first = format!("'{}'", job_ids[0]);
    let other_batch = format!("'{other_batch_id}'");
    let other_key = format!("'v1/{other_batch_id}/00000000-0123456789abcdef.png'");
    let mut engine = ["gpu", "driver", "torch", "cudnn", "kernels"]
        .map(|part| (format!("engine_{part}"), "'known'"))
        .to_vec();
    engine.push(("engine_batch_size".to_owned(), "1"));
    engine.push(("engine_decode_size".to_owned(), "1"));
    // All known, but for one that has another value.
    let engine = |changed: &str, value: &'static str| {
        let one = |(name, known): &(String, &'static str)| {
            (name.clone(), if name == changed { value } else { known })
        };
        let columns: Vec<(String, &str)> = engine.iter().map(one).collect();
        copy(&columns.iter().map(|(name, value)| (name.as_str(), *value)).collect::<Vec<_>>())
    };
    let refusals = [
        ("image_counts", copy(&[])),
        ("images_job_id_key", copy(&[("job_id", &first)])),
        ("images_object_key_key", copy(&[("object_key", "object_key")])),
        ("images_attempt_fkey", copy(&[("lease_generation", "2")])),
        ("images_acceptance_fkey", copy(&[("acceptance_id", "gen_random_uuid()")])),
        ("images_key_is_of_batch", copy(&[("batch_id", &other_batch)])),
        ("images_key_is_of_batch", copy(&[("object_key", &other_key)])),
        ("images_flagged_xor_object", copy(&[("has_nsfw_concept", "true")])),
        (
            "images_flagged_xor_object",
            copy(&[("object_key", "NULL"), ("bucket", "NULL"), ("sha256", "NULL"), ("size_bytes", "NULL")]),
        ),
        ("images_object_whole", copy(&[("sha256", "NULL")])),
        ("images_object_whole", copy(&[("size_bytes", "NULL")])),
        ("images_object_whole", copy(&[("bucket", "NULL")])),
        ("images_size_bytes", copy(&[("size_bytes", "0")])),
        ("sha256_hex_check", copy(&[("sha256", "upper(sha256)")])),
        ("images_verdict_whole", copy(&[("concept_scores", "NULL")])),
        ("images_scores_are_numbers", copy(&[("concept_scores", "'{NaN}'")])),
        ("images_engine_whole", copy(&[("engine_gpu", "'NVIDIA H200'")])),
        ("images_engine_batch_size", engine("engine_batch_size", "0")),
        ("images_engine_decode_size", engine("engine_decode_size", "0")),
        ("images_worker_fkey", copy(&[("worker_id", "gen_random_uuid()")])),
        ("images_are_kept", "UPDATE images SET seed = 1".to_owned()),
        ("images_are_kept", "DELETE FROM images".to_owned()),
        ("images_are_kept", "TRUNCATE images CASCADE".to_owned()),
    ];
    assert_refused(&fixture, &refusals).await;
    assert_eq!(fixture.count(&format!("SELECT count(*) FROM images WHERE batch_id = '{batch_id}'")).await, 1);
}

#[tokio::test]
async fn a_flagged_image_is_recorded_without_pixels() {
    let fixture = Fixture::new().await;
    let worker_id = fixture.worker().await;
    let (batch_id, job_ids) = fixture.submit("flagged", 1).await;
    let claimed = fixture.claim(&job_ids, worker_id).await;
    fixture.catalog.complete_if_leased(&[flagged(&claimed[0], worker_id)]).await.unwrap()[0].unwrap();
    assert_eq!(fixture.state(job_ids[0]).await, JobState::Completed);
    let image = fixture.catalog.batch_results(batch_id, None, 10).await.unwrap().remove(0).image.unwrap();
    assert_eq!(image.object, None);
    assert_eq!(image.safety.unwrap().concept_scores, [0.02, -0.034]);
}

#[tokio::test]
async fn attempts_tell_how_they_ended() {
    let fixture = Fixture::new().await;
    let worker_id = fixture.worker().await;
    let (_, job_ids) = fixture.submit("attempts", 2).await;
    let claimed = fixture.claim(&job_ids, worker_id).await;
    fixture.catalog.complete_if_leased(&[completed(&claimed[0], worker_id)]).await.unwrap()[0].unwrap();
    let ended = format!("UPDATE attempts SET ended_at = now() WHERE job_id = '{}'", job_ids[0]);
    let open = |change: &str| format!("UPDATE attempts SET {change} WHERE job_id = '{}'", job_ids[1]);
    let second = format!(
        "INSERT INTO attempts (job_id, lease_generation, attempt, worker_id, microbatch_id, microbatch_size)
         VALUES ('{}', 2, 1, '{worker_id}', gen_random_uuid(), 1)",
        job_ids[1]
    );
    let refusals = [
        ("attempts_end_once", ended),
        ("attempts_ended_iff_outcome", open("ended_at = now()")),
        ("attempts_ended_iff_outcome", open("outcome = 'ok'")),
        ("attempts_error_iff_class", open("outcome = 'error', ended_at = now()")),
        (
            "attempts_error_iff_class",
            open(
                "error_class = 'bug', error_message = '', can_retry_help = true, outcome = 'ok', ended_at = now()",
            ),
        ),
        ("attempts_error_whole", open("outcome = 'error', error_class = 'bug', ended_at = now()")),
        ("attempts_microbatch_size", open("microbatch_size = 0")),
        ("attempts_one_open", second),
    ];
    assert_refused(&fixture, &refusals).await;
}
