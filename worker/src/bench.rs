//! `darkroom-worker bench`: how fast the model runs here, without a fleet, a download or a picture worth looking at.
//!
//! The model has Stable Diffusion v1's sizes (or smaller ones) and weights drawn from a seed, unless a checkpoint is
//! named; speed does not depend on what the weights say. `bench/compare.py` drives the same command beside diffusers.

mod checkpoint;
mod measure;
mod memory;
mod report;

use std::io::{BufRead as _, Write as _};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context as _;

pub use self::checkpoint::ModelSize;
use self::measure::{Bench, Call};
use self::report::{Report, Run};
use crate::diffusion::device::set_threads_per_picture;
use crate::diffusion::{
    ComputeDevice, ComputeDtype, GenerationParameters, KernelChoice, LoadOptions, SchedulerKind,
    StableDiffusionPipeline,
};
use crate::generate::RecipeArgs;

/// Measures the model's speed, stage by stage, with weights drawn from a seed.
#[derive(Debug, clap::Args)]
pub struct BenchArgs {
    /// Which model to make: `full` has the sizes of Stable Diffusion v1.5, the others its structure.
    #[arg(long, value_name = "SIZE", default_value = "full", conflicts_with = "model")]
    pub size: ModelSize,
    /// Measure this checkpoint (a folder in diffusers' layout) instead.
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Write the model to this folder, then measure it from there: other programs can load the same weights.
    #[arg(long, value_name = "DIR", conflicts_with = "model")]
    pub save_model: Option<PathBuf>,
    /// Write the model and measure nothing.
    #[arg(long, requires = "save_model")]
    pub save_only: bool,
    /// Seed of the weights.
    #[arg(long, default_value_t = 0, value_name = "SEED")]
    pub weights_seed: u64,
    /// Pictures in a call, one or several numbers.
    #[arg(long, value_delimiter = ',', default_value = "1", value_name = "N,…",
          value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub batch_sizes: Vec<u16>,
    /// Precisions to compute in, one or several of f32, f16 and bf16.
    #[arg(long, value_delimiter = ',', default_value = "f32", value_name = "DTYPE,…")]
    pub dtypes: Vec<ComputeDtype>,
    /// Where to compute: cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    pub device: ComputeDevice,
    /// What a GPU computes with: fused (our own kernels where they fit) or plain (libtorch's alone).
    #[arg(long, default_value_t = KernelChoice::default(), value_name = "plain|fused")]
    pub kernels: KernelChoice,
    /// Threads of the CPU that work on one picture.
    #[arg(long, value_name = "COUNT", default_value_t = NonZeroUsize::MIN)]
    pub cpu_threads: NonZeroUsize,
    /// Pixels in a row [default: the model's own, 512 for `full`].
    #[arg(long, value_name = "PIXELS")]
    pub width: Option<u32>,
    /// Rows of pixels [default: the model's own, 512 for `full`].
    #[arg(long, value_name = "PIXELS")]
    pub height: Option<u32>,
    /// Denoising steps; PNDM takes one more.
    #[arg(long, default_value_t = 50, value_name = "COUNT")]
    pub num_inference_steps: usize,
    /// Noise scheduler.
    #[arg(long, default_value = "pndm", value_name = "NAME")]
    pub scheduler: SchedulerKind,
    /// Weight of the guidance; 1 and below is without.
    #[arg(long, default_value_t = 7.5, allow_negative_numbers = true, value_name = "SCALE")]
    pub guidance_scale: f64,
    /// What to leave out for speed.
    #[command(flatten)]
    pub recipe: RecipeArgs,
    /// Calls before the measured ones, at most; two in a row that differ by less than 1 % are enough.
    #[arg(long, default_value_t = 3, value_name = "CALLS")]
    pub warmup: usize,
    /// Measured calls.
    #[arg(long, default_value_t = 5, value_name = "CALLS", value_parser = clap::value_parser!(u16).range(1..))]
    pub repeats: u16,
    /// What the device can do at most, in TFLOP/s of the dtype measured; the share of it that was used is printed. For
    /// bf16 and f16: 312 on an A100, 989.5 on an H100 or H200 (dense, from the data sheets).
    #[arg(long, value_name = "TFLOPS")]
    pub peak_tflops: Option<f64>,
    /// Write what the first call gave, final latents and pixels, as safetensors.
    #[arg(long, value_name = "FILE")]
    pub outputs: Option<PathBuf>,
    /// Stop each call after its last denoising step: a step of a large model is soon measured then, on a slow machine too.
    #[arg(long)]
    pub denoise_only: bool,
    /// Make one call of the first batch size and dtype for each line on standard input and answer each with a line of
    /// JSON, so that another program can take turns with this one.
    #[arg(long)]
    pub on_demand: bool,
    /// Print the result as one line of JSON instead of a table.
    #[arg(long)]
    pub json: bool,
}

/// Runs the command. Must come before any other use of libtorch in the process (see `diffusion::device`).
pub fn run(args: &BenchArgs) -> anyhow::Result<()> {
    if args.device == ComputeDevice::Cpu {
        set_threads_per_picture(args.cpu_threads);
    }
    args.device.open()?;
    let scratch = tempfile::tempdir().context("cannot make a folder for the model")?;
    let folder = match (&args.model, &args.save_model) {
        (Some(folder), _) | (None, Some(folder)) => folder.as_path(),
        (None, None) => scratch.path(),
    };
    if args.model.is_none() {
        checkpoint::write(args.size, folder).context("cannot write the model's settings")?;
    }
    if args.save_model.is_some() {
        StableDiffusionPipeline::save_drawn_weights(folder, args.weights_seed)?;
        if args.save_only {
            return Ok(());
        }
    }

    let mut report = Report::new(args, folder)?;
    for &dtype in &args.dtypes {
        let start = Instant::now();
        let pipeline = load(args, folder, dtype)?;
        let load_seconds = start.elapsed().as_secs_f64();
        for &batch_size in &args.batch_sizes {
            let parameters = parameters(args, &pipeline);
            let bench = Bench {
                pipeline: &pipeline,
                requests: measure::requests(batch_size.into(), args.guidance_scale),
                parameters,
                denoise_only: args.denoise_only,
            };
            if args.on_demand {
                return answer_lines(&bench, args.outputs.as_deref());
            }
            let flops = report.set_size(&parameters)?;
            report.runs.push(measure(args, &bench, flops, load_seconds, report.runs.is_empty())?);
        }
    }
    print(&if args.json { serde_json::to_string(&report)? } else { report.to_table() })
}

/// The model, from files if there are any.
fn load(args: &BenchArgs, folder: &Path, dtype: ComputeDtype) -> anyhow::Result<StableDiffusionPipeline> {
    let options = LoadOptions { device: args.device, dtype, kernels: args.kernels };
    Ok(if args.model.is_some() || args.save_model.is_some() {
        StableDiffusionPipeline::from_pretrained(folder, &options)?
    } else {
        StableDiffusionPipeline::with_drawn_weights(folder, &options, args.weights_seed)?
    })
}

fn parameters(args: &BenchArgs, pipeline: &StableDiffusionPipeline) -> GenerationParameters {
    let (width, height) = pipeline.default_size();
    GenerationParameters {
        width: args.width.unwrap_or(width),
        height: args.height.unwrap_or(height),
        num_inference_steps: args.num_inference_steps,
        scheduler: args.scheduler,
        noise: None,
        recipe: args.recipe.to_recipe(),
    }
}

/// Warms up, then measures.
fn measure(
    args: &BenchArgs,
    bench: &Bench<'_>,
    flops: report::PictureFlops,
    load_seconds: f64,
    is_first: bool,
) -> anyhow::Result<Run> {
    let mut call = calls(bench, args.outputs.as_deref().filter(|_| is_first));
    let mut last = None;
    for _ in 0..args.warmup {
        let seconds = call()?.seconds;
        let settled = last.is_some_and(|last: f64| (seconds / last - 1.0).abs() < 0.01);
        last = Some(seconds);
        if settled {
            break;
        }
    }
    memory::forget_peak();
    let measured = (0..args.repeats).map(|_| call()).collect::<anyhow::Result<Vec<_>>>()?;
    Ok(Run::new(bench, &measured, flops, load_seconds, args.peak_tflops))
}

/// One call for each line, until there are no more.
fn answer_lines(bench: &Bench<'_>, outputs: Option<&Path>) -> anyhow::Result<()> {
    let mut call = calls(bench, outputs);
    print("ready")?;
    for line in std::io::stdin().lock().lines() {
        line.context("cannot read from standard input")?;
        print(&serde_json::to_string(&call()?)?)?;
    }
    Ok(())
}

/// Makes a call each time it is asked; what the first one gave is written to `outputs`.
fn calls(bench: &Bench<'_>, mut outputs: Option<&Path>) -> impl FnMut() -> anyhow::Result<Call> {
    move || {
        let call = bench.call()?;
        if let Some(path) = outputs.take() {
            call.write_outputs(path)?;
        }
        Ok(call)
    }
}

/// A line for the person or the program that reads.
fn print(line: &str) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout();
    writeln!(stdout, "{line}").and_then(|()| stdout.flush()).context("cannot write to standard output")
}
