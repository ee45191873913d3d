//! What jobs must have in common to share a forward pass.

use std::fmt;
use std::str::FromStr;

use crate::state::NoiseScheduler;

/// Jobs with equal keys may share one forward pass; prompts, negative prompts, seeds and guidance scales may
/// differ freely among them.
///
/// Written compactly, as in messages: `512x512/50/pndm/cfg`. The last part says whether each denoising step makes
/// two predictions (`cfg`, guidance scale above 1) or one (`plain`); such jobs have forward passes of different
/// shapes. Text-to-image is the only kind so far; another kind would add a part.
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
        let Self { width, height, num_inference_steps, noise_scheduler, classifier_free_guidance } = self;
        let guidance = if *classifier_free_guidance { GUIDED } else { UNGUIDED };
        write!(f, "{width}x{height}/{num_inference_steps}/{noise_scheduler}/{guidance}")
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
    let (noise_scheduler, guidance) = rest.split_once('/')?;
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
    })
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

    proptest! {
        #[test]
        fn keys_round_trip_through_text(
            width: u32,
            height: u32,
            num_inference_steps: u32,
            noise_scheduler in prop::sample::select(NoiseScheduler::ALL),
            classifier_free_guidance: bool,
        ) {
            let key = MicrobatchKey { width, height, num_inference_steps, noise_scheduler, classifier_free_guidance };
            prop_assert_eq!(key.to_string().parse(), Ok(key));
        }

        #[test]
        fn no_text_makes_the_parser_panic(text: String) {
            let _ = text.parse::<MicrobatchKey>();
        }
    }

    #[test]
    fn a_key_that_is_not_one_is_quoted() {
        insta::assert_snapshot!("512x512/50/pndm".parse::<MicrobatchKey>().unwrap_err(), @"a microbatch key looks like `512x512/50/pndm/cfg`, but this is `512x512/50/pndm`");
    }
}
