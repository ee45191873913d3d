//! The text chunk `parameters`, in the grammar that AUTOMATIC1111's web UI writes and most viewers read.
//!
//! ```text
//! <prompt, may have several lines>
//! Negative prompt: <negative prompt, may have several lines>      (only if there is one)
//! Steps: 50, Sampler: PLMS, CFG scale: 7.5, Seed: 42, Size: 512x512, Model hash: …, Model: …, RNG: CPU, Version: …
//! ```
//! Readers take the last line for parameters when it has three or more `Key: value` pairs, which ours always has, so
//! nothing in a prompt can pass for it. The one ambiguity is a prompt line that begins with `Negative prompt:`; it is
//! written `Negative prompt :`, which reads the same to people and not to parsers. Line ends and blanks at the ends of
//! lines are not kept by readers either. The exact prompts are in the `darkroom` chunk (`png.rs`).

use std::fmt::Write as _;

use schema::{NoiseScheduler, Sha256Digest, ValidJobSpec};

use crate::diffusion::Recipe;

/// What starts the negative prompt.
const NEGATIVE_PROMPT: &str = "Negative prompt:";
/// How many hexadecimal digits of a model's digest the web UI shows.
const MODEL_HASH_DIGITS: usize = 10;

/// What the text says.
#[derive(Debug, Clone, Copy)]
pub struct Parameters<'a> {
    /// The text followed.
    pub prompt: &'a str,
    /// The text avoided; may be empty.
    pub negative_prompt: &'a str,
    /// Denoising steps.
    pub num_inference_steps: u32,
    /// The noise scheduler.
    pub noise_scheduler: NoiseScheduler,
    /// Weight of classifier-free guidance.
    pub guidance_scale: f64,
    /// The seed of the noise.
    pub seed: u64,
    /// Pixels in a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// What people call the model.
    pub model: &'a str,
    /// Our digest over all of the model's component files, if it was taken. Not of one checkpoint file.
    pub weights_sha256: Option<&'a Sha256Digest>,
    /// What was left out of the denoising; a picture that is not the exact one says so.
    pub recipe: Recipe,
}

/// The `parameters` text of a job's picture.
pub fn infotext(spec: &ValidJobSpec, model_name: &str, weights_sha256: &Sha256Digest) -> String {
    let parameters = Parameters {
        prompt: spec.prompt(),
        negative_prompt: spec.negative_prompt(),
        num_inference_steps: spec.num_inference_steps(),
        noise_scheduler: spec.noise_scheduler(),
        // By way of the shortest text: 7.1 stays 7.1.
        guidance_scale: spec.guidance_scale().to_string().parse().unwrap_or_default(),
        seed: spec.seed().into(),
        width: spec.width(),
        height: spec.height(),
        model: model_name,
        weights_sha256: Some(weights_sha256),
        recipe: spec.recipe().into(),
    };
    parameters.to_infotext()
}

impl Parameters<'_> {
    /// The text.
    pub fn to_infotext(&self) -> String {
        let mut text = sanitized(self.prompt);
        let negative_prompt = sanitized(self.negative_prompt);
        if !negative_prompt.is_empty() {
            // Writing into a String cannot fail.
            let _ = write!(text, "\n{NEGATIVE_PROMPT} {negative_prompt}");
        }
        let (sampler, schedule_type) = sampler(self.noise_scheduler);
        let model_hash =
            self.weights_sha256.map(|sha256| sha256.to_string().chars().take(MODEL_HASH_DIGITS).collect());
        let Recipe { guidance_interval: (start, stop), cache_interval } = self.recipe;
        let of_recipe = |value: String| (self.recipe != Recipe::default()).then_some(value);
        let parameters = [
            ("Steps", Some(self.num_inference_steps.to_string())),
            ("Sampler", Some(sampler.to_owned())),
            ("Schedule type", schedule_type.map(str::to_owned)),
            ("CFG scale", Some(self.guidance_scale.to_string())),
            ("Seed", Some(self.seed.to_string())),
            ("Size", Some(format!("{}x{}", self.width, self.height))),
            ("Model hash", model_hash),
            ("Model", Some(self.model.to_owned())),
            // Readers take a missing RNG for the GPU's generator, which draws other noise from the same seed.
            ("RNG", Some("CPU".to_owned())),
            ("Version", Some(format!("darkroom {}", env!("CARGO_PKG_VERSION")))),
            ("Guidance interval", of_recipe(format!("{start}-{stop}"))),
            ("Cache interval", of_recipe(cache_interval.to_string())),
        ];
        let pairs =
            parameters.into_iter().filter_map(|(key, value)| Some(format!("{key}: {}", quoted(&value?))));
        text + "\n" + &pairs.collect::<Vec<_>>().join(", ")
    }
}

/// The names that readers know our noise schedulers by: sampler and schedule type.
fn sampler(noise_scheduler: NoiseScheduler) -> (&'static str, Option<&'static str>) {
    match noise_scheduler {
        NoiseScheduler::Pndm => ("PLMS", None),
        NoiseScheduler::Ddim => ("DDIM", None),
        NoiseScheduler::Euler => ("Euler", None),
        NoiseScheduler::EulerA => ("Euler a", None),
        NoiseScheduler::Dpmpp2m => ("DPM++ 2M", None),
        NoiseScheduler::Dpmpp2mKarras => ("DPM++ 2M", Some("Karras")),
        NoiseScheduler::Unipc => ("UniPC", None),
        NoiseScheduler::Lms => ("LMS", None),
    }
}

/// A value with a comma, a colon or a line end is written as JSON, as the web UI does.
fn quoted(value: &str) -> String {
    if value.contains([',', ':', '\n']) {
        serde_json::Value::from(value).to_string()
    } else {
        value.to_owned()
    }
}

/// The prompt, with no line that a reader would take for the start of the negative prompt, in the line ends and
/// without the outer blanks that readers drop.
fn sanitized(prompt: &str) -> String {
    let prompt = prompt.replace("\r\n", "\n").replace('\r', "\n");
    // Python's `strip`, which readers use, takes some control characters for blanks.
    let blank = |character: char| character.is_whitespace() || character.is_control();
    let lines = prompt.trim_matches(blank).split('\n').map(|line| {
        match line.trim_start_matches(blank).strip_prefix(NEGATIVE_PROMPT) {
            Some(rest) => format!("Negative prompt :{rest}"),
            None => line.to_owned(),
        }
    });
    lines.collect::<Vec<_>>().join("\n")
}
