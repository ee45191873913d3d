//! Whether a picture depends on its company: one job in every place of a batch, with other neighbors each time, compared bit
//! for bit. What decides is kernels, so it has to be asked on each kind of machine.

use serde::Serialize;

use super::measure::{self, Bench, Call};
use crate::diffusion::{BatchSize, Batching, ImageRequest};

/// The answer.
#[derive(Debug, Serialize)]
pub struct CompanyReport {
    device: String,
    dtype: String,
    /// Pictures computed at once.
    batch_size: usize,
    graph: bool,
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
    let mut replayed_steps = 0;
    let mut one_call = |bench: &mut Bench<'_>, requests: Vec<ImageRequest>| -> anyhow::Result<Call> {
        bench.requests = requests;
        let call = bench.call()?;
        replayed_steps += call.replayed_steps.unwrap_or(0);
        Ok(call)
    };
    let (mut first, mut places_that_differ, mut neighbors_differ) = (None, Vec::new(), true);
    for place in 0..batch_size {
        let mut requests = neighbors(place);
        requests[place] = job.clone();
        let call = one_call(bench, requests)?;
        let bits = call.bits_of(place);
        neighbors_differ &=
            (0..batch_size).filter(|&other| other != place).all(|other| call.bits_of(other) != bits);
        match &first {
            None => first = Some(bits),
            Some(first) if *first != bits => places_that_differ.push(place),
            Some(_) => {}
        }
    }
    let alone = one_call(bench, vec![job])?;
    Ok(CompanyReport {
        device: bench.device().to_string(),
        dtype: bench.dtype().to_string(),
        batch_size,
        graph: bench.batching.graph,
        replayed_steps,
        calls: batch_size + 1,
        places_that_differ,
        alone_is_equal: first == Some(alone.bits_of(0)),
        neighbors_differ,
    })
}
