//! One thing wrong with one field of a job spec, told by field, rule and value.

use std::fmt;

use super::field::SpecField;

/// The longest quoted value in a fault, in characters.
const MAX_QUOTED_CHARS: usize = 60;

/// One fault: `` `width` has to be a multiple of 8, from 64 to 2048, but is 500 ``.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, serde::Serialize)]
#[error("`{field}` has to be {rule}, but is {value}")]
pub struct SpecFault {
    /// The field, or the fields together: `width`, `width × height`.
    pub field: &'static str,
    /// What its value has to be.
    pub rule: String,
    /// What its value is, cut short if it is long.
    pub value: String,
}

impl SpecFault {
    pub(crate) fn new(field: SpecField, value: impl fmt::Display) -> Self {
        Self { field: field.as_str(), rule: field.rule(), value: value.to_string() }
    }

    /// A fault whose value is quoted as text.
    pub(super) fn quoting(field: SpecField, value: &str) -> Self {
        Self::new(field, quoted(value))
    }
}

/// `value` in quotation marks with its control characters escaped, cut short if it is long.
pub(super) fn quoted(value: &str) -> String {
    if value.chars().nth(MAX_QUOTED_CHARS).is_some() {
        let head: String = value.chars().take(MAX_QUOTED_CHARS).collect();
        format!("{head:?}…")
    } else {
        format!("{value:?}")
    }
}

/// All the faults of one spec, where an error type has to be one value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpecFaults(pub Vec<SpecFault>);

impl fmt::Display for SpecFaults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, fault) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            write!(f, "{separator}{fault}")?;
        }
        Ok(())
    }
}

impl std::error::Error for SpecFaults {}
