//! Faults that a prompt asks for, compiled for tests only: what a model, a card or a driver may do to this process.

use std::sync::Arc;

use schema::ValidJobSpec;

use crate::pipeline::{PictureOutcome, PipelineError};

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Injected(&'static str);

/// What the call does besides drawing, by what is in its prompts.
pub(super) fn fault(specs: &[&ValidJobSpec]) -> Result<(), PipelineError> {
    let asks = |what: &str| specs.iter().any(|spec| spec.prompt().contains(what));
    if asks("inject: abort") {
        std::process::abort();
    }
    assert!(!asks("inject: panic"), "a prompt asked for it");
    if asks("inject: device") {
        return Err(PipelineError::Device { source: Arc::new(Injected("an illegal memory access")) });
    }
    if asks("inject: little memory") && specs.len() > 2 {
        let source = Arc::new(Injected("out of memory"));
        return Err(PipelineError::OutOfMemory { batch_size: specs.len(), source });
    }
    if asks("inject: no memory") {
        let source = Arc::new(Injected("out of memory"));
        return Err(PipelineError::OutOfMemory { batch_size: specs.len(), source });
    }
    Ok(())
}

/// What becomes of one picture.
pub(super) fn spoil(picture: PictureOutcome, spec: &ValidJobSpec) -> PictureOutcome {
    if spec.prompt().contains("inject: nan") {
        return PictureOutcome::Failed(PipelineError::NonFinite { tensor: "latents".to_owned() });
    }
    picture
}
