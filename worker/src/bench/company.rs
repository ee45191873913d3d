//! Whether a picture depends on its company: one job in every place of a batch, with other neighbors each time, compared bit
//! for bit. What decides is kernels, so it has to be asked on each kind of machine.

use serde::Serialize;

use super::measure::{self, Bench};
use crate::diffusion::{BatchSize, Batching, ImageRequest};

/// The answer.
#[derive(Debug, Serialize)]
pub struct CompanyReport {
    device: String,
    dtype: String,
    /// Pictures computed at once.
    batch_size: usize,
    graph: bool,
    /// Whether each call was finished while the next was denoised.
    overlap_decode: bool,
    /// Denoising steps that were replayed from a graph, over all calls.
    replayed_steps: usize,
    /// Calls made: one for each place, and one without real neighbors.
    calls: usize,
    /// Places in which the job's latents or pixels had other bits than in the first.
    places_that_differ: Vec<usize>,
    /// Whether the job alone, with made-up neighbors, had the bits that it had among real ones.
    alone_is_equal: bool,
    /// Whether the job's neighbors' pictures differed from each other: else nothing was tried.
    neighbors_differ: bool,
}

impl CompanyReport {
    /// Whether the company made no difference, and could have made one.
    pub fn is_equal(&self) -> bool {
        self.places_that_differ.is_empty() && self.alone_is_equal && self.neighbors_differ
    }
}

/// Makes the calls. The batch has as many pictures as `bench` asks for.
pub fn check(bench: &mut Bench<'_>) -> anyhow::Result<CompanyReport> {
    let batch_size = bench.batch_size();
    let job = bench.requests[0].clone();
    bench.batching = Batching { size: BatchSize::Padded(batch_size), ..bench.batching };
    let neighbors = |call: usize| -> Vec<ImageRequest> {
        let mut requests = measure::requests(batch_size, job.guidance_scale);
        for request in &mut requests {
            request.seed += 1000 * (call as u64 + 1);
            request.prompt = format!("neighbor {}", request.seed);
        }
        requests
    };
    let in_place = |place: usize| {
        let mut requests = neighbors(place);
        requests[place] = job.clone();
        requests
    };
    let microbatches: Vec<_> = (0..batch_size).map(in_place).chain([vec![job.clone()]]).collect();
    let (mut first, mut places_that_differ, mut neighbors_differ) = (None, Vec::new(), true);
    let (mut place, mut replayed_steps, mut alone_is_equal) = (0, 0, false);
    bench.row(&microbatches, |call| {
        replayed_steps += call.replayed_steps.unwrap_or(0);
        if place == batch_size {
            alone_is_equal = first == Some(call.bits_of(0));
            return;
        }
        let bits = call.bits_of(place);
        neighbors_differ &=
            (0..batch_size).filter(|&other| other != place).all(|other| call.bits_of(other) != bits);
        match &first {
            None => first = Some(bits),
            Some(first) if *first != bits => places_that_differ.push(place),
            Some(_) => {}
        }
        place += 1;
    })?;
    Ok(CompanyReport {
        device: bench.device().to_string(),
        dtype: bench.dtype().to_string(),
        batch_size,
        graph: bench.batching.graph,
        overlap_decode: bench.lane.is_some(),
        replayed_steps,
        calls: batch_size + 1,
        places_that_differ,
        alone_is_equal,
        neighbors_differ,
    })
}
