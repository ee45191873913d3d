//! `darkroom-worker generate`: one picture from a prompt, without a fleet.
//!
//! The picture is the one that the fleet makes from the same values. Standard output carries the result alone, as a
//! sentence or, with `--json`, as one line of JSON; progress and warnings go to standard error.

use std::io::Write as _;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::anyhow;
use indicatif::{ProgressBar, ProgressStyle};
use schema::NoiseScheduler;
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use crate::batching_args::BatchingArgs;
use crate::diffusion::config::ConfigFile;
use crate::diffusion::device::set_threads_per_picture;
use crate::diffusion::models::autoencoder_kl::AutoencoderKLConfig;
use crate::diffusion::pipeline_stable_diffusion::{InputFault, size_faults};
use crate::diffusion::{
    ComputeDevice, ComputeDtype, GeneratedImage, GenerationParameters, ImageError, ImageRequest,
    PipelineError, Recipe, SchedulerKind, StableDiffusionPipeline, StageSeconds, StepControl,
};
use crate::infotext::Parameters;
use crate::kernel_args::KernelArgs;
use crate::output::{parent, print_line, write_atomically};

/// Seeds from here on repeat: PyTorch's CPU generator takes the low 32 bits.
const SEED_PERIOD: u64 = 1 << 32;

/// Makes one picture from a prompt, without a fleet.
#[derive(Debug, clap::Args)]
pub struct GenerateArgs {
    /// The checkpoint's folder, in diffusers' layout (with `model_index.json`).
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Text to follow.
    #[arg(long)]
    pub prompt: String,
    /// Text to avoid. Needs guidance.
    #[arg(long, default_value = "", hide_default_value = true)]
    pub negative_prompt: String,
    /// Seed of the noise. The same seed gives the same picture, as in diffusers with a generator on the CPU.
    #[arg(long)]
    pub seed: u64,
    /// Denoising steps. More is slower and, up to a point, better.
    #[arg(long, default_value_t = 50)]
    pub num_inference_steps: usize,
    /// How strongly to follow the prompt; 1 and below is without guidance, and twice as fast.
    #[arg(long, default_value_t = 7.5, allow_negative_numbers = true)]
    pub guidance_scale: f64,
    /// Pixels in a row, a multiple of 8 [default: the size the checkpoint was made for].
    #[arg(long, value_name = "PIXELS")]
    pub width: Option<u32>,
    /// Rows of pixels, a multiple of 8 [default: the size the checkpoint was made for].
    #[arg(long, value_name = "PIXELS")]
    pub height: Option<u32>,
    /// Noise scheduler: pndm, ddim, euler, euler_a, dpmpp_2m, dpmpp_2m_karras, unipc or lms [default: the checkpoint's].
    #[arg(long, value_name = "NAME")]
    pub scheduler: Option<String>,
    /// Where to compute: cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    pub device: String,
    /// Precision to compute in: f32, f16 or bf16. Half the memory and, on a GPU, more than twice the speed in 16 bits.
    #[arg(long, default_value = "f32")]
    pub dtype: String,
    /// What a GPU computes with.
    #[command(flatten)]
    pub kernels: KernelArgs,
    /// Threads of the CPU to use. More are faster on an idle machine, and change the picture's last bits.
    #[arg(long, value_name = "COUNT", default_value_t = NonZeroUsize::MIN)]
    pub cpu_threads: NonZeroUsize,
    /// What to leave out for speed.
    #[command(flatten)]
    pub recipe: RecipeArgs,
    /// How it is computed.
    #[command(flatten)]
    pub batching: BatchingArgs,
    /// Where to write the picture, as PNG. A flagged picture is written black.
    #[arg(long, value_name = "FILE.png")]
    pub output: PathBuf,
    /// Print the result as one line of JSON.
    #[arg(long)]
    pub json: bool,
}

/// Ways to leave out work that change the picture; by default none is used.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct RecipeArgs {
    /// First step with guidance, as a fraction of all steps. Steps without it are twice as fast, and change the picture.
    #[arg(long, default_value_t = 0.0, value_name = "FRACTION")]
    pub guidance_start: f64,
    /// End of the steps with guidance, as a fraction of all steps.
    #[arg(long, default_value_t = 1.0, value_name = "FRACTION")]
    pub guidance_stop: f64,
    /// Run the whole UNet every so many steps, and only its outermost layer between them (DeepCache). 2 to 5 are usual;
    /// it changes the picture.
    #[arg(long, default_value_t = 1, value_name = "STEPS")]
    pub cache_interval: usize,
}

impl RecipeArgs {
    /// In the model code's words.
    pub fn to_recipe(self) -> Recipe {
        Recipe {
            guidance_interval: (self.guidance_start, self.guidance_stop),
            cache_interval: self.cache_interval,
        }
    }
}

/// Arguments that break rules, all of them. The process should end with exit status 2.
#[derive(Debug, thiserror::Error)]
#[error("{}", faults.join("\n"))]
pub struct BadInput {
    /// One line each; never empty.
    pub faults: Vec<String>,
}

/// The arguments after their checks; the noise scheduler and size may still be the checkpoint's.
struct ValidArgs {
    device: ComputeDevice,
    dtype: ComputeDtype,
    scheduler: Option<SchedulerKind>,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report<'a> {
    seed: u64,
    /// `null` if the checkpoint has no safety checker.
    has_nsfw_concept: Option<bool>,
    /// `round(cosine − threshold + adjustment, 3)` as diffusers compares it with zero; empty without a checker.
    concept_scores: &'a [f32],
    special_care_scores: &'a [f32],
    raw_concept_scores: &'a [f32],
    raw_special_care_scores: &'a [f32],
    /// Of the PNG file's bytes.
    sha256: String,
    width: u32,
    height: u32,
    num_inference_steps: usize,
    guidance_scale: f64,
    scheduler: String,
    /// Steps with guidance, as fractions of all.
    guidance_interval: (f64, f64),
    cache_interval: usize,
    device: String,
    dtype: String,
    /// `plain`, or `fused` or `attention` and what our own kernels were compiled for.
    kernels: String,
    /// How the first noise was drawn.
    noise: String,
    /// What of the prompt the text encoder could not take.
    truncated_prompt: Option<&'a str>,
    truncated_negative_prompt: Option<&'a str>,
    output: &'a Path,
    seconds: Seconds,
}

/// Where the time went.
#[derive(Debug, Serialize)]
struct Seconds {
    load: f64,
    #[serde(flatten)]
    stages: StageSeconds,
    encode_png: f64,
    total: f64,
}

/// Runs the command. A [`BadInput`] in the error is the caller's mistake, anything else is not.
///
/// Must come before any other use of libtorch in the process (see `diffusion::device`).
pub fn run(args: &GenerateArgs) -> anyhow::Result<()> {
    let start = Instant::now();
    let valid = check(args)?;
    if valid.device == ComputeDevice::Cpu {
        set_threads_per_picture(args.cpu_threads);
    }
    valid.device.open()?;
    let options = args.kernels.load_options(valid.device, valid.dtype)?;
    let pipeline = StableDiffusionPipeline::from_pretrained(&args.model, &options)?;
    pipeline.set_batching(args.batching.to_batching(valid.device));
    let load = start.elapsed().as_secs_f64();

    let parameters = parameters(args, &valid, &pipeline)?;
    let request = ImageRequest {
        prompt: args.prompt.clone(),
        negative_prompt: args.negative_prompt.clone(),
        seed: args.seed,
        guidance_scale: args.guidance_scale,
    };
    if args.seed >= SEED_PERIOD {
        warn(&format!("only the low 32 bits of a seed count: this is seed {}", args.seed % SEED_PERIOD));
    }
    let (image, stages) = draw(&pipeline, &request, &parameters)?;
    for (what, truncated) in
        [("prompt", &image.truncated_prompt), ("negative prompt", &image.truncated_negative_prompt)]
    {
        if let Some(truncated) = truncated {
            warn(&format!(
                "the {what} is too long for the text encoder, this part was not seen: {truncated}"
            ));
        }
    }
    let safety = image.safety.as_ref();
    if safety.is_some_and(|verdict| verdict.has_nsfw_concept) {
        warn("the safety checker found an unwanted concept: the picture is written black");
    }

    let encode_start = Instant::now();
    let png = encode(&image, &infotext(args, &request, &parameters))?;
    let sha256 = hex::encode(Sha256::digest(&png));
    write_atomically(&args.output, &png)?;
    let encode_png = encode_start.elapsed().as_secs_f64();

    let report = Report {
        seed: image.seed,
        has_nsfw_concept: safety.map(|verdict| verdict.has_nsfw_concept),
        concept_scores: safety.map_or(&[], |verdict| &verdict.concept_scores),
        special_care_scores: safety.map_or(&[], |verdict| &verdict.special_care_scores),
        raw_concept_scores: safety.map_or(&[], |verdict| &verdict.raw_concept_scores),
        raw_special_care_scores: safety.map_or(&[], |verdict| &verdict.raw_special_care_scores),
        sha256,
        width: image.width,
        height: image.height,
        num_inference_steps: parameters.num_inference_steps,
        guidance_scale: request.guidance_scale,
        scheduler: parameters.scheduler.to_string(),
        guidance_interval: parameters.recipe.guidance_interval,
        cache_interval: parameters.recipe.cache_interval,
        device: valid.device.to_string(),
        dtype: valid.dtype.to_string(),
        kernels: pipeline.kernels(),
        noise: image.noise.to_string(),
        truncated_prompt: image.truncated_prompt.as_deref(),
        truncated_negative_prompt: image.truncated_negative_prompt.as_deref(),
        output: &args.output,
        seconds: Seconds { load, stages, encode_png, total: start.elapsed().as_secs_f64() },
    };
    print(&report, args.json)
}

/// Checks all that can be checked before the weights are read.
fn check(args: &GenerateArgs) -> Result<ValidArgs, BadInput> {
    let mut faults = Vec::new();
    let device = args.device.parse().map_err(|error| faults.push(format!("{error}"))).ok();
    let dtype = args.dtype.parse().map_err(|error| faults.push(format!("{error}"))).ok();
    let scheduler = args.scheduler.as_deref().map(str::parse::<SchedulerKind>).transpose();
    let scheduler = scheduler.map_err(|error| faults.push(error.to_string())).ok();
    let mut refuse = |parameter, rule: &str, value: String| {
        faults.push(InputFault { parameter, rule: rule.to_owned(), value }.to_string());
    };
    if args.num_inference_steps == 0 {
        refuse("num_inference_steps", "at least 1", "0".to_owned());
    }
    if !args.guidance_scale.is_finite() {
        refuse("guidance_scale", "a finite number", args.guidance_scale.to_string());
    }
    if args.output.file_name().is_none() || args.output.is_dir() {
        refuse("output", "a file's path", args.output.display().to_string());
    } else if !parent(&args.output).is_dir() {
        refuse("output", "a path in a folder that exists", args.output.display().to_string());
    }
    // A checkpoint whose VAE config cannot be read has more faults than this one; loading it tells them all.
    let vae_config = ConfigFile::read(&args.model, "vae/config.json").ok().map(AutoencoderKLConfig::read);
    if let Some(Ok(vae_config)) = vae_config {
        let scale = u32::try_from(vae_config.vae_scale_factor()).unwrap_or(u32::MAX);
        let (width, height) = (args.width.unwrap_or(scale), args.height.unwrap_or(scale));
        faults.extend(size_faults(width, height, scale).iter().map(InputFault::to_string));
    }
    match (device, dtype, scheduler) {
        (Some(device), Some(dtype), Some(scheduler)) if faults.is_empty() => {
            Ok(ValidArgs { device, dtype, scheduler })
        }
        _ => Err(BadInput { faults }),
    }
}

/// The arguments, completed from the checkpoint.
fn parameters(
    args: &GenerateArgs,
    valid: &ValidArgs,
    pipeline: &StableDiffusionPipeline,
) -> anyhow::Result<GenerationParameters> {
    let scheduler = valid.scheduler.or(pipeline.default_scheduler()).ok_or_else(|| {
        let choices = SchedulerKind::ALL.map(SchedulerKind::as_str).join(", ");
        let fault = format!(
            "the checkpoint's noise scheduler is not supported\nhint: choose `--scheduler` from {choices}"
        );
        BadInput { faults: vec![fault] }
    })?;
    let (width, height) = pipeline.default_size();
    Ok(GenerationParameters {
        width: args.width.unwrap_or(width),
        height: args.height.unwrap_or(height),
        num_inference_steps: args.num_inference_steps,
        scheduler,
        noise: None,
        recipe: args.recipe.to_recipe(),
    })
}

/// Draws the picture, with a progress bar where standard error is a terminal.
fn draw(
    pipeline: &StableDiffusionPipeline,
    request: &ImageRequest,
    parameters: &GenerationParameters,
) -> anyhow::Result<(GeneratedImage, StageSeconds)> {
    let bar = ProgressBar::no_length().with_style(
        ProgressStyle::with_template("denoising {bar:40} step {pos}/{len}, {per_sec}, ETA {eta}")
            .expect("the template is constant and valid"),
    );
    let generation = pipeline.generate(std::slice::from_ref(request), parameters, &mut |progress| {
        bar.set_length(progress.num_steps as u64);
        bar.set_position(progress.step_index as u64 + 1);
        StepControl::Continue
    });
    bar.finish_and_clear();
    let mut generation = generation.map_err(|error| match error {
        PipelineError::Inputs { faults } => {
            anyhow::Error::new(BadInput { faults: faults.iter().map(InputFault::to_string).collect() })
        }
        error => anyhow::Error::new(error).context("the picture could not be made"),
    })?;
    let image = generation.images.pop().ok_or_else(|| anyhow!("the pipeline made no picture"))?;
    let image = image.map_err(|error| match error {
        ImageError::NonFinite { .. } => {
            anyhow!(
                "the picture could not be made: {error}\nhint: half precision can overflow; try `--dtype f32`"
            )
        }
        ImageError::Dropped { .. } => anyhow::Error::new(error),
    })?;
    Ok((image, generation.seconds))
}

/// The text chunk that most viewers read. The fleet's own record names a job, and here is none.
fn infotext(args: &GenerateArgs, request: &ImageRequest, parameters: &GenerationParameters) -> String {
    let folder = args.model.canonicalize().unwrap_or_else(|_| args.model.clone());
    let model = folder.file_name().unwrap_or_default().to_string_lossy();
    let parameters = Parameters {
        prompt: &request.prompt,
        negative_prompt: &request.negative_prompt,
        num_inference_steps: u32::try_from(parameters.num_inference_steps).unwrap_or(u32::MAX),
        // The two vocabularies agree, which a test holds.
        noise_scheduler: parameters.scheduler.as_str().parse().unwrap_or(NoiseScheduler::Pndm),
        guidance_scale: request.guidance_scale,
        seed: request.seed,
        width: parameters.width,
        height: parameters.height,
        model: &model,
        weights_sha256: None,
        recipe: parameters.recipe,
    };
    parameters.to_infotext()
}

/// The picture as a PNG file's bytes.
fn encode(image: &GeneratedImage, infotext: &str) -> anyhow::Result<Vec<u8>> {
    let image = crate::pipeline::GeneratedImage {
        width: image.width,
        height: image.height,
        rgb: image.pixels.clone(),
        has_nsfw_concept: image.safety.as_ref().map(|verdict| verdict.has_nsfw_concept),
        concept_scores: Vec::new(),
        special_care_scores: Vec::new(),
        prompt_truncated: image.truncated_prompt.is_some(),
        dtype: String::new(),
        recipe: schema::Recipe::default(),
        engine: None,
    };
    Ok(crate::png::encode(&image, &[(crate::png::PARAMETERS, infotext)])?)
}

/// Says something to the person, beside the result.
fn warn(message: &str) {
    // Nobody is left to tell if standard error is closed.
    let _ = writeln!(std::io::stderr(), "warning: {message}");
}

/// Prints the result.
fn print(report: &Report<'_>, json: bool) -> anyhow::Result<()> {
    let line = if json {
        serde_json::to_string(report)?
    } else {
        let Report { width, height, seed, .. } = report;
        let seconds = report.seconds.total;
        format!("{}: {width}x{height}, seed {seed}, {seconds:.1} s", report.output.display())
    };
    print_line(&line)
}
