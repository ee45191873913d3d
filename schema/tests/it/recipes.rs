//! What a job leaves out of the denoising: on its row, in its message and on its picture's row, and nowhere by itself.

use schema::{CatalogError, JobId, JobSpec, NewJob, PriorityBand, Recipe};

use crate::constraints::assert_refused;
use crate::support::{Fixture, completed, defaults};

const RECIPE: Recipe = Recipe { guidance_start: 0.1, guidance_stop: 0.7, cache_interval: 3 };

/// A job with [`RECIPE`] and one without.
async fn submit(fixture: &Fixture) -> [JobId; 2] {
    let job = |recipe: Recipe| {
        let spec = JobSpec { prompt: "a red circle".into(), seed: Some(7), ..JobSpec::default() };
        let defaults = schema::SpecDefaults { recipe, ..defaults() };
        NewJob { spec: spec.validate(&defaults).unwrap(), source_line: None }
    };
    let jobs = [job(RECIPE), job(Recipe::EXACT)];
    let submitted = fixture.catalog.submit_batch(&fixture.new_batch("recipes"), &jobs).await.unwrap();
    [0, 1].map(|ordinal| JobId::of(submitted.batch_id, ordinal))
}

#[tokio::test]
async fn a_recipe_goes_from_the_job_to_its_message_and_its_picture() {
    let fixture = Fixture::new().await;
    let job_ids = submit(&fixture).await;
    let published =
        fixture.catalog.jobs_to_publish(fixture.model.model_id, PriorityBand::Normal, 10).await.unwrap();
    let keys: Vec<String> = published.iter().map(|job| job.microbatch_key.to_string()).collect();
    assert_eq!(keys, ["128x128/50/pndm/cfg/0.1-0.7/3", "128x128/50/pndm/cfg"]);

    let worker_id = fixture.worker().await;
    let claimed = fixture.claim(&job_ids, worker_id).await;
    assert_eq!((claimed[0].spec.recipe(), claimed[1].spec.recipe()), (RECIPE, Recipe::EXACT));
    assert_eq!(claimed[0].spec.microbatch_key(), published[0].microbatch_key);
    let drawn = [completed(&claimed[0], worker_id), completed(&claimed[1], worker_id)];
    for recorded in fixture.catalog.complete_if_leased(&drawn).await.unwrap() {
        recorded.unwrap();
    }
    let view = "SELECT guidance_start, guidance_stop, cache_interval FROM v_images ORDER BY ordinal";
    let rows: Vec<(f64, f64, i32)> = sqlx::query_as(view).fetch_all(&fixture.pool).await.unwrap();
    assert_eq!(rows, [(0.1, 0.7, 3), (0.0, 1.0, 1)]);
}

/// A build that knows no recipes draws the exact picture and says nothing of one.
#[tokio::test]
async fn a_picture_by_another_recipe_than_its_jobs_is_refused() {
    let fixture = Fixture::new().await;
    let job_ids = submit(&fixture).await;
    let worker_id = fixture.worker().await;
    let claimed = fixture.claim(&job_ids, worker_id).await;
    for (claimed, recipe) in [
        (&claimed[0], Recipe::EXACT),
        (&claimed[0], Recipe { cache_interval: 2, ..RECIPE }),
        (&claimed[0], Recipe { guidance_stop: 0.700_000_000_000_000_1, ..RECIPE }),
        (&claimed[1], RECIPE),
    ] {
        let drawn = schema::CompletedJob { recipe, ..completed(claimed, worker_id) };
        match fixture.catalog.complete_if_leased(&[drawn]).await.unwrap_err() {
            CatalogError::Refused { rule, .. } => assert_eq!(rule, "images_recipe_is_the_jobs", "{recipe:?}"),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(fixture.count("SELECT count(*) FROM images").await, 0);
    let without_columns = format!(
        "INSERT INTO images (image_id, job_id, batch_id, acceptance_id, lease_generation, worker_id, bucket, object_key,
             sha256, size_bytes, width, height, seed, prompt_truncated, weights_sha256, device, dtype, noise_dtype,
             text_encoder_ms, denoise_ms, vae_ms, safety_ms, encode_ms, upload_ms)
         SELECT gen_random_uuid(), job_id, batch_id, acceptance_id, 1, '{worker_id}', 'pictures',
                'v1/' || batch_id || '/00000000-0.png', repeat('0', 64), 1, 128, 128, 7, false, repeat('0', 64),
                'cpu', 'f32', 'f32', 0, 0, 0, 0, 0, 0
         FROM jobs JOIN batches USING (batch_id) WHERE job_id = '{{}}'"
    );
    let of_job = |index: usize| without_columns.replace("{}", &job_ids[index].to_string());
    // Without the job's completion the other one is refused too, but later and by another rule.
    assert_refused(&fixture, &[("images_recipe_is_the_jobs", of_job(0)), ("image_counts", of_job(1))]).await;
}

/// Rows of builds before recipes, and of those that do not know them: the columns are left out.
#[tokio::test]
async fn rows_that_say_nothing_are_exact() {
    let fixture = Fixture::new().await;
    let defaults = "SELECT count(*) FROM information_schema.columns
        WHERE table_name IN ('jobs', 'images') AND is_nullable = 'NO'
          AND (column_name, column_default) IN (('guidance_start', '0'), ('guidance_stop', '1'), ('cache_interval', '1'))";
    assert_eq!(fixture.count(defaults).await, 6);
    assert_eq!(Recipe::EXACT, Recipe { guidance_start: 0.0, guidance_stop: 1.0, cache_interval: 1 });
}
