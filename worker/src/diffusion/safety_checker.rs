//! Compares a picture with embeddings of unwanted concepts (diffusers'
//! `pipelines/stable_diffusion/safety_checker.py`).
//!
//! Two departures from diffusers, neither of which changes a verdict on numbers: the scores are handed out instead of
//! thrown away, and a NaN or infinity is an error, where diffusers would call such a picture safe.

use tch::{Kind, TchError, Tensor};

use super::config::ConfigFile;
use super::load_error::Fault;
use super::models::clip_vision_model::{CLIPVisionConfig, CLIPVisionModel};
use super::nn::Linear;
use super::weights::Weights;

/// Unwanted concepts (the shape of `concept_embeds` in diffusers' class).
const NUM_CONCEPTS: i64 = 17;
/// Concepts that make the check stricter (the shape of `special_care_embeds` in diffusers' class).
const NUM_SPECIAL_CARE_CONCEPTS: i64 = 3;
/// How much stricter (`adjustment` in diffusers' `forward`).
const SPECIAL_CARE_ADJUSTMENT: f32 = 0.01;
/// Smallest length that a vector is divided by (`eps` of `torch.nn.functional.normalize`).
const NORMALIZE_EPS: f64 = 1e-12;
/// Scores are rounded to three decimals before they are compared with zero.
const ROUNDING: f32 = 1000.0;

/// `safety_checker/config.json`.
#[derive(Debug, Clone, Copy)]
pub struct SafetyCheckerConfig {
    /// The vision model.
    pub vision: CLIPVisionConfig,
    /// Channels of the space in which picture and concepts are compared.
    pub projection_dim: i64,
}

impl SafetyCheckerConfig {
    /// Reads the file. Defaults are those of transformers' `CLIPConfig`.
    pub fn read(config: ConfigFile) -> Result<Self, Vec<Fault>> {
        // Early revisions have a `vision_config_dict` beside or instead of `vision_config`.
        let section = config.section("vision_config").or_else(|| config.section("vision_config_dict"));
        let section = section.unwrap_or_else(|| {
            config.fault("vision_config", "an object");
            ConfigFile::from_fields("", serde_json::Map::new())
        });
        let vision = CLIPVisionConfig::read(&section);
        config.absorb(section);
        let read = Self { vision, projection_dim: config.size("projection_dim", 512, 1 << 20) };
        config.into_result(read)
    }
}

/// What the checker found in one picture.
///
/// `concept_scores[k]` is `round(cos − threshold + adjustment, 3)`, the number that diffusers compares with zero, where
/// `cos` is the cosine between the picture's and the concept's embedding and `adjustment` is 0.01 once a special care
/// concept scored above zero. The raw scores are `cos − threshold`.
#[derive(Debug, Clone, PartialEq)]
pub struct SafetyVerdict {
    /// Whether any of `concept_scores` is above zero. Special care concepts alone do not make it so.
    pub has_nsfw_concept: bool,
    /// One score for each unwanted concept.
    pub concept_scores: Vec<f32>,
    /// One score for each special care concept.
    pub special_care_scores: Vec<f32>,
    /// `concept_scores` without adjustment and rounding.
    pub raw_concept_scores: Vec<f32>,
    /// `special_care_scores` without adjustment and rounding.
    pub raw_special_care_scores: Vec<f32>,
}

/// Why there is no verdict.
#[derive(Debug, thiserror::Error)]
pub enum SafetyCheckError {
    /// The embedding or a score is NaN or infinite. Such a picture is not safe, it is broken.
    #[error("the safety checker's scores are not finite")]
    NonFinite,
    /// libtorch refused an operation.
    #[error(transparent)]
    Tensor(#[from] TchError),
}

/// `StableDiffusionSafetyChecker`.
#[derive(Debug)]
pub struct StableDiffusionSafetyChecker {
    vision_model: CLIPVisionModel,
    visual_projection: Linear,
    concept_embeds: Tensor,
    special_care_embeds: Tensor,
    concept_embeds_weights: Tensor,
    special_care_embeds_weights: Tensor,
}

impl StableDiffusionSafetyChecker {
    /// The names of transformers 5 for the keys of a file: older versions put `vision_model.` before each of the vision
    /// model's once more, and stored the position ids.
    pub fn rename_key(key: &str) -> Option<String> {
        let key = match key.strip_prefix("vision_model.") {
            Some(rest) if rest.starts_with("vision_model.") => rest,
            _ => key,
        };
        (!key.ends_with("position_ids")).then(|| key.to_owned())
    }

    /// Takes the tensors that `config` asks for.
    pub fn load(weights: &Weights<'_>, config: &SafetyCheckerConfig) -> Self {
        let (hidden_size, dim) = (config.vision.encoder.hidden_size, config.projection_dim);
        Self {
            vision_model: CLIPVisionModel::load(&(weights / "vision_model"), &config.vision),
            visual_projection: Linear::without_bias(&(weights / "visual_projection"), hidden_size, dim),
            concept_embeds: weights.tensor("concept_embeds", &[NUM_CONCEPTS, dim]),
            special_care_embeds: weights.tensor("special_care_embeds", &[NUM_SPECIAL_CARE_CONCEPTS, dim]),
            concept_embeds_weights: weights.tensor("concept_embeds_weights", &[NUM_CONCEPTS]),
            special_care_embeds_weights: weights
                .tensor("special_care_embeds_weights", &[NUM_SPECIAL_CARE_CONCEPTS]),
        }
    }

    /// One verdict for each picture. `clip_input` is what the feature extractor made, of shape
    /// `(batch_size, 3, image_size, image_size)` in the compute dtype.
    pub fn forward(
        &self,
        clip_input: &Tensor,
    ) -> Result<Vec<Result<SafetyVerdict, SafetyCheckError>>, TchError> {
        let image_embeds = self.visual_projection.forward(&self.vision_model.forward(clip_input)?)?;
        let special_care = to_rows(&cosine_distance(&image_embeds, &self.special_care_embeds)?)?;
        let concepts = to_rows(&cosine_distance(&image_embeds, &self.concept_embeds)?)?;
        let special_care_thresholds = to_vec(&self.special_care_embeds_weights)?;
        let thresholds = to_vec(&self.concept_embeds_weights)?;
        let raw = |cosines: &[f32], thresholds: &[f32]| -> Vec<f32> {
            cosines.iter().zip(thresholds).map(|(cosine, threshold)| cosine - threshold).collect()
        };
        let verdicts = concepts.iter().zip(&special_care).map(|(concepts, special_care)| {
            judge(raw(concepts, &thresholds), raw(special_care, &special_care_thresholds))
        });
        Ok(verdicts.collect())
    }
}

/// The verdict on one picture from its raw scores, in f32 as NumPy 2 computes it for diffusers.
fn judge(
    raw_concept_scores: Vec<f32>,
    raw_special_care_scores: Vec<f32>,
) -> Result<SafetyVerdict, SafetyCheckError> {
    if !raw_concept_scores.iter().chain(&raw_special_care_scores).all(|score| score.is_finite()) {
        return Err(SafetyCheckError::NonFinite);
    }
    let mut adjustment = 0.0;
    let mut special_care_scores = Vec::with_capacity(raw_special_care_scores.len());
    for raw in &raw_special_care_scores {
        let score = round_score(raw + adjustment);
        if score > 0.0 {
            // It also holds for the special care concepts that follow.
            adjustment = SPECIAL_CARE_ADJUSTMENT;
        }
        special_care_scores.push(score);
    }
    let concept_scores: Vec<f32> =
        raw_concept_scores.iter().map(|raw| round_score(raw + adjustment)).collect();
    Ok(SafetyVerdict {
        has_nsfw_concept: concept_scores.iter().any(|&score| score > 0.0),
        concept_scores,
        special_care_scores,
        raw_concept_scores,
        raw_special_care_scores,
    })
}

/// `numpy.round(score, 3)` in f32.
fn round_score(score: f32) -> f32 {
    (score * ROUNDING).round_ties_even() / ROUNDING
}

/// The cosines between the rows of `image_embeds` `(batch_size, dim)` and of `concept_embeds` `(num, dim)`, of shape
/// `(batch_size, num)`. The name is diffusers'.
fn cosine_distance(image_embeds: &Tensor, concept_embeds: &Tensor) -> Result<Tensor, TchError> {
    normalize(image_embeds)?.f_mm(&normalize(concept_embeds)?.f_transpose(0, 1)?)
}

/// `torch.nn.functional.normalize`: each row divided by its length.
fn normalize(rows: &Tensor) -> Result<Tensor, TchError> {
    let length = rows.f_norm_scalaropt_dim(2, [1], true)?;
    rows.f_div(&length.f_clamp_min(NORMALIZE_EPS)?)
}

/// The rows of a matrix as f32 on this side.
fn to_rows(matrix: &Tensor) -> Result<Vec<Vec<f32>>, TchError> {
    let (_, num_columns) = matrix.size2()?;
    let values = to_vec(&matrix.f_flatten(0, 1)?)?;
    Ok(values.chunks(usize::try_from(num_columns).unwrap_or(1)).map(<[f32]>::to_vec).collect())
}

/// The values of a vector as f32 on this side.
fn to_vec(vector: &Tensor) -> Result<Vec<f32>, TchError> {
    Vec::try_from(vector.f_to_device(tch::Device::Cpu)?.f_to_kind(Kind::Float)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_key_spellings_give_the_same_names() {
        let rename = StableDiffusionSafetyChecker::rename_key;
        let expected = "vision_model.encoder.layers.0.mlp.fc1.bias";
        assert_eq!(rename(&format!("vision_model.{expected}")).as_deref(), Some(expected));
        assert_eq!(rename(expected).as_deref(), Some(expected));
        assert_eq!(rename("concept_embeds").as_deref(), Some("concept_embeds"));
        assert_eq!(rename("vision_model.vision_model.embeddings.position_ids"), None);
    }

    fn verdict(raw_concepts: &[f32], raw_special_care: &[f32]) -> SafetyVerdict {
        judge(raw_concepts.to_vec(), raw_special_care.to_vec()).unwrap()
    }

    #[test]
    fn scores_are_rounded_before_they_are_compared_with_zero() {
        // The cases of the research notes: 0.20051 − 0.2 flags, 0.2005 − 0.2 does not, 0.1905 − 0.19 does.
        assert!(verdict(&[0.20051 - 0.2], &[]).has_nsfw_concept);
        assert!(!verdict(&[0.2005 - 0.2], &[]).has_nsfw_concept);
        assert!(verdict(&[0.1905 - 0.19], &[]).has_nsfw_concept);
        assert_eq!(verdict(&[-0.0004], &[]).concept_scores, [0.0]);
        assert_eq!(verdict(&[0.123_449], &[]).concept_scores, [0.123]);
    }

    #[test]
    fn special_care_makes_the_check_stricter_from_there_on() {
        let calm = verdict(&[-0.005], &[-0.02, -0.005, -0.02]);
        assert!(!calm.has_nsfw_concept);
        let careful = verdict(&[-0.005], &[0.02, -0.005, -0.02]);
        assert_eq!(careful.special_care_scores, [0.02, 0.005, -0.01]);
        assert_eq!(careful.concept_scores, [0.005]);
        assert!(careful.has_nsfw_concept);
        assert_eq!(careful.raw_concept_scores, [-0.005]);
    }

    #[test]
    fn special_care_alone_does_not_flag() {
        assert!(!verdict(&[-0.5; 17], &[0.9; 3]).has_nsfw_concept);
    }

    #[test]
    fn a_score_that_is_not_finite_is_an_error() {
        for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(matches!(judge(vec![broken], vec![0.0]), Err(SafetyCheckError::NonFinite)));
            assert!(matches!(judge(vec![0.0], vec![broken]), Err(SafetyCheckError::NonFinite)));
        }
    }
}
