//! `scheduler/scheduler_config.json` as it is: a table of keys, of which each scheduler reads those it knows.
//!
//! The schedulers' defaults differ from class to class, so they stand where the keys are read, as in diffusers'
//! constructors. A `null` counts as absent; keys that nobody reads (`_diffusers_version`, another class's) are kept
//! out of the way, as `from_config` does.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{PredictionType, SchedulerError, SchedulerKind};

/// The checkpoint's noise scheduler and its numbers.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(transparent)]
pub struct SchedulerConfig {
    values: Map<String, Value>,
}

impl SchedulerConfig {
    /// Reads the text of `scheduler_config.json`. Python writes infinity as a bare `-Infinity`, which is no JSON
    /// (`lambda_min_clipped` of every saved `DPMSolverMultistepScheduler`); it is read as `null`.
    pub fn from_json(text: &str) -> Result<Self, SchedulerError> {
        Ok(serde_json::from_str(&without_infinities(text))?)
    }

    /// The kind that the file's `_class_name` stands for (`PNDMScheduler`, `FlaxPNDMScheduler`, …), if it is one of
    /// ours.
    pub fn kind(&self) -> Option<SchedulerKind> {
        let class_name = self.values.get("_class_name")?.as_str()?;
        match class_name.strip_prefix("Flax").unwrap_or(class_name) {
            "PNDMScheduler" => Some(SchedulerKind::Pndm),
            "DDIMScheduler" => Some(SchedulerKind::Ddim),
            "EulerDiscreteScheduler" => Some(SchedulerKind::Euler),
            "EulerAncestralDiscreteScheduler" => Some(SchedulerKind::EulerA),
            "DPMSolverMultistepScheduler" if self.bool("use_karras_sigmas", false).ok()? => {
                Some(SchedulerKind::Dpmpp2mKarras)
            }
            "DPMSolverMultistepScheduler" => Some(SchedulerKind::Dpmpp2m),
            "UniPCMultistepScheduler" => Some(SchedulerKind::Unipc),
            "LMSDiscreteScheduler" => Some(SchedulerKind::Lms),
            _ => None,
        }
    }

    /// The same with one key set.
    pub(super) fn with(mut self, key: &'static str, value: impl Into<Value>) -> Self {
        self.values.insert(key.to_owned(), value.into());
        self
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key).filter(|value| !value.is_null())
    }

    fn read<'a, T>(
        &'a self,
        key: &'static str,
        default: T,
        rule: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<T, SchedulerError> {
        let Some(value) = self.get(key) else { return Ok(default) };
        read(value).ok_or_else(|| SchedulerError::Config {
            key,
            rule: rule.to_owned(),
            value: value.to_string(),
        })
    }

    pub(super) fn bool(&self, key: &'static str, default: bool) -> Result<bool, SchedulerError> {
        self.read(key, default, "true or false", Value::as_bool)
    }

    /// A number greater than 0 and less than 1.
    pub(super) fn fraction(&self, key: &'static str, default: f64) -> Result<f64, SchedulerError> {
        self.read(key, default, "between 0 and 1", |value| value.as_f64().filter(|x| *x > 0.0 && *x < 1.0))
    }

    /// A list of numbers greater than 0 and less than 1, or nothing.
    pub(super) fn fractions(&self, key: &'static str) -> Result<Option<Vec<f64>>, SchedulerError> {
        self.read(key, None, "a list of numbers between 0 and 1", |value| {
            let fractions = value.as_array()?.iter().map(|x| x.as_f64().filter(|x| *x > 0.0 && *x < 1.0));
            Some(Some(fractions.collect::<Option<Vec<f64>>>()?))
        })
    }

    /// The number of steps of the training noise schedule.
    pub(super) fn num_train_timesteps(&self) -> Result<usize, SchedulerError> {
        self.read("num_train_timesteps", 1000, "from 2 to 100000", |value| {
            value.as_u64().filter(|n| (2..=100_000).contains(n)).map(|n| n as usize)
        })
    }

    /// One of a few words.
    pub(super) fn choice<T: Copy>(
        &self,
        key: &'static str,
        default: T,
        choices: &[(&str, T)],
    ) -> Result<T, SchedulerError> {
        let words: Vec<&str> = choices.iter().map(|(word, _)| *word).collect();
        self.read(key, default, &words.join(" | "), |value| {
            let word = value.as_str()?;
            choices.iter().find(|(choice, _)| *choice == word).map(|(_, meaning)| *meaning)
        })
    }

    pub(super) fn prediction_type(&self) -> Result<PredictionType, SchedulerError> {
        use PredictionType::{Epsilon, VPrediction};
        let choices = [("epsilon", Epsilon), ("v_prediction", VPrediction)];
        self.choice("prediction_type", Epsilon, &choices)
    }

    /// Refuses the keys of options that no scheduler here has, unless they say what is done anyway.
    pub(super) fn refuse_unsupported(&self) -> Result<(), SchedulerError> {
        for key in [
            "thresholding",
            "rescale_betas_zero_snr",
            "use_exponential_sigmas",
            "use_beta_sigmas",
            "use_flow_sigmas",
            "use_lu_lambdas",
            "use_dynamic_shifting",
        ] {
            self.read(key, (), "false", |value| (value == &Value::Bool(false)).then_some(()))?;
        }
        for key in
            ["sigma_min", "sigma_max", "shift_terminal", "solver_p", "variance_type", "lambda_min_clipped"]
        {
            self.read(key, (), "null", |_| None)?;
        }
        self.choice("interpolation_type", (), &[("linear", ())])?;
        self.choice("timestep_type", (), &[("discrete", ())])?;
        self.choice("algorithm_type", (), &[("dpmsolver++", ()), ("deis", ())])?;
        self.read("solver_order", (), "2", |value| (value.as_u64() == Some(2)).then_some(()))?;
        self.read("predict_x0", (), "true", |value| (value == &Value::Bool(true)).then_some(()))?;
        self.read("disable_corrector", (), "[]", |value| value.as_array()?.is_empty().then_some(()))
    }
}

/// The text with the words that Python's `json` writes for what is not finite replaced, outside strings.
fn without_infinities(text: &str) -> String {
    let mut json = String::with_capacity(text.len());
    for (i, piece) in text.split('"').enumerate() {
        if i > 0 {
            json.push('"');
        }
        // Even pieces are outside strings; no key or word of a scheduler's JSON has an escaped quote in it.
        if i % 2 == 0 {
            json += &piece.replace("-Infinity", "null").replace("Infinity", "null").replace("NaN", "null");
        } else {
            json += piece;
        }
    }
    json
}
