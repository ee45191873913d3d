//! What jobs must have in common to share a forward pass.

use std::fmt;
use std::str::FromStr;

use crate::recipe::Recipe;
use crate::state::NoiseScheduler;

/// Jobs with equal keys may share one forward pass; prompts, negative prompts, seeds and guidance scales may
/// differ freely among them.
///
/// Written compactly, as in messages: `512x512/50/pndm/cfg`. The fourth part says whether each denoising step makes
/// two predictions (`cfg`, guidance scale above 1) or one (`plain`); such jobs have forward passes of different
/// shapes. A recipe that is not exact adds two parts, `512x512/50/pndm/cfg/0.2-0.8/3`: the steps with guidance, and the
/// cache interval. A build that knows no recipes cannot read such a key, so it cannot draw another picture than was asked
/// for. Text-to-image is the only kind so far; another kind would add a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MicrobatchKey {
    /// Width of the picture in pixels.
    pub width: u32,
    /// Height of the picture in pixels.
    pub height: u32,
    /// Denoising steps.
    pub num_inference_steps: u32,
    /// The noise scheduler.
    pub noise_scheduler: NoiseScheduler,
    /// Whether each step predicts with and without the prompt.
    pub classifier_free_guidance: bool,
    /// What they leave out of the denoising, and at which steps.
    pub recipe: Recipe,
}

const GUIDED: &str = "cfg";
const UNGUIDED: &str = "plain";

/// Text that is not a microbatch key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a microbatch key looks like `512x512/50/pndm/{GUIDED}`, but this is `{text}`")]
pub struct MicrobatchKeyError {
    /// What was read, cut to 80 characters.
    pub text: String,
}

impl fmt::Display for MicrobatchKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { width, height, num_inference_steps, noise_scheduler, classifier_free_guidance, recipe } =
            self;
        let guidance = if *classifier_free_guidance { GUIDED } else { UNGUIDED };
        write!(f, "{width}x{height}/{num_inference_steps}/{noise_scheduler}/{guidance}")?;
        if recipe.is_exact() {
            return Ok(());
        }
        let Recipe { guidance_start, guidance_stop, cache_interval } = recipe;
        // `Display` of an f64 reads back as the same number and has no exponent, so the first `-` is ours.
        write!(f, "/{guidance_start}-{guidance_stop}/{cache_interval}")
    }
}

impl FromStr for MicrobatchKey {
    type Err = MicrobatchKeyError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse(text).ok_or_else(|| MicrobatchKeyError { text: text.chars().take(80).collect() })
    }
}

fn parse(text: &str) -> Option<MicrobatchKey> {
    let (size, rest) = text.split_once('/')?;
    let (width, height) = size.split_once('x')?;
    let (num_inference_steps, rest) = rest.split_once('/')?;
    let (noise_scheduler, rest) = rest.split_once('/')?;
    let (guidance, recipe) = match rest.split_once('/') {
        Some((guidance, recipe)) => (guidance, parse_recipe(recipe)?),
        None => (rest, Recipe::EXACT),
    };
    Some(MicrobatchKey {
        width: width.parse().ok()?,
        height: height.parse().ok()?,
        num_inference_steps: num_inference_steps.parse().ok()?,
        noise_scheduler: noise_scheduler.parse().ok()?,
        classifier_free_guidance: match guidance {
            GUIDED => true,
            UNGUIDED => false,
            _ => return None,
        },
        recipe,
    })
}

fn parse_recipe(text: &str) -> Option<Recipe> {
    let (guidance, cache_interval) = text.split_once('/')?;
    let (guidance_start, guidance_stop) = guidance.split_once('-')?;
    let recipe = Recipe {
        guidance_start: guidance_start.parse().ok()?,
        guidance_stop: guidance_stop.parse().ok()?,
        cache_interval: cache_interval.parse().ok()?,
    };
    recipe.faults().is_empty().then_some(recipe)
}

impl TryFrom<String> for MicrobatchKey {
    type Error = MicrobatchKeyError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<MicrobatchKey> for String {
    fn from(key: MicrobatchKey) -> Self {
        key.to_string()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Any from 0 to 1, those with three hundred zeros after the point too.
    fn fraction() -> impl Strategy<Value = f64> {
        prop_oneof![0.0..=1.0, (0..=1.0_f64.to_bits()).prop_map(f64::from_bits)]
    }

    proptest! {
        #[test]
        fn keys_round_trip_through_text(
            width: u32,
            height: u32,
            num_inference_steps: u32,
            noise_scheduler in prop::sample::select(NoiseScheduler::ALL),
            classifier_free_guidance: bool,
            fractions in prop_oneof![Just([0.0, 1.0]), prop::array::uniform2(fraction())],
            cache_interval in prop_oneof![Just(1_u32), 1_u32..1000],
        ) {
            let (guidance_start, guidance_stop) = (fractions[0].min(fractions[1]), fractions[0].max(fractions[1]));
            let recipe = Recipe { guidance_start, guidance_stop, cache_interval };
            let key = MicrobatchKey {
                width, height, num_inference_steps, noise_scheduler, classifier_free_guidance, recipe,
            };
            prop_assert_eq!(key.to_string().parse(), Ok(key));
            prop_assert_eq!(key.to_string().split('/').count(), if recipe.is_exact() { 4 } else { 6 });
            // Such a message is read: `message.rs` refuses those of more than 1,024 bytes.
            prop_assert!(key.to_string().len() < 900);
        }

        #[test]
        fn no_text_makes_the_parser_panic(text: String) {
            let _ = text.parse::<MicrobatchKey>();
        }
    }

    #[test]
    fn a_key_that_is_not_one_is_quoted() {
        for bad in
            ["", "0-1", "0/1", "0-1/0", "0-1/1000", "0.7-0.2/1", "-0.1-1/1", "NaN-1/2", "0-inf/2", "0-1/2/3"]
        {
            let text = format!("512x512/50/pndm/cfg/{bad}");
            assert!(text.parse::<MicrobatchKey>().is_err(), "{text}");
        }
        insta::assert_snapshot!("512x512/50/pndm".parse::<MicrobatchKey>().unwrap_err(), @"a microbatch key looks like `512x512/50/pndm/cfg`, but this is `512x512/50/pndm`");
    }
}
