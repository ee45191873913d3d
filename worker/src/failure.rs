//! What to do with a job that did not become a picture: one error type, one `match`.

use std::sync::Arc;

use schema::{CatalogError, ErrorClass, Failure};

use crate::backoff::Chain;
use crate::object_store::StoreError;
use crate::pipeline::PipelineError;
use crate::png::PngError;

/// Why a job did not become a picture, whichever wall it was.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// Drawing it failed.
    #[error(transparent)]
    Pipeline(#[from] PipelineError),
    /// Encoding it failed.
    #[error(transparent)]
    Png(#[from] PngError),
    /// Storing it failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Recording it failed; shared, since one refused transaction is every picture's failure.
    #[error(transparent)]
    Catalog(Arc<CatalogError>),
}

/// What is done with the job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disposition {
    /// The attempt counts as failed; another may go better.
    Retry(ErrorClass),
    /// The attempt counts as failed, and no other can go better.
    Discard(ErrorClass),
    /// Not the job's fault: it goes back with its attempt.
    Release,
}

impl JobError {
    /// What is done with the job that this happened to.
    pub fn disposition(&self) -> Disposition {
        use Disposition::{Discard, Release, Retry};
        match self {
            Self::Pipeline(PipelineError::Input { .. }) => Discard(ErrorClass::Input),
            // A worker with more memory may hold it.
            Self::Pipeline(PipelineError::OutOfMemory { .. }) => Retry(ErrorClass::OutOfMemory),
            // The same weights on the same kind of device will most likely fail again, but a bad card looks the same.
            Self::Pipeline(PipelineError::NonFinite { .. }) => Retry(ErrorClass::NonFinite),
            // Charged although the job may be innocent: a job that kills devices must not go around forever.
            Self::Pipeline(PipelineError::Device { .. }) => Retry(ErrorClass::Infra),
            Self::Pipeline(PipelineError::Bug { .. } | PipelineError::Panicked { .. }) => {
                Retry(ErrorClass::Bug)
            }
            // The same pixels fail in the same way.
            Self::Png(_) => Discard(ErrorClass::Bug),
            Self::Store(StoreError::Unavailable { .. } | StoreError::Refused { .. }) => Release,
            Self::Store(StoreError::Mismatch { .. }) => Retry(ErrorClass::Infra),
            Self::Catalog(error) => match **error {
                CatalogError::Unreachable(_)
                | CatalogError::Contended(_)
                | CatalogError::Misconfigured(_)
                | CatalogError::NotMigrated(_) => Release,
                CatalogError::Refused { .. }
                | CatalogError::Unreadable { .. }
                | CatalogError::Internal(_) => Retry(ErrorClass::Bug),
            },
        }
    }

    /// The failure to record, or `None` if the job is to be released.
    pub fn failure(&self) -> Option<Failure> {
        let (class, can_retry_help) = match self.disposition() {
            Disposition::Retry(class) => (class, true),
            Disposition::Discard(class) => (class, false),
            Disposition::Release => return None,
        };
        Some(Failure { class, message: Chain(self).to_string(), can_retry_help })
    }
}
