//! What a job may leave out of the denoising for speed. It changes the picture, so it is never used unless asked for, and
//! it stands on the job's row, on the picture's row and in the picture's file.

use std::cmp::Ordering;
use std::hash::{Hash, Hasher};

use serde::{Deserialize, Serialize};

use crate::job_spec::fault::SpecFault;
use crate::job_spec::field::SpecField;
use crate::job_spec::limits::MAX_CACHE_INTERVAL;

/// The parts of the denoising that a job has; by default all of them, which is [`EXACT`](Self::EXACT).
///
/// The fractions are f64 all the way, from the prompt file to the denoising loop: with f32, 0.7 of ten steps would be 6.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, sqlx::FromRow)]
#[serde(default)]
pub struct Recipe {
    /// First step with guidance, as a fraction of all steps.
    pub guidance_start: f64,
    /// End of the steps with guidance, as a fraction of all steps.
    pub guidance_stop: f64,
    /// Every so many steps the whole UNet is run, and only its outermost layer between them; 1 is always the whole.
    #[sqlx(try_from = "i32")]
    pub cache_interval: u32,
}

impl Recipe {
    /// Everything is run: diffusers' picture.
    pub const EXACT: Self = Self { guidance_start: 0.0, guidance_stop: 1.0, cache_interval: 1 };

    /// Whether nothing is left out.
    pub fn is_exact(&self) -> bool {
        *self == Self::EXACT
    }

    /// This one, but for what is given.
    #[must_use]
    pub fn with(
        self,
        guidance_start: Option<f64>,
        guidance_stop: Option<f64>,
        cache_interval: Option<u32>,
    ) -> Self {
        Self {
            guidance_start: guidance_start.unwrap_or(self.guidance_start),
            guidance_stop: guidance_stop.unwrap_or(self.guidance_stop),
            cache_interval: cache_interval.unwrap_or(self.cache_interval),
        }
    }

    /// What is wrong with it, in the order of the fields.
    pub(crate) fn faults(&self) -> Vec<SpecFault> {
        let mut faults = Vec::new();
        let fractions =
            [(SpecField::GuidanceStart, self.guidance_start), (SpecField::GuidanceStop, self.guidance_stop)];
        for (field, fraction) in fractions {
            // Refuses NaN too, which no range contains.
            if !(0.0..=1.0).contains(&fraction) {
                faults.push(SpecFault::new(field, fraction));
            }
        }
        // Only for fractions that are allowed one by one.
        if faults.is_empty() && self.guidance_start > self.guidance_stop {
            let rule = format!("at least `{}` ({})", SpecField::GuidanceStart, self.guidance_start);
            faults.push(SpecFault { rule, ..SpecFault::new(SpecField::GuidanceStop, self.guidance_stop) });
        }
        if !(1..=MAX_CACHE_INTERVAL).contains(&self.cache_interval) {
            faults.push(SpecFault::new(SpecField::CacheInterval, self.cache_interval));
        }
        faults
    }

    /// The same with negative zero as zero, so that equal recipes have equal bits.
    pub(crate) fn normalized(self) -> Self {
        Self { guidance_start: self.guidance_start + 0.0, guidance_stop: self.guidance_stop + 0.0, ..self }
    }

    /// The bits of fractions that are not negative have the order of the fractions.
    fn key(&self) -> (u64, u64, u32) {
        (self.guidance_start.to_bits(), self.guidance_stop.to_bits(), self.cache_interval)
    }
}

impl Default for Recipe {
    fn default() -> Self {
        Self::EXACT
    }
}

impl PartialEq for Recipe {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Recipe {}

impl PartialOrd for Recipe {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Recipe {
    fn cmp(&self, other: &Self) -> Ordering {
        self.key().cmp(&other.key())
    }
}

impl Hash for Recipe {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.key().hash(state);
    }
}
