//! Prompts in, pictures out.

use std::time::Duration;

use fleet_tests::{Fleet, Servers};

const SOON: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_becomes_checked_pictures_and_rows() {
    let fleet = Fleet::new(Servers::shared()).await;
    let batch = fleet.submit("a lighthouse\na harbour\na gull\n", &["--num-inference-steps", "4"]);
    let _serve = fleet.serve();
    let _worker = fleet.worker(&["--max-microbatch", "2"]);
    fleet.await_all_final(Duration::from_secs(120)).await;
    assert_eq!(fleet.jobs_in("completed").await, 3);
    let unchecked =
        "SELECT count(*) FROM images WHERE has_nsfw_concept IS NULL OR cardinality(concept_scores) = 0";
    assert_eq!(fleet.count(unchecked).await, 0, "each picture went through the safety checker");
    let unlicensed = "SELECT count(*) FROM images JOIN licence_acceptances USING (acceptance_id) WHERE principal <> 'tester'";
    assert_eq!(fleet.count(unlicensed).await, 0);

    let published = fleet.images(&batch).await.into_iter().filter(|image| image.object_key.is_some()).count();
    let output = tempfile::tempdir().unwrap();
    let folder = output.path().join("pictures");
    let sheet = output.path().join("sheet.png");
    let arguments =
        ["fetch", &batch, "--output", folder.to_str().unwrap(), "--contact-sheet", sheet.to_str().unwrap()];
    fleet.darkroom(&arguments).succeeded();
    let fetched = std::fs::read_dir(&folder).unwrap().filter(|entry| {
        entry.as_ref().is_ok_and(|entry| entry.path().extension().is_some_and(|extension| extension == "png"))
    });
    assert_eq!(fetched.count(), published);
    let sheet = image::open(&sheet).expect("the contact sheet is a PNG");
    assert!(sheet.width() > 64 && sheet.height() > 64);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_job_gives_the_same_picture_whatever_it_rode_with() {
    let fleet = Fleet::new(Servers::shared()).await;
    // Several seeds, because the random checkpoint's safety checker withholds some of its pictures.
    let options = ["--num-inference-steps", "3", "--seed", "7", "--num-images-per-prompt", "4"];
    let _serve = fleet.serve();
    let company = ["--max-microbatch", "4", "--max-wait-ms", "2000"];
    let worker = fleet.worker(&company);
    let alone = fleet.submit("a lighthouse\n", &options);
    fleet.await_all_final(Duration::from_secs(120)).await;
    drop(worker);
    // Nor does it matter that another microbatch is decoded meanwhile.
    let _worker = fleet.worker(&[&company[..], &["--overlap-decode", "on"]].concat());
    let together = fleet.submit("a harbour\na lighthouse\na gull\n", &options);
    fleet.await_all_final(Duration::from_secs(120)).await;
    let (alone, together) = (fleet.images(&alone).await, fleet.images(&together).await);
    assert_eq!((alone.len(), together.len()), (4, 12));
    let mut published = 0;
    for (index, image) in alone.iter().enumerate() {
        let (same, other) = (&together[4 + index], &together[index]);
        assert_eq!(image.concept_scores, same.concept_scores, "seed {}", 7 + index);
        assert_ne!(image.concept_scores, other.concept_scores, "prompts matter");
        if let (Some(image), Some(same)) = (&image.object_key, &same.object_key) {
            assert_eq!(
                pixels(&fleet.object(image).await),
                pixels(&fleet.object(same).await),
                "seed {}",
                7 + index
            );
            published += 1;
        }
    }
    assert!(published > 0, "no picture was compared");
}

/// The pixels of a PNG, without what is written beside them.
fn pixels(png: &[u8]) -> Vec<u8> {
    image::load_from_memory(png).expect("a PNG").to_rgb8().into_raw()
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_of_different_batches_share_a_microbatch() {
    let fleet = Fleet::new(Servers::shared()).await;
    for _ in 0..4 {
        fleet.submit("one\n", &["--num-inference-steps", "2"]);
    }
    let _serve = fleet.serve();
    let _worker = fleet.solid_color_worker(200, &["--max-microbatch", "4", "--max-wait-ms", "5000"]);
    fleet.await_all_final(SOON).await;
    let largest = "SELECT max(microbatch_size)::bigint FROM attempts";
    assert_eq!(fleet.count(largest).await, 4, "four batches of one job fill one microbatch");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_batch_stops_and_stays_cancelled() {
    let fleet = Fleet::new(Servers::shared()).await;
    let batch = fleet.submit(&"slow\n".repeat(20), &["--num-inference-steps", "50"]);
    let _serve = fleet.serve();
    let _worker = fleet.solid_color_worker(60_000, &["--max-microbatch", "2"]);
    fleet.await_running(SOON).await;
    fleet.darkroom(&["cancel", &batch]).succeeded();
    assert_eq!(fleet.jobs_in("cancelled").await, 20, "running jobs too");
    // The worker lets go between two steps: it takes the next batch long before a minute of drawing has passed.
    let next = fleet.submit("next\n", &["--num-inference-steps", "50"]);
    let running = format!("SELECT count(*) FROM jobs WHERE batch_id = '{next}' AND state = 'running'");
    fleet.await_count("the next batch to run", &running, 1, Duration::from_secs(30)).await;
    assert_eq!(fleet.jobs_in("cancelled").await, 20);
    assert_eq!(fleet.count("SELECT count(*) FROM images").await, 0);
}
