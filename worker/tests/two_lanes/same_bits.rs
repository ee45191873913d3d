//! P8: a picture has the same bits, and the same verdict, whichever thread finishes it.

use serde_json::json;
use worker::diffusion::{BatchSize, Batching};
use worker::engine::Lanes;
use worker::stable_diffusion::StableDiffusionPipeline;

use crate::checkpoint::Checkpoint;
use crate::golden::F32;
use crate::worker_under_test::{Setup, WorkerUnderTest};

const MICROBATCH: usize = 3;
const JOBS: u32 = 6;

/// What a worker stored of each job: its pixels, unless it is flagged, and the checker's scores.
async fn drawn(checkpoint: &Checkpoint, lanes: Lanes, batching: Batching) -> Vec<(Vec<u8>, String)> {
    let mut worker = WorkerUnderTest::new(Setup::full_microbatches(MICROBATCH));
    let jobs = worker.submit_many(0..JOBS);
    let folder = checkpoint.folder().to_owned();
    let load = move || StableDiffusionPipeline::load_batching(&folder, F32, batching);
    worker.start_on(lanes, move || Box::new(load().expect("it loads"))).await;
    worker.wait_for_acks(JOBS as usize).await;
    worker.drain().await.expect("a good end");
    let objects = worker.store.objects.lock().unwrap();
    let of_job = |job_id| {
        let image = worker.row(job_id).image.expect("it is completed");
        let png = image.object.map(|object| objects[&object.object_key].clone());
        let pixels = png.map(|png| image::load_from_memory(&png).unwrap().to_rgb8().into_raw());
        (pixels.unwrap_or_default(), format!("{:?}", image.safety))
    };
    jobs.into_iter().map(of_job).collect()
}

#[tokio::test]
async fn pictures_do_not_depend_on_the_lane() {
    let with_checker = Checkpoint::new();
    // Its pictures are published whatever they show, so that there are pixels to compare.
    let without_checker = Checkpoint::new();
    without_checker.edit_json("model_index.json", |json| json["safety_checker"] = json!([null, null]));
    // Each picture alone, as on a CPU, and all in one batch on buffers that the next call writes to, as on a GPU.
    let batched = Batching { size: BatchSize::Padded(4), decode_size: 2, graph: false };
    for checkpoint in [with_checker, without_checker] {
        for batching in [Batching::of(F32.device), batched] {
            let one = drawn(&checkpoint, Lanes::One, batching).await;
            let two = drawn(&checkpoint, Lanes::Two, batching).await;
            let differ: Vec<usize> = (0..JOBS as usize).filter(|&job| one[job] != two[job]).collect();
            assert!(differ.is_empty(), "{batching:?}: other bits in {differ:?}");
            let are_unlike = one.iter().enumerate().all(|(job, drawn)| !one[..job].contains(drawn));
            assert!(are_unlike, "else nothing was compared");
        }
    }
}
