//! From the lines of a prompt file to the jobs of a batch: defaults filled in, every rule checked, every fault kept.
use schema::limits::MAX_SEED;
use schema::{JobSpec, NewJob, NoiseScheduler, SpecDefaults, SpecFault};

use crate::prompt_file::{InputFault, PromptLine, Trouble};

/// What the command line says for prompts that say nothing themselves.
#[derive(Clone, Debug, Default, PartialEq, clap::Args)]
pub struct BatchDefaults {
    /// Text to avoid, for prompts without one of their own.
    #[arg(long, value_name = "TEXT")]
    pub negative_prompt: Option<String>,
    /// Seed for prompts without one of their own. Without it each such picture draws a random seed, which is stored.
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Denoising steps, 1 to 999: more cost time in proportion and gain little beyond 50. [default: 50]
    #[arg(long, value_name = "N")]
    pub num_inference_steps: Option<u32>,
    /// How closely to follow the prompt, 0 to 50; 1 and below turns guidance off and halves the time. [default: 7.5]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub guidance_scale: Option<f32>,
    /// Width in pixels, a multiple of 8. [default: the model's]
    #[arg(long, value_name = "PIXELS")]
    pub width: Option<u32>,
    /// Height in pixels, a multiple of 8. [default: the model's]
    #[arg(long, value_name = "PIXELS")]
    pub height: Option<u32>,
    /// Noise scheduler: pndm, ddim, euler, euler_a, dpmpp_2m, dpmpp_2m_karras, unipc or lms. [default: the model's]
    #[arg(long, value_name = "NAME")]
    pub scheduler: Option<NoiseScheduler>,
    /// First step with guidance, as a fraction of all steps. Steps without it take half the time and change the picture. [default: 0]
    #[arg(long, value_name = "FRACTION", allow_negative_numbers = true)]
    pub guidance_start: Option<f64>,
    /// End of the steps with guidance, as a fraction of all steps: the last steps need it least. Changes the picture. [default: 1]
    #[arg(long, value_name = "FRACTION", allow_negative_numbers = true)]
    pub guidance_stop: Option<f64>,
    /// Run the whole UNet every so many steps, and only its outermost layer between them (DeepCache): 2 to 5 are usual, more is
    /// faster and further from the exact picture. [default: 1, always the whole]
    #[arg(long, value_name = "STEPS")]
    pub cache_interval: Option<u32>,
}

impl BatchDefaults {
    /// These over the model's.
    pub fn over(&self, model: SpecDefaults) -> SpecDefaults {
        SpecDefaults {
            negative_prompt: self.negative_prompt.clone().unwrap_or(model.negative_prompt),
            num_inference_steps: self.num_inference_steps.unwrap_or(model.num_inference_steps),
            guidance_scale: self.guidance_scale.unwrap_or(model.guidance_scale),
            width: self.width.unwrap_or(model.width),
            height: self.height.unwrap_or(model.height),
            noise_scheduler: self.scheduler.unwrap_or(model.noise_scheduler),
            recipe: model.recipe.with(self.guidance_start, self.guidance_stop, self.cache_interval),
        }
    }
}

/// The jobs that `lines` ask for: `num_images_per_prompt` each, with the line's seed (else `seed`) and those that
/// follow it, or a random one each if neither is given.
///
/// # Errors
/// Every fault of every line.
pub fn jobs(
    lines: &[PromptLine],
    defaults: &SpecDefaults,
    seed: Option<u64>,
    num_images_per_prompt: u32,
) -> Result<Vec<NewJob>, Vec<InputFault>> {
    let mut jobs = Vec::with_capacity(lines.len());
    let mut faults = Vec::new();
    for PromptLine { line, spec } in lines {
        let first_seed = spec.seed.or(seed);
        for index in 0..num_images_per_prompt {
            let seed = match first_seed {
                // A first seed beyond the limit is told by its own rule.
                Some(first) if index > 0 && first <= MAX_SEED && first + u64::from(index) > MAX_SEED => {
                    faults.push(InputFault {
                        line: *line,
                        trouble: seeds_run_out(first, num_images_per_prompt),
                    });
                    break;
                }
                Some(first) => Some(first.saturating_add(u64::from(index))),
                None => None,
            };
            match (JobSpec { seed, ..spec.clone() }).validate(defaults) {
                Ok(spec) => jobs.push(NewJob { spec, source_line: Some(*line) }),
                Err(found) => {
                    let found =
                        found.into_iter().map(|fault| InputFault { line: *line, trouble: fault.into() });
                    faults.extend(found);
                    // The further pictures of this prompt would only repeat it.
                    break;
                }
            }
        }
    }
    if faults.is_empty() { Ok(jobs) } else { Err(faults) }
}

fn seeds_run_out(first: u64, count: u32) -> Trouble {
    Trouble::Value(SpecFault {
        field: "seed",
        rule: format!("at most {} for {count} pictures a prompt", MAX_SEED - u64::from(count) + 1),
        value: first.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use schema::Recipe;

    use super::*;
    use crate::prompt_file::PromptFormat;

    fn defaults() -> SpecDefaults {
        SpecDefaults::of_model(512, 512, NoiseScheduler::Pndm)
    }

    fn lines(csv: &str) -> Vec<PromptLine> {
        let file = PromptFormat::Csv.read(csv.as_bytes());
        assert_eq!(file.faults, []);
        file.lines
    }

    #[test]
    fn pictures_of_a_prompt_take_seeds_in_a_row() {
        let jobs = jobs(&lines("prompt,seed\na,7\nb,\n"), &defaults(), Some(100), 3).unwrap();
        let seeds: Vec<_> = jobs.iter().map(|job| (job.source_line, job.spec.seed())).collect();
        let (a, b) = (Some(2), Some(3));
        assert_eq!(seeds, [(a, 7), (a, 8), (a, 9), (b, 100), (b, 101), (b, 102)]);
    }

    #[test]
    fn without_a_seed_each_picture_draws_its_own() {
        let jobs = jobs(&lines("prompt\na\n"), &defaults(), None, 20).unwrap();
        assert!(jobs.iter().all(|job| job.spec.seed_was_drawn()));
        let distinct: std::collections::BTreeSet<_> = jobs.iter().map(|job| job.spec.seed()).collect();
        assert!(distinct.len() > 1);
    }

    #[test]
    fn flags_win_over_the_model_and_lines_over_flags() {
        let flags = BatchDefaults {
            width: Some(256),
            num_inference_steps: Some(9),
            scheduler: Some(NoiseScheduler::Ddim),
            ..BatchDefaults::default()
        };
        let jobs = jobs(&lines("prompt,steps\na,5\nb,\n"), &flags.over(defaults()), None, 1).unwrap();
        let told: Vec<_> = jobs
            .iter()
            .map(|job| {
                (
                    job.spec.num_inference_steps(),
                    job.spec.width(),
                    job.spec.height(),
                    job.spec.noise_scheduler(),
                )
            })
            .collect();
        assert_eq!(told, [(5, 256, 512, NoiseScheduler::Ddim), (9, 256, 512, NoiseScheduler::Ddim)]);
    }

    #[test]
    fn a_recipe_is_the_lines_then_the_batchs_and_else_none() {
        let text = "prompt,guidance_start,guidance_stop,cache_interval\na,,,\nb,0.1,,1\nc,0.9,,\n";
        assert!(jobs(&lines("prompt\na\n"), &defaults(), None, 1).unwrap()[0].spec.recipe().is_exact());
        let flags =
            BatchDefaults { guidance_stop: Some(0.7), cache_interval: Some(3), ..BatchDefaults::default() };
        let faults = jobs(&lines(text), &flags.over(defaults()), None, 1).unwrap_err();
        let faults: Vec<_> = faults.iter().map(ToString::to_string).collect();
        // A line's start and its batch's stop are one interval.
        assert_eq!(faults, ["4: `guidance_stop` has to be at least `guidance_start` (0.9), but is 0.7"]);
        let good = lines(text.trim_end_matches("c,0.9,,\n"));
        let recipes =
            jobs(&good, &flags.over(defaults()), None, 1).unwrap().into_iter().map(|job| job.spec.recipe());
        let recipe = Recipe { guidance_start: 0.0, guidance_stop: 0.7, cache_interval: 3 };
        let own = Recipe { guidance_start: 0.1, cache_interval: 1, ..recipe };
        assert_eq!(recipes.collect::<Vec<_>>(), [recipe, own]);
    }

    #[test]
    fn all_faults_of_all_lines_are_kept_and_each_once() {
        let lines = lines("prompt,width,steps,seed\na,500,0,\nb,,,4294967295\nc,,,4294967296\nd,64,,\n");
        let faults = jobs(&lines, &defaults(), None, 4).unwrap_err();
        let faults: Vec<_> = faults.iter().map(ToString::to_string).collect();
        insta::assert_snapshot!(faults.join("\n"), @"
        2: `num_inference_steps` has to be a whole number from 1 to 999, but is 0
        2: `width` has to be a multiple of 8, from 64 to 2048, but is 500
        3: `seed` has to be at most 4294967292 for 4 pictures a prompt, but is 4294967295
        4: `seed` has to be a whole number from 0 to 4294967295 (the noise generator keeps 32 bits), but is 4294967296
        ");
    }
}
