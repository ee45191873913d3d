//! `darkroom doctor`: tries out what the promises lean on, and says what to change.
//!
//! Each area asks one server and judges its answers; the judging is apart from the asking, so that `serve` can use the
//! cheap half at its start and tests can feed it answers that no server at hand would give.
pub mod broker;
pub mod bucket;
pub mod clocks;
pub mod leases;
pub mod postgres;

use serde::Serialize;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// It works, and somebody should know.
    Warning,
    /// It breaks a promise, or keeps the fleet from working.
    Danger,
}

impl Verdict {
    /// The word for people.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Danger => "DANGER",
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at: `broker version`.
    pub probe: &'static str,
    /// How bad it is.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What to change, if there is anything.
    pub hint: Option<String>,
}

impl Finding {
    /// All is well.
    pub fn ok(probe: &'static str, found: impl Into<String>) -> Self {
        Self { probe, verdict: Verdict::Ok, found: found.into(), hint: None }
    }

    /// It works, and somebody should know.
    pub fn warning(probe: &'static str, found: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { probe, verdict: Verdict::Warning, found: found.into(), hint: Some(hint.into()) }
    }

    /// It breaks a promise, or keeps the fleet from working.
    pub fn danger(probe: &'static str, found: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { probe, verdict: Verdict::Danger, found: found.into(), hint: Some(hint.into()) }
    }
}

/// The worst verdict of `findings`.
pub fn worst(findings: &[Finding]) -> Verdict {
    findings.iter().map(|finding| finding.verdict).max().unwrap_or(Verdict::Ok)
}
