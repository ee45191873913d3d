//! Ways to leave out work that change the picture: never used unless asked for.

use super::generation::InputFault;

/// What is left out of the denoising. The default leaves out nothing and gives diffusers' picture.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Recipe {
    /// The part of the steps that have classifier-free guidance, from and to, as fractions of all; the others predict
    /// with the prompt alone, which is half the work (Kynkaanniemi et al., 2024; `start` and `stop` of diffusers'
    /// guiders, counted in UNet calls).
    pub guidance_interval: (f64, f64),
    /// Every so many steps the whole UNet is run; between them only its outermost layer, on what the rest gave last
    /// (DeepCache, Ma et al., 2023, with its branch 0). 1 is always the whole.
    pub cache_interval: usize,
}

impl Default for Recipe {
    fn default() -> Self {
        Self { guidance_interval: (0.0, 1.0), cache_interval: 1 }
    }
}

impl Recipe {
    /// Whether the step has guidance, for pictures that have any.
    pub fn is_guided(&self, step_index: usize, num_steps: usize) -> bool {
        let (start, stop) = self.guidance_interval;
        // Towards zero, as Python's `int`.
        let step_at = |fraction: f64| (fraction * num_steps as f64) as usize;
        (step_at(start)..step_at(stop)).contains(&step_index)
    }

    /// Whether the step may use what the UNet's inner layers gave earlier: not if the number of samples differs from
    /// that step's.
    pub fn is_cached(&self, step_index: usize, num_steps: usize) -> bool {
        let whole = step_index - step_index % self.cache_interval;
        let guided = self.is_guided(step_index, num_steps);
        step_index != whole && (whole..step_index).all(|step| self.is_guided(step, num_steps) == guided)
    }

    /// Samples that the UNet sees for a picture: through all of it, and through its outermost layer only.
    pub fn num_samples(&self, num_steps: usize, has_guidance: bool) -> (usize, usize) {
        (0..num_steps).fold((0, 0), |(whole, cached), step| {
            let samples = if has_guidance && self.is_guided(step, num_steps) { 2 } else { 1 };
            if self.is_cached(step, num_steps) {
                (whole, cached + samples)
            } else {
                (whole + samples, cached)
            }
        })
    }

    /// What is wrong with it.
    pub(super) fn faults(&self) -> Vec<InputFault> {
        let (start, stop) = self.guidance_interval;
        let mut faults = Vec::new();
        if !(0.0 <= start && start <= stop && stop <= 1.0) {
            let rule = "two fractions from 0 to 1, the smaller one first".to_owned();
            faults.push(InputFault {
                parameter: "guidance_interval",
                rule,
                value: format!("{start},{stop}"),
            });
        }
        if self.cache_interval == 0 {
            let (rule, value) = ("at least 1".to_owned(), "0".to_owned());
            faults.push(InputFault { parameter: "cache_interval", rule, value });
        }
        faults
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_default_every_step_is_guided_and_whole() {
        let recipe = Recipe::default();
        assert!((0..51).all(|step| recipe.is_guided(step, 51) && !recipe.is_cached(step, 51)));
        assert_eq!(recipe.num_samples(51, true), (102, 0));
        assert_eq!(recipe.num_samples(51, false), (51, 0));
        assert!(recipe.faults().is_empty());
    }

    #[test]
    fn an_interval_of_guidance_counts_as_diffusers_does() {
        let recipe = Recipe { guidance_interval: (0.2, 0.7), ..Recipe::default() };
        let guided: Vec<usize> = (0..9).filter(|&step| recipe.is_guided(step, 9)).collect();
        assert_eq!(guided, [1, 2, 3, 4, 5]);
        assert_eq!(recipe.num_samples(9, true), (14, 0));
    }

    #[test]
    fn what_was_cached_for_another_number_of_samples_is_not_used() {
        let recipe = Recipe { cache_interval: 3, guidance_interval: (0.0, 0.5) };
        let cached: Vec<usize> = (0..9).filter(|&step| recipe.is_cached(step, 9)).collect();
        // Guidance ends after step 3; steps 4 and 5 would follow step 3, which had two samples.
        assert_eq!(cached, [1, 2, 7, 8]);
        assert_eq!(recipe.num_samples(9, true), (2 + 2 + 1 + 1 + 1, 2 + 2 + 1 + 1));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for interval in [(-0.1, 1.0), (0.0, 1.1), (0.7, 0.2), (f64::NAN, 1.0)] {
            let recipe = Recipe { guidance_interval: interval, cache_interval: 0 };
            assert_eq!(recipe.faults().len(), 2, "{interval:?}");
        }
    }
}
