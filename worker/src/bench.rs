//! `darkroom-worker bench`: how fast the model runs here, without a fleet, a download or a picture worth looking at.
//!
//! The model has Stable Diffusion v1's sizes (or smaller ones) and weights drawn from a seed, unless a checkpoint is
//! named; speed does not depend on what the weights say. `bench/compare.py` drives the same command beside diffusers.

mod checkpoint;
mod company;
mod decode_lane;
mod measure;
mod memory;
mod report;

use std::io::BufRead as _;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, ensure};

pub use self::checkpoint::ModelSize;
pub(crate) use self::checkpoint::write as write_settings;
use self::decode_lane::DecodeLane;
pub(crate) use self::measure::requests;
use self::measure::{Bench, Call};
use self::report::{Report, Run};
use crate::batching_args::{Switch, batching};
use crate::diffusion::cuda::{AttentionKernel, set_attention_order};
use crate::diffusion::device::set_threads_per_picture;
use crate::diffusion::{
    ComputeDevice, ComputeDtype, GenerationParameters, SchedulerKind, StableDiffusionPipeline,
};
use crate::generate::RecipeArgs;
use crate::kernel_args::KernelArgs;
use crate::output::print_line;

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
    /// What a GPU computes with.
    #[command(flatten)]
    pub kernels: KernelArgs,
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
    /// What a denoising step is launched as: `on` is as one CUDA graph, on a GPU; with `off,on` calls take turns.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "off",
        value_name = "on|off,…",
        hide_possible_values = true
    )]
    pub graph: Vec<Switch>,
    /// Decode and check each call while the next is denoised, as a worker does with the same option; with `off,on` they take turns.
    /// It shows with --in-a-row only.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "off",
        value_name = "on|off,…",
        hide_possible_values = true,
        conflicts_with_all = ["denoise_only", "on_demand"]
    )]
    pub overlap_decode: Vec<Switch>,
    /// Calls that are measured as one, without a pause between them; what is printed is one call's mean.
    #[arg(long, default_value_t = 1, value_name = "CALLS", value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub in_a_row: u16,
    /// Compute so many pictures at once, the missing ones made up. 0 makes nothing up.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u16).range(0..=1024))]
    pub pad_batch: u16,
    /// Which kernels of attention a GPU tries first, one or several of cudnn, flash, efficient and math [default: libtorch's
    /// order].
    #[arg(long, value_delimiter = ',', value_name = "NAME,…")]
    pub attention: Vec<AttentionKernel>,
    /// Instead of measuring, put one picture into each place of a batch of the first batch size and dtype, among other
    /// pictures each time, and compare its bits; the command fails if they differ.
    #[arg(long, conflicts_with = "on_demand")]
    pub check_company: bool,
    /// Compare the first call's final latents with those in a file of `--outputs`.
    #[arg(long, value_name = "FILE")]
    pub reference: Option<PathBuf>,
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
    if !args.attention.is_empty() {
        set_attention_order(&args.attention).context("the kernels of attention cannot be chosen")?;
    }
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

    let lane = match args.overlap_decode.iter().any(|overlap| overlap.is_on()) {
        true => Some(DecodeLane::start(args.device)?),
        false => None,
    };
    let mut report = Report::new(args, folder)?;
    for &dtype in &args.dtypes {
        let start = Instant::now();
        let pipeline = load(args, folder, dtype)?;
        let load_seconds = start.elapsed().as_secs_f64();
        for &batch_size in &args.batch_sizes {
            let parameters = parameters(args, &pipeline);
            let bench = |(graph, overlap): (&Switch, &Switch)| Bench {
                pipeline: &pipeline,
                requests: measure::requests(batch_size.into(), args.guidance_scale),
                parameters,
                batching: batching(args.device, *graph, args.pad_batch),
                denoise_only: args.denoise_only,
                lane: lane.as_ref().filter(|_| overlap.is_on()),
                in_a_row: args.in_a_row.into(),
            };
            let each_way = |graph| args.overlap_decode.iter().map(move |overlap| (graph, overlap));
            let mut benches: Vec<Bench<'_>> = args.graph.iter().flat_map(each_way).map(bench).collect();
            if args.check_company {
                return benches.iter_mut().try_for_each(check_company);
            }
            if args.on_demand {
                return answer_lines(&benches[0], args.outputs.as_deref());
            }
            let flops = report.set_size(&parameters)?;
            let measured = measure(args, &benches, &mut report)?;
            report.runs.extend(
                benches
                    .iter()
                    .zip(&measured)
                    .map(|(bench, calls)| Run::new(bench, calls, flops, load_seconds, args.peak_tflops)),
            );
        }
    }
    print_line(&if args.json { serde_json::to_string(&report)? } else { report.to_table() })
}

/// The model, from files if there are any.
fn load(args: &BenchArgs, folder: &Path, dtype: ComputeDtype) -> anyhow::Result<StableDiffusionPipeline> {
    let options = args.kernels.load_options(args.device, dtype)?;
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

/// Warms each up, then measures all in turn: the calls of each. The report is told of the very first call.
fn measure(args: &BenchArgs, benches: &[Bench<'_>], report: &mut Report) -> anyhow::Result<Vec<Vec<Call>>> {
    let mut first = report.runs.is_empty();
    for bench in benches {
        let mut last = None;
        for _ in 0..args.warmup {
            let call = bench.call()?;
            if std::mem::take(&mut first) {
                note_first(args, &call, report)?;
            }
            let settled = last.is_some_and(|last: f64| (call.seconds / last - 1.0).abs() < 0.01);
            last = Some(call.seconds);
            if settled {
                break;
            }
        }
    }
    memory::forget_peak();
    let mut measured: Vec<Vec<Call>> = benches.iter().map(|_| Vec::new()).collect();
    for _ in 0..args.repeats {
        for (bench, calls) in benches.iter().zip(&mut measured) {
            let call = bench.call()?;
            if std::mem::take(&mut first) {
                note_first(args, &call, report)?;
            }
            calls.push(call);
        }
    }
    Ok(measured)
}

/// Writes and compares what a call gave, as asked for.
fn note_first(args: &BenchArgs, call: &Call, report: &mut Report) -> anyhow::Result<()> {
    if let Some(path) = &args.outputs {
        call.write_outputs(path)?;
    }
    if let Some(path) = &args.reference {
        report.difference_from_reference = Some(call.difference_from(path)?);
    }
    Ok(())
}

/// Says whether a picture depends on its company, and fails if it does.
fn check_company(bench: &mut Bench<'_>) -> anyhow::Result<()> {
    let report = company::check(bench)?;
    print_line(&serde_json::to_string(&report)?)?;
    ensure!(report.is_equal(), "a picture depends on its company");
    Ok(())
}

/// One call for each line, until there are no more; what the first one gave is written to `outputs`.
fn answer_lines(bench: &Bench<'_>, mut outputs: Option<&Path>) -> anyhow::Result<()> {
    print_line("ready")?;
    for line in std::io::stdin().lock().lines() {
        line.context("cannot read from standard input")?;
        let call = bench.call()?;
        if let Some(path) = outputs.take() {
            call.write_outputs(path)?;
        }
        print_line(&serde_json::to_string(&call)?)?;
    }
    Ok(())
}
