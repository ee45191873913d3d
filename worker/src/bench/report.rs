//! What was measured, for people and for programs.

use std::fmt::Write as _;
use std::path::Path;

use serde::Serialize;

use super::measure::{Bench, Call};
use super::{BenchArgs, memory};
use crate::diffusion::config::ConfigFile;
use crate::diffusion::cuda::Gpu;
use crate::diffusion::device::{TORCH_VERSION, device_memory_in_use};
use crate::diffusion::load_error::{Fault, LoadError};
use crate::diffusion::models::autoencoder_kl::AutoencoderKLConfig;
use crate::diffusion::models::clip_text_model::CLIPTextConfig;
use crate::diffusion::models::unet_2d_config::UNet2DConditionConfig;
use crate::diffusion::safety_checker::SafetyCheckerConfig;
use crate::diffusion::{ComputeDevice, GenerationParameters, Recipe};

/// Operations in 10¹² of them.
const TERA: f64 = 1e12;

/// The whole result.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The program's.
    version: &'static str,
    /// `tiny`, `small` or `full`, or a checkpoint's folder.
    model: String,
    device: String,
    cpu_threads: usize,
    scheduler: String,
    num_inference_steps: usize,
    guidance_scale: f64,
    /// Steps with guidance, as fractions of all.
    guidance_interval: (f64, f64),
    cache_interval: usize,
    width: u32,
    height: u32,
    peak_tflops: Option<f64>,
    /// Whether calls ended after their last denoising step; what comes after it is not counted then either.
    denoise_only: bool,
    /// The GPU, its driver and cuDNN, where there is one.
    gpu: Option<Gpu>,
    torch: &'static str,
    /// How far the first call's final latents were from those of `--reference`, by their largest value.
    pub difference_from_reference: Option<f64>,
    /// What one picture takes.
    flops: Option<PictureFlops>,
    /// One for each dtype and batch size.
    pub runs: Vec<Run>,
    #[serde(skip)]
    configs: Configs,
}

/// Floating-point operations that one picture takes if nothing is computed twice; its negative prompt is encoded once a
/// process and not counted.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct PictureFlops {
    /// One prompt.
    text_encoder: i64,
    /// One sample, once.
    unet_forward: i64,
    /// One sample, once, through the outermost layer only.
    unet_cached: i64,
    /// One sample.
    vae_decode: i64,
    /// One picture; 0 without a checker.
    safety_checker: i64,
}

/// What the operations are counted from.
#[derive(Debug)]
struct Configs {
    text: CLIPTextConfig,
    unet: UNet2DConditionConfig,
    vae: AutoencoderKLConfig,
    safety: Option<SafetyCheckerConfig>,
}

/// The measured calls of one dtype and batch size.
#[derive(Debug, Serialize)]
pub struct Run {
    dtype: String,
    /// What computed: `plain`, or `fused` or `attention` and what our own kernels were compiled for.
    kernels: String,
    batch_size: usize,
    /// Pictures that the UNet was given at once, made-up ones included.
    computed_at_once: usize,
    /// Whether steps were to be launched as graphs, and how many of a call's were replayed from one.
    graph: bool,
    replayed_steps: Option<usize>,
    /// Whether a call was finished while the next was denoised.
    overlap_decode: bool,
    /// Calls that were measured as one; times are one call's mean.
    in_a_row: usize,
    /// Making or reading the model; the same for all batch sizes of a dtype.
    load_seconds: f64,
    calls: usize,
    /// Of one call.
    seconds: Spread,
    cpu_seconds: Spread,
    stages: StageSpreads,
    /// By the median.
    images_per_second: f64,
    /// Useful operations only, by the median.
    tflops_per_second: f64,
    /// Of `peak_tflops`, 1 being all of it.
    share_of_peak: Option<f64>,
    /// On this side, during the measured calls.
    peak_resident_bytes: Option<u64>,
    /// On the GPU, all that the process holds there.
    device_bytes: Option<u64>,
}

/// The stages of a call, in seconds.
#[derive(Debug, Serialize)]
struct StageSpreads {
    text_encoder: Spread,
    denoise: Spread,
    vae_decode: Spread,
    to_host: Spread,
    safety_checker: Spread,
}

/// Middle and ends of several measurements.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Spread {
    median: f64,
    min: f64,
    max: f64,
}

impl Spread {
    /// Of at least one number.
    fn of(calls: &[Call], value: impl Fn(&Call) -> f64) -> Self {
        let mut values: Vec<f64> = calls.iter().map(value).collect();
        values.sort_by(f64::total_cmp);
        let last = values.len() - 1;
        // Of an even number, the mean of the two in the middle.
        let median = f64::midpoint(values[last / 2], values[last.div_ceil(2)]);
        Self { median, min: values[0], max: values[last] }
    }
}

impl Configs {
    fn read(folder: &Path) -> Result<Self, LoadError> {
        fn one<C>(
            folder: &Path,
            file: &str,
            read: fn(ConfigFile) -> Result<C, Vec<Fault>>,
        ) -> Result<C, LoadError> {
            ConfigFile::read(folder, file)
                .map_err(|fault| vec![fault])
                .and_then(read)
                .map_err(|faults| LoadError { directory: folder.to_owned(), faults })
        }
        let safety = "safety_checker/config.json";
        Ok(Self {
            text: one(folder, "text_encoder/config.json", CLIPTextConfig::read)?,
            unet: one(folder, "unet/config.json", UNet2DConditionConfig::read)?,
            vae: one(folder, "vae/config.json", AutoencoderKLConfig::read)?,
            safety: match folder.join(safety).exists() {
                true => Some(one(folder, safety, SafetyCheckerConfig::read)?),
                false => None,
            },
        })
    }
}

impl PictureFlops {
    /// All operations of a picture whose UNet is called `num_steps` times, twice as often with guidance; what the recipe
    /// leaves out does not count.
    fn per_picture(&self, num_steps: usize, guided: bool, recipe: &Recipe) -> f64 {
        let (whole, cached) = recipe.num_samples(num_steps, guided);
        let rest = self.text_encoder + self.vae_decode + self.safety_checker;
        rest as f64 + self.unet_forward as f64 * whole as f64 + self.unet_cached as f64 * cached as f64
    }
}

impl Report {
    /// An empty report on the checkpoint in `folder`.
    pub fn new(args: &BenchArgs, folder: &Path) -> anyhow::Result<Self> {
        let model = args.model.as_ref().map(|model| model.display().to_string());
        Ok(Self {
            version: env!("CARGO_PKG_VERSION"),
            model: model.unwrap_or_else(|| args.size.to_string()),
            device: args.device.to_string(),
            cpu_threads: args.cpu_threads.get(),
            scheduler: args.scheduler.to_string(),
            num_inference_steps: args.num_inference_steps,
            guidance_scale: args.guidance_scale,
            guidance_interval: args.recipe.to_recipe().guidance_interval,
            cache_interval: args.recipe.cache_interval,
            width: 0,
            height: 0,
            peak_tflops: args.peak_tflops,
            denoise_only: args.denoise_only,
            gpu: match args.device {
                ComputeDevice::Cpu => None,
                // The log has said already what is missing.
                ComputeDevice::Cuda(index) => Gpu::describe(index).ok(),
            },
            torch: TORCH_VERSION,
            difference_from_reference: None,
            flops: None,
            runs: Vec::new(),
            configs: Configs::read(folder)?,
        })
    }

    /// Notes the pictures' size; what one of them takes.
    pub fn set_size(&mut self, parameters: &GenerationParameters) -> anyhow::Result<PictureFlops> {
        (self.width, self.height) = (parameters.width, parameters.height);
        let Configs { text, unet, vae, safety } = &self.configs;
        let cells = |pixels: u32| i64::from(pixels) / vae.vae_scale_factor();
        let (height, width) = (cells(parameters.height), cells(parameters.width));
        let flops = PictureFlops {
            text_encoder: text.forward_flops(),
            unet_forward: unet.forward_flops(height, width, text.max_position_embeddings),
            unet_cached: unet.outermost_flops(height, width, text.max_position_embeddings),
            vae_decode: if self.denoise_only { 0 } else { vae.decode_flops(height, width) },
            safety_checker: match safety {
                Some(safety) if !self.denoise_only => safety.forward_flops(),
                _ => 0,
            },
        };
        self.flops = Some(flops);
        Ok(flops)
    }

    /// For people: a line of settings, then one for each run.
    pub fn to_table(&self) -> String {
        let Self { model, device, width, height, num_inference_steps, scheduler, guidance_scale, .. } = self;
        let mut table = format!(
            "{model}, {device}, {width}x{height}, {num_inference_steps} {scheduler} steps, guidance {guidance_scale}\n"
        );
        if let Some(difference) = self.difference_from_reference {
            let _ = writeln!(
                table,
                "first latents differ from the reference by {difference:.1e} of their largest value"
            );
        }
        let mut row = |cells: [&str; 13]| {
            let [dtype, batch, graph, overlap, cells @ ..] = cells;
            let _ = write!(table, "{dtype:<5} {batch:>5} {graph:>5} {overlap:>7}");
            for cell in cells {
                let _ = write!(table, " {cell:>9}");
            }
            table.push('\n');
        };
        row([
            "dtype", "batch", "graph", "overlap", "s/call", "(min", "max)", "images/s", "TFLOP/s", "of peak",
            "denoise", "decode", "MiB",
        ]);
        let seconds = |seconds: f64| format!("{seconds:.3}");
        for run in &self.runs {
            let bytes = run.device_bytes.or(run.peak_resident_bytes);
            row([
                &run.dtype,
                &run.batch_size.to_string(),
                if run.graph { "on" } else { "off" },
                if run.overlap_decode { "on" } else { "off" },
                &seconds(run.seconds.median),
                &seconds(run.seconds.min),
                &seconds(run.seconds.max),
                &format!("{:.4}", run.images_per_second),
                &format!("{:.4}", run.tflops_per_second),
                &run.share_of_peak.map_or("-".to_owned(), |share| format!("{:.1} %", share * 100.0)),
                &seconds(run.stages.denoise.median),
                &seconds(run.stages.vae_decode.median),
                &bytes.map_or("-".to_owned(), |bytes| (bytes >> 20).to_string()),
            ]);
        }
        table.pop();
        table
    }
}

impl Run {
    /// `calls` is not empty.
    pub fn new(
        bench: &Bench<'_>,
        calls: &[Call],
        flops: PictureFlops,
        load_seconds: f64,
        peak_tflops: Option<f64>,
    ) -> Self {
        let seconds = Spread::of(calls, |call| call.seconds);
        let images_per_second = bench.batch_size() as f64 / seconds.median;
        let per_picture = flops.per_picture(calls[0].num_steps, bench.is_guided(), &bench.parameters.recipe);
        let tflops_per_second = images_per_second * per_picture / TERA;
        let stage = |value: fn(&Call) -> f64| Spread::of(calls, value);
        Self {
            dtype: bench.dtype().to_string(),
            kernels: bench.pipeline.kernels(),
            batch_size: bench.batch_size(),
            computed_at_once: bench.batching.batch_size(bench.batch_size()).unwrap_or(1),
            graph: bench.batching.graph,
            replayed_steps: calls[calls.len() - 1].replayed_steps,
            overlap_decode: bench.lane.is_some(),
            in_a_row: bench.in_a_row,
            load_seconds,
            calls: calls.len(),
            seconds,
            cpu_seconds: Spread::of(calls, |call| call.cpu_seconds),
            stages: StageSpreads {
                text_encoder: stage(|call| call.stages.text_encoder),
                denoise: stage(|call| call.stages.denoise),
                vae_decode: stage(|call| call.stages.vae_decode),
                to_host: stage(|call| call.stages.to_host),
                safety_checker: stage(|call| call.stages.safety_checker),
            },
            images_per_second,
            tflops_per_second,
            share_of_peak: peak_tflops.map(|peak| tflops_per_second / peak),
            peak_resident_bytes: memory::peak_resident_bytes(),
            device_bytes: match bench.device() {
                ComputeDevice::Cpu => None,
                ComputeDevice::Cuda(_) => device_memory_in_use(),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The arithmetic of the research notes: 51 calls for two samples, and 84.62 TFLOP in all.
    #[test]
    fn a_picture_of_v1_takes_84_62_tflop() {
        let flops = PictureFlops {
            text_encoder: 13_300_000_000,
            unet_forward: 803_273_441_000,
            unet_cached: 0,
            vae_decode: 2_514_500_000_000,
            safety_checker: 162_000_000_000,
        };
        assert_eq!(format!("{:.2}", flops.per_picture(51, true, &Recipe::default()) / TERA), "84.62");
        assert_eq!(format!("{:.2}", flops.per_picture(51, false, &Recipe::default()) / TERA), "43.66");
    }
}
