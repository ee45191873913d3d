//! A complete spec that keeps every rule, and the checking of those rules.

use serde::{Deserialize, Serialize};

use super::fault::{SpecFault, SpecFaults};
use super::field::SpecField;
use super::limits::{
    MAX_CLIENT_REF_CHARS, MAX_GUIDANCE_SCALE, MAX_INFERENCE_STEPS, MAX_PIXELS, MAX_PROMPT_CHARS, MAX_SEED,
    MAX_SIDE, MIN_SIDE, SIDE_STEP,
};
use crate::microbatch_key::MicrobatchKey;
use crate::recipe::Recipe;
use crate::state::NoiseScheduler;

/// A complete spec that nobody has checked: what JSON and the catalog's rows are read into.
#[derive(Deserialize)]
pub(crate) struct UncheckedSpec {
    pub prompt: String,
    pub negative_prompt: String,
    pub seed: u64,
    pub num_inference_steps: u32,
    pub guidance_scale: f32,
    pub width: u32,
    pub height: u32,
    pub noise_scheduler: NoiseScheduler,
    #[serde(flatten)]
    pub recipe: Recipe,
    pub client_ref: Option<String>,
}

/// A complete spec that keeps every rule.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(try_from = "UncheckedSpec")]
pub struct ValidJobSpec {
    prompt: String,
    negative_prompt: String,
    seed: u32,
    num_inference_steps: u32,
    guidance_scale: f32,
    width: u32,
    height: u32,
    noise_scheduler: NoiseScheduler,
    // An exact spec is written as it was before there were recipes: a batch's digest is taken over these bytes.
    #[serde(flatten, skip_serializing_if = "Recipe::is_exact")]
    recipe: Recipe,
    client_ref: Option<String>,
    #[serde(skip)]
    seed_was_drawn: bool,
}

/// Where a seed came from does not tell two specs apart: they draw the same picture.
impl PartialEq for ValidJobSpec {
    fn eq(&self, other: &Self) -> bool {
        let key = |spec: &Self| {
            (spec.seed, spec.num_inference_steps, spec.width, spec.height, spec.noise_scheduler)
        };
        key(self) == key(other)
            && self.guidance_scale == other.guidance_scale
            && self.recipe == other.recipe
            && self.prompt == other.prompt
            && self.negative_prompt == other.negative_prompt
            && self.client_ref == other.client_ref
    }
}

impl TryFrom<UncheckedSpec> for ValidJobSpec {
    type Error = SpecFaults;

    fn try_from(spec: UncheckedSpec) -> Result<Self, SpecFaults> {
        let mut faults = Vec::new();
        check_prompts(&spec, &mut faults);
        let seed = u32::try_from(spec.seed).unwrap_or_else(|_| {
            faults.push(SpecFault::new(SpecField::Seed, spec.seed));
            0
        });
        if !(1..=MAX_INFERENCE_STEPS).contains(&spec.num_inference_steps) {
            faults.push(SpecFault::new(SpecField::NumInferenceSteps, spec.num_inference_steps));
        }
        // Refuses NaN too, which no range contains.
        if !(0.0..=MAX_GUIDANCE_SCALE).contains(&spec.guidance_scale) {
            faults.push(SpecFault::new(SpecField::GuidanceScale, spec.guidance_scale));
        }
        check_size(&spec, &mut faults);
        faults.extend(spec.recipe.faults());
        if !faults.is_empty() {
            return Err(SpecFaults(faults));
        }
        let UncheckedSpec { prompt, negative_prompt, num_inference_steps, guidance_scale, .. } = spec;
        let UncheckedSpec { width, height, noise_scheduler, recipe, client_ref, .. } = spec;
        Ok(Self {
            prompt,
            negative_prompt,
            seed,
            num_inference_steps,
            // Negative zero is zero, so that equal specs have equal bytes.
            guidance_scale: guidance_scale + 0.0,
            width,
            height,
            noise_scheduler,
            recipe: recipe.normalized(),
            client_ref,
            seed_was_drawn: false,
        })
    }
}

fn check_prompts(spec: &UncheckedSpec, faults: &mut Vec<SpecFault>) {
    let texts = [
        (SpecField::Prompt, Some(&spec.prompt), MAX_PROMPT_CHARS),
        (SpecField::NegativePrompt, Some(&spec.negative_prompt), MAX_PROMPT_CHARS),
        (SpecField::ClientRef, spec.client_ref.as_ref(), MAX_CLIENT_REF_CHARS),
    ];
    for (field, text, max_chars) in texts {
        let Some(text) = text else { continue };
        let length = text.chars().count();
        if length > max_chars {
            faults.push(SpecFault::new(field, format_args!("{length} characters long")));
        }
        if field == SpecField::Prompt && text.trim().is_empty() {
            faults.push(SpecFault::new(field, "blank"));
        }
        if text.contains('\0') {
            // Postgres cannot store it.
            let rule = "free of NUL characters".to_owned();
            faults.push(SpecFault { rule, ..SpecFault::quoting(field, text) });
        }
    }
}

fn check_size(spec: &UncheckedSpec, faults: &mut Vec<SpecFault>) {
    let before = faults.len();
    for (field, side) in [(SpecField::Width, spec.width), (SpecField::Height, spec.height)] {
        if !(MIN_SIDE..=MAX_SIDE).contains(&side) || !side.is_multiple_of(SIDE_STEP) {
            faults.push(SpecFault::new(field, side));
        }
    }
    // Only for sides that are allowed one by one, whose product is small enough to name.
    if faults.len() == before && spec.width * spec.height > MAX_PIXELS {
        faults.push(SpecFault {
            field: "width × height",
            rule: format!("at most {MAX_PIXELS} pixels"),
            value: format!("{} × {} = {}", spec.width, spec.height, spec.width * spec.height),
        });
    }
}

impl ValidJobSpec {
    /// The text to follow.
    pub fn prompt(&self) -> &str {
        &self.prompt
    }

    /// The text to avoid; empty if there is none.
    pub fn negative_prompt(&self) -> &str {
        &self.negative_prompt
    }

    /// The seed of the picture's noise.
    pub fn seed(&self) -> u32 {
        self.seed
    }

    /// Denoising steps, 1 to 999.
    pub fn num_inference_steps(&self) -> u32 {
        self.num_inference_steps
    }

    /// Weight of classifier-free guidance, 0 to 50.
    pub fn guidance_scale(&self) -> f32 {
        self.guidance_scale
    }

    /// Width in pixels, a multiple of 8.
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Height in pixels, a multiple of 8.
    pub fn height(&self) -> u32 {
        self.height
    }

    /// The noise scheduler.
    pub fn noise_scheduler(&self) -> NoiseScheduler {
        self.noise_scheduler
    }

    /// What is left out of the denoising; mostly nothing.
    pub fn recipe(&self) -> Recipe {
        self.recipe
    }

    /// The submitter's own name for the job.
    pub fn client_ref(&self) -> Option<&str> {
        self.client_ref.as_deref()
    }

    /// Whether the submitter left the seed out. Not stored: a job read from the catalog says no.
    pub fn seed_was_drawn(&self) -> bool {
        self.seed_was_drawn
    }

    /// The same spec, noting whether its seed was drawn.
    pub(super) fn with_drawn_seed(self, seed_was_drawn: bool) -> Self {
        Self { seed_was_drawn, ..self }
    }

    /// The same spec with seed 0 in place of a drawn one, for telling whether two submissions are the same.
    pub(crate) fn without_drawn_seed(&self) -> Self {
        let seed = if self.seed_was_drawn { 0 } else { self.seed };
        Self { seed, ..self.clone() }
    }

    /// Whether each step predicts with and without the prompt, as diffusers decides it.
    pub fn classifier_free_guidance(&self) -> bool {
        self.guidance_scale > 1.0
    }

    /// What this job has to have in common with others to share their forward pass.
    pub fn microbatch_key(&self) -> MicrobatchKey {
        MicrobatchKey {
            width: self.width,
            height: self.height,
            num_inference_steps: self.num_inference_steps,
            noise_scheduler: self.noise_scheduler,
            classifier_free_guidance: self.classifier_free_guidance(),
            recipe: self.recipe,
        }
    }
}

const _: () = assert!(MAX_SEED == u32::MAX as u64, "a valid seed is a u32");
