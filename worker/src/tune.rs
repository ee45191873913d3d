//! `darkroom-worker tune`: which engine of cuDNN is fastest for each convolution of a model, on the GPU that is here, for the
//! batch sizes that a fleet computes with. The file that it writes is for `--convolutions`.
//!
//! Nothing of it depends on what the weights say, so without a checkpoint it makes a model of Stable Diffusion v1's sizes.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use indicatif::{ProgressBar, ProgressStyle};

use crate::batching_args::{Switch, batching};
use crate::bench::{ModelSize, requests, write_settings};
use crate::diffusion::convolution::{ConvolutionEngines, PinnedEngine};
use crate::diffusion::cuda::Gpu;
use crate::diffusion::kernels::Kernels;
use crate::diffusion::tuning::{CudnnEngines, Recorder, Tuned, Tuner};
use crate::diffusion::{
    ComputeDevice, ComputeDtype, GenerationParameters, KernelChoice, LoadOptions, Recipe, SchedulerKind,
    StableDiffusionPipeline, StepControl,
};
use crate::output::{print_line, write_atomically};

/// Steps of the calls that tell the convolutions: one with guidance, and one without.
const STEPS: usize = 2;
/// Of those calls.
const GUIDANCE_SCALE: f64 = 7.5;

/// Finds the fastest engine of cuDNN for each convolution of a model on this GPU, and pins them in a file.
#[derive(Debug, clap::Args)]
pub struct TuneArgs {
    /// Where to write the engines. Workers, `generate` and `bench` take the file with --convolutions.
    #[arg(long, value_name = "FILE")]
    pub output: PathBuf,
    /// Pictures that the workers compute at once, made-up ones included: their --pad-batch, or their --max-microbatch. One or
    /// several numbers.
    #[arg(long, value_delimiter = ',', value_name = "N,…", required = true,
          value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub pad_batch: Vec<u16>,
    /// Which model to make: `full` has the sizes of Stable Diffusion v1.5.
    #[arg(long, value_name = "SIZE", default_value = "full", conflicts_with = "model")]
    pub size: ModelSize,
    /// Take the sizes of this checkpoint (a folder in diffusers' layout) instead.
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// The GPU: cuda or cuda:N.
    #[arg(long, default_value = "cuda")]
    pub device: ComputeDevice,
    /// Precision to compute in: f16 or bf16.
    #[arg(long, default_value = "f16")]
    pub dtype: ComputeDtype,
    /// Pixels in a row [default: the model's own, 512 for `full`].
    #[arg(long, value_name = "PIXELS")]
    pub width: Option<u32>,
    /// Rows of pixels [default: the model's own, 512 for `full`].
    #[arg(long, value_name = "PIXELS")]
    pub height: Option<u32>,
}

/// Runs the command. Must come before any other use of libtorch in the process (see `diffusion::device`).
pub fn run(args: &TuneArgs) -> anyhow::Result<()> {
    let index = check(args)?;
    args.device.open()?;
    let kernels = Kernels::open(KernelChoice::Fused, args.device, args.dtype);
    let Gpu { name: gpu, cudnn, .. } = Gpu::describe(index)?;
    let engines = CudnnEngines::open(&kernels)?;
    let recorder = Arc::new(Recorder::default());
    record(args, kernels.clone().with_convolver(recorder.clone()))?;
    let convolutions = recorder.seen();
    ensure!(!convolutions.is_empty(), "the model has no convolution that engines can be pinned for");

    let bar = ProgressBar::new(convolutions.len() as u64).with_style(
        ProgressStyle::with_template("{bar:40} convolution {pos}/{len}, ETA {eta}: {msg}")
            .expect("the template is constant and valid"),
    );
    let tuner = Tuner::on_gpu(kernels, &engines);
    let tuned = tuner.tune(&convolutions, |tuned| {
        bar.set_message(tuned.convolution.to_string());
        bar.inc(1);
    });
    bar.finish_and_clear();
    let tuned = tuned.context("the engines could not be tried out")?;
    let engines = pinned(gpu, cudnn, &tuned);
    write(&args.output, &engines)?;
    print_line(&table(&tuned, &engines, &args.output))
}

/// The GPU's number, if engines can be chosen for these.
fn check(args: &TuneArgs) -> anyhow::Result<usize> {
    let mut faults = Vec::new();
    let index = match args.device {
        ComputeDevice::Cuda(index) => index,
        ComputeDevice::Cpu => {
            faults.push(
                "`--device` must be `cuda` or `cuda:N` but is `cpu`: a CPU has no engines to choose from",
            );
            0
        }
    };
    if args.dtype == ComputeDtype::F32 {
        faults.push("`--dtype` must be `f16` or `bf16` but is `f32`: engines are pinned in 16 bits only");
    }
    ensure!(faults.is_empty(), "{}", faults.join("\n"));
    Ok(index)
}

/// Makes the model with kernels that note its convolutions, and a call for each batch size.
fn record(args: &TuneArgs, kernels: Kernels) -> anyhow::Result<()> {
    let scratch = tempfile::tempdir().context("cannot make a folder for the model")?;
    let (device, dtype) = (args.device, args.dtype);
    let options = LoadOptions { device, dtype, kernels: KernelChoice::Fused, convolutions: None };
    let pipeline = match &args.model {
        Some(folder) => StableDiffusionPipeline::from_pretrained_with_kernels(folder, &options, kernels)?,
        None => {
            write_settings(args.size, scratch.path()).context("cannot write the model's settings")?;
            StableDiffusionPipeline::with_drawn_weights_and_kernels(scratch.path(), &options, 0, kernels)?
        }
    };
    let (width, height) = pipeline.default_size();
    let parameters = GenerationParameters {
        width: args.width.unwrap_or(width),
        height: args.height.unwrap_or(height),
        num_inference_steps: STEPS,
        scheduler: SchedulerKind::Ddim,
        noise: None,
        recipe: Recipe { guidance_interval: (0.0, 0.5), ..Recipe::default() },
    };
    for &pad_batch in &args.pad_batch {
        pipeline.set_batching(batching(device, Switch::Off, pad_batch));
        let requests = requests(pad_batch.into(), GUIDANCE_SCALE);
        pipeline.generate(&requests, &parameters, &mut |_| StepControl::Continue)?;
    }
    Ok(())
}

/// The file's content.
fn pinned(gpu: String, cudnn: String, tuned: &[Tuned]) -> ConvolutionEngines {
    let pinned = tuned.iter().filter_map(|tuned| tuned.pinned.clone()).collect();
    ConvolutionEngines { gpu, cudnn, pinned }
}

/// Writes it whole or not at all.
fn write(file: &Path, engines: &ConvolutionEngines) -> anyhow::Result<()> {
    let mut json = serde_json::to_vec_pretty(engines)?;
    json.push(b'\n');
    write_atomically(file, &json)
}

/// A line for each convolution: what its output took by libtorch's way and by the pinned engine, in microseconds. With an
/// addend and a norm after it, both are times to the norm's output.
fn table(tuned: &[Tuned], engines: &ConvolutionEngines, file: &Path) -> String {
    let mut text = format!(
        "{} and cuDNN {}\n{:>11} {:>9} {:>6}  {:>6} {:>7}  convolution\n",
        engines.gpu, engines.cudnn, "libtorch/µs", "engine/µs", "ratio", "tried", "refused"
    );
    for Tuned { convolution, pinned, tried, refused } in tuned {
        let times = match pinned {
            Some(PinnedEngine { microseconds, libtorch_microseconds, .. }) => format!(
                "{libtorch_microseconds:>11.1} {microseconds:>9.1} {:>6.2}",
                libtorch_microseconds / microseconds
            ),
            None => format!("{:>11} {:>9} {:>6}", "-", "-", "-"),
        };
        // Writing to a text never fails.
        let _ = writeln!(text, "{times}  {tried:>6} {refused:>7}  {convolution}");
    }
    let (pinned, all) = (engines.pinned.len(), tuned.len());
    let _ = write!(
        text,
        "wrote {}: {pinned} of {all} convolutions pinned, name {}; the others are faster by libtorch's way",
        file.display(),
        engines.name()
    );
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::diffusion::convolution::{Adds, Convolution, EngineChoice};

    fn tuned(microseconds: Option<f64>) -> Tuned {
        let convolution = Convolution {
            dtype: ComputeDtype::F16,
            batch_size: 8,
            in_channels: 320,
            height: 64,
            width: 64,
            out_channels: 320,
            kernel_size: 3,
            stride: 1,
            padding: 1,
            adds: if microseconds.is_some() { Adds::BiasAndResidual } else { Adds::Nothing },
        };
        let pinned = microseconds.map(|microseconds| PinnedEngine {
            convolution,
            choice: EngineChoice { engine: 41, knobs: BTreeMap::from([(2, 4), (27, 1)]) },
            microseconds,
            libtorch_microseconds: 2.0 * microseconds,
        });
        Tuned { convolution, pinned, tried: 40, refused: 1 }
    }

    #[test]
    fn what_has_no_engines_is_refused_all_at_once() {
        let arguments = |device, dtype| TuneArgs {
            output: PathBuf::from("engines.json"),
            pad_batch: vec![4],
            size: ModelSize::Tiny,
            model: None,
            device,
            dtype,
            width: None,
            height: None,
        };
        let error = run(&arguments(ComputeDevice::Cpu, ComputeDtype::F32)).unwrap_err().to_string();
        assert!(error.contains("`--device` must be `cuda` or `cuda:N` but is `cpu`"), "{error}");
        assert!(error.contains("`--dtype` must be `f16` or `bf16` but is `f32`"), "{error}");
        assert_eq!(check(&arguments(ComputeDevice::Cuda(3), ComputeDtype::Bf16)).unwrap(), 3);
    }

    #[test]
    fn what_is_written_is_what_workers_read() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("engines.json");
        let tuned = [tuned(None), tuned(Some(100.0))];
        let engines = pinned("NVIDIA H200".to_owned(), "9.19.0".to_owned(), &tuned);
        write(&file, &engines).unwrap();
        assert_eq!(ConvolutionEngines::read(&file).unwrap(), engines);
        assert_eq!(engines.pinned.len(), 1);
        let table = table(&tuned, &engines, &file);
        assert!(table.contains("      200.0     100.0   2.00      40       1  f16 8×320×64×64"), "{table}");
        assert!(table.contains("1 of 2 convolutions pinned"), "{table}");
    }
}
