//! What a job asks for: as submitted ([`JobSpec`]), and after every rule was checked ([`ValidJobSpec`]).
//!
//! Only a valid spec can be stored, sent to a worker or drawn, so no later stage checks again. Validation reports
//! all faults of a spec at once. A seed that was left out is drawn here and stored with the job, so that every
//! picture can be drawn again.

pub(crate) mod fault;
pub(crate) mod field;
pub mod limits;
pub(crate) mod valid;

use fault::{SpecFault, SpecFaults};
use field::SpecField;
use serde::{Deserialize, Serialize};
use valid::{UncheckedSpec, ValidJobSpec};

use crate::recipe::Recipe;
use crate::state::NoiseScheduler;

/// One job as a person submits it; what is left out comes from [`SpecDefaults`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobSpec {
    /// The text to follow. A blank one is refused: in a file of prompts it is a slip, not a wish.
    pub prompt: String,
    /// The text to avoid.
    #[serde(default)]
    pub negative_prompt: Option<String>,
    /// The seed of the picture's noise; drawn at random if left out.
    #[serde(default)]
    pub seed: Option<u64>,
    /// Denoising steps.
    #[serde(default)]
    pub num_inference_steps: Option<u32>,
    /// Weight of classifier-free guidance; at 1 or below there is none.
    #[serde(default)]
    pub guidance_scale: Option<f32>,
    /// Width in pixels.
    #[serde(default)]
    pub width: Option<u32>,
    /// Height in pixels.
    #[serde(default)]
    pub height: Option<u32>,
    /// The noise scheduler.
    #[serde(default, rename = "scheduler")]
    pub noise_scheduler: Option<NoiseScheduler>,
    /// First step with guidance, as a fraction of all steps; see [`Recipe`].
    #[serde(default)]
    pub guidance_start: Option<f64>,
    /// End of the steps with guidance, as a fraction of all steps.
    #[serde(default)]
    pub guidance_stop: Option<f64>,
    /// Every so many steps the whole UNet is run.
    #[serde(default)]
    pub cache_interval: Option<u32>,
    /// The submitter's own name for the job; kept, never interpreted.
    #[serde(default)]
    pub client_ref: Option<String>,
}

/// What a job gets where its spec says nothing: the batch's settings over the model's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SpecDefaults {
    /// The text to avoid.
    pub negative_prompt: String,
    /// Denoising steps.
    pub num_inference_steps: u32,
    /// Weight of classifier-free guidance.
    pub guidance_scale: f32,
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// The noise scheduler.
    pub noise_scheduler: NoiseScheduler,
    /// What is left out of the denoising: of a model's defaults nothing, so it is always somebody's wish.
    #[serde(flatten)]
    pub recipe: Recipe,
}

impl SpecDefaults {
    /// The defaults of a model: its size and noise scheduler, and diffusers' 50 steps at guidance 7.5.
    pub fn of_model(width: u32, height: u32, noise_scheduler: NoiseScheduler) -> Self {
        Self {
            negative_prompt: String::new(),
            num_inference_steps: 50,
            guidance_scale: 7.5,
            width,
            height,
            noise_scheduler,
            recipe: Recipe::EXACT,
        }
    }

    /// Checks the defaults alone, so that a bad flag is told once and not for every line of a file.
    ///
    /// # Errors
    /// All the faults there are.
    pub fn validate(&self) -> Result<(), Vec<SpecFault>> {
        let probe = JobSpec { prompt: "-".to_owned(), seed: Some(0), ..JobSpec::default() };
        probe.validate(self).map(drop)
    }
}

impl JobSpec {
    /// Sets `field` from the text of a table's cell. A blank cell leaves the field out.
    ///
    /// # Errors
    /// When the text cannot be read as a value of this field. Whether the value is allowed is for
    /// [`validate`](Self::validate) to say.
    pub fn set(&mut self, field: SpecField, text: &str) -> Result<(), SpecFault> {
        if text.trim().is_empty() {
            return Ok(());
        }
        match field {
            SpecField::Prompt => self.prompt = text.to_owned(),
            SpecField::NegativePrompt => self.negative_prompt = Some(text.to_owned()),
            SpecField::ClientRef => self.client_ref = Some(text.to_owned()),
            SpecField::Seed => self.seed = Some(parse(field, text)?),
            SpecField::NumInferenceSteps => self.num_inference_steps = Some(parse(field, text)?),
            SpecField::GuidanceScale => self.guidance_scale = Some(parse(field, text)?),
            SpecField::Width => self.width = Some(parse(field, text)?),
            SpecField::Height => self.height = Some(parse(field, text)?),
            SpecField::NoiseScheduler => self.noise_scheduler = Some(parse(field, text)?),
            SpecField::GuidanceStart => self.guidance_start = Some(parse(field, text)?),
            SpecField::GuidanceStop => self.guidance_stop = Some(parse(field, text)?),
            SpecField::CacheInterval => self.cache_interval = Some(parse(field, text)?),
        }
        Ok(())
    }

    /// Sets `field` from a JSON value. `null` leaves the field out.
    ///
    /// # Errors
    /// When the value has the wrong JSON type or cannot be read as a value of this field.
    pub fn set_json(&mut self, field: SpecField, value: &serde_json::Value) -> Result<(), SpecFault> {
        use serde_json::Value;
        let is_text = matches!(
            field,
            SpecField::Prompt | SpecField::NegativePrompt | SpecField::NoiseScheduler | SpecField::ClientRef
        );
        match value {
            Value::Null => Ok(()),
            Value::String(text) if is_text => self.set(field, text),
            Value::Number(number) if !is_text => {
                self.set(field, &number.to_string()).map_err(|_| SpecFault::new(field, number))
            }
            other => Err(SpecFault::new(field, other)),
        }
    }

    /// Fills in `defaults` and checks every rule. A seed that was left out is drawn at random.
    ///
    /// # Errors
    /// All the faults there are, in the order of the fields.
    pub fn validate(&self, defaults: &SpecDefaults) -> Result<ValidJobSpec, Vec<SpecFault>> {
        let filled = UncheckedSpec {
            prompt: self.prompt.clone(),
            negative_prompt: self.negative_prompt.as_ref().unwrap_or(&defaults.negative_prompt).clone(),
            seed: self.seed.unwrap_or_else(|| u64::from(rand::random::<u32>())),
            num_inference_steps: self.num_inference_steps.unwrap_or(defaults.num_inference_steps),
            guidance_scale: self.guidance_scale.unwrap_or(defaults.guidance_scale),
            width: self.width.unwrap_or(defaults.width),
            height: self.height.unwrap_or(defaults.height),
            noise_scheduler: self.noise_scheduler.unwrap_or(defaults.noise_scheduler),
            recipe: defaults.recipe.with(self.guidance_start, self.guidance_stop, self.cache_interval),
            client_ref: self.client_ref.clone(),
        };
        match ValidJobSpec::try_from(filled) {
            Ok(valid) => Ok(valid.with_drawn_seed(self.seed.is_none())),
            Err(SpecFaults(faults)) => Err(faults),
        }
    }
}

fn parse<T: std::str::FromStr>(field: SpecField, text: &str) -> Result<T, SpecFault> {
    text.trim().parse().map_err(|_| SpecFault::quoting(field, text))
}

#[cfg(test)]
mod tests;
