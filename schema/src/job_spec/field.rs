//! The fields of a job spec by name, as column headers and JSON keys spell them.

use std::fmt;
use std::str::FromStr;

use super::limits::{
    MAX_CACHE_INTERVAL, MAX_CLIENT_REF_CHARS, MAX_GUIDANCE_SCALE, MAX_INFERENCE_STEPS, MAX_PROMPT_CHARS,
    MAX_SEED, MAX_SIDE, MIN_SIDE, SIDE_STEP,
};
use crate::words::UnknownWord;

/// A field of a [`JobSpec`](crate::JobSpec).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SpecField {
    /// The text to follow.
    Prompt,
    /// The text to avoid.
    NegativePrompt,
    /// The seed of the picture's noise.
    Seed,
    /// Denoising steps.
    NumInferenceSteps,
    /// Weight of classifier-free guidance.
    GuidanceScale,
    /// Width in pixels.
    Width,
    /// Height in pixels.
    Height,
    /// The noise scheduler; written `scheduler`.
    NoiseScheduler,
    /// First step with guidance, as a fraction of all steps.
    GuidanceStart,
    /// End of the steps with guidance, as a fraction of all steps.
    GuidanceStop,
    /// Every so many steps the whole UNet is run.
    CacheInterval,
    /// The submitter's own name for the job.
    ClientRef,
}

impl SpecField {
    /// Every field.
    pub const ALL: &'static [Self] = &[
        Self::Prompt,
        Self::NegativePrompt,
        Self::Seed,
        Self::NumInferenceSteps,
        Self::GuidanceScale,
        Self::Width,
        Self::Height,
        Self::NoiseScheduler,
        Self::GuidanceStart,
        Self::GuidanceStop,
        Self::CacheInterval,
        Self::ClientRef,
    ];

    /// The field's name in prompt files, on the command line and in messages to people.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Prompt => "prompt",
            Self::NegativePrompt => "negative_prompt",
            Self::Seed => "seed",
            Self::NumInferenceSteps => "num_inference_steps",
            Self::GuidanceScale => "guidance_scale",
            Self::Width => "width",
            Self::Height => "height",
            Self::NoiseScheduler => "scheduler",
            Self::GuidanceStart => "guidance_start",
            Self::GuidanceStop => "guidance_stop",
            Self::CacheInterval => "cache_interval",
            Self::ClientRef => "client_ref",
        }
    }

    /// What a value of this field has to be, as a person reads it after "has to be".
    pub(super) fn rule(self) -> String {
        match self {
            Self::Prompt => format!("text of 1 to {MAX_PROMPT_CHARS} characters, not all of them blank"),
            Self::NegativePrompt => format!("text of at most {MAX_PROMPT_CHARS} characters"),
            Self::Seed => format!("a whole number from 0 to {MAX_SEED} (the noise generator keeps 32 bits)"),
            Self::NumInferenceSteps => format!("a whole number from 1 to {MAX_INFERENCE_STEPS}"),
            Self::GuidanceScale => format!("a number from 0 to {MAX_GUIDANCE_SCALE}"),
            Self::Width | Self::Height => format!("a multiple of {SIDE_STEP}, from {MIN_SIDE} to {MAX_SIDE}"),
            Self::NoiseScheduler => {
                let words: Vec<_> = crate::NoiseScheduler::ALL.iter().map(|word| word.as_str()).collect();
                format!("one of {}", words.join(", "))
            }
            Self::GuidanceStart | Self::GuidanceStop => "a fraction of the steps, from 0 to 1".to_owned(),
            Self::CacheInterval => format!("a whole number of steps, from 1 to {MAX_CACHE_INTERVAL}"),
            Self::ClientRef => format!("text of at most {MAX_CLIENT_REF_CHARS} characters"),
        }
    }
}

impl fmt::Display for SpecField {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for SpecField {
    type Err = UnknownWord;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        Self::ALL.iter().copied().find(|field| field.as_str() == word).ok_or_else(|| UnknownWord {
            what: "field of a job",
            word: word.chars().take(80).collect(),
            known: Self::ALL.iter().map(|field| field.as_str()).collect::<Vec<_>>().join(", "),
        })
    }
}
