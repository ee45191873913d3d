//! The name of a registered model: a slug, since it becomes part of queue names.

use std::fmt;
use std::str::FromStr;

/// The longest model name; queue names, which carry it, may have 255 bytes.
const MAX_LENGTH: usize = 63;

/// A model's name: `[a-z0-9][a-z0-9._-]{0,62}`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ModelName(String);

/// Text that cannot be a model's name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a model's name has 1 to {MAX_LENGTH} characters, lower-case letters, digits, `.`, `_` and `-`, \
     and starts with a letter or digit, but this is `{text}`"
)]
pub struct ModelNameError {
    /// What was read, cut to 80 characters.
    pub text: String,
}

impl ModelName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ModelName {
    type Err = ModelNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let letter_or_digit = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let starts_well = text.bytes().next().is_some_and(letter_or_digit);
        let spelled_well = text.bytes().all(|byte| letter_or_digit(byte) || b"._-".contains(&byte));
        if starts_well && spelled_well && text.len() <= MAX_LENGTH {
            Ok(Self(text.to_owned()))
        } else {
            Err(ModelNameError { text: text.chars().take(80).collect() })
        }
    }
}

impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl TryFrom<String> for ModelName {
    type Error = ModelNameError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<ModelName> for String {
    fn from(name: ModelName) -> Self {
        name.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slugs_pass_and_nothing_else_does() {
        for good in ["demo", "stable-diffusion-v1-5", "0.x_y", &"a".repeat(63)] {
            assert!(good.parse::<ModelName>().is_ok(), "{good}");
        }
        for bad in ["", "-a", ".a", "A", "a b", "a/b", "ä", "a\n", &"a".repeat(64)] {
            assert!(bad.parse::<ModelName>().is_err(), "{bad:?}");
        }
        insta::assert_snapshot!("SD 1.5".parse::<ModelName>().unwrap_err(), @"a model's name has 1 to 63 characters, lower-case letters, digits, `.`, `_` and `-`, and starts with a letter or digit, but this is `SD 1.5`");
    }
}
