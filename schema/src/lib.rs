//! What Darkroom's processes agree on: ids, job specs, states, messages, queue and object names, and all SQL.
//!
//! The command line, the serve loops and the workers meet in tables, messages and object keys. All three are
//! defined here, once, and nothing of AMQP, S3, tensors or threads is. Postgres is reached through
//! [`PgCatalog`] alone; no type of the SQL library appears in a public signature.

mod broker;
mod catalog;
mod engine;
pub mod failpoint;
mod id;
mod job_spec;
mod message;
mod microbatch_key;
mod model_name;
mod object_key;
mod recipe;
mod sha256;
mod state;
mod topology;
mod words;

pub use broker::{BrokerConcern, BrokerVersion, BrokerVersionError, MIN_BROKER_VERSION, concerns};
pub use catalog::batches::{BatchProgress, BatchResult, BatchSummary, ImageRecord, ResolveBatchError};
pub use catalog::cancel::CancelCounts;
pub use catalog::claims::{ClaimedJob, LeaseReturn};
pub use catalog::completion::{CompletedJob, SafetyVerdict, StageTimings, StoredObject};
pub use catalog::connection::{MigrationStatus, PgCatalog};
pub use catalog::dead_letters::DeadLetter;
pub use catalog::error::{CatalogError, Source};
pub use catalog::failures::{FailDisposition, Failure};
pub use catalog::health::{MicrobatchTimes, ServerHealth};
pub use catalog::licences::{Acceptance, Licence};
pub use catalog::listener::{CatalogListener, CatalogNotice};
pub use catalog::models::{AddModelError, AddedModel, Model, ModelComponent, NewModel};
pub use catalog::objects::{KeyStanding, NamedObject, ObjectFault, ObjectFaultKind, OrphanHold};
pub use catalog::relay::{PublishableJob, RelayTurn};
pub use catalog::submission::{NewBatch, NewJob, SubmitError, SubmittedBatch};
pub use catalog::verification::{BatchAccount, BrokenPromise};
pub use catalog::workers::{NewWorker, WorkerSummary};
pub use engine::EngineFingerprint;
pub use id::{AcceptanceId, BatchId, ImageId, JobId, LicenceId, MicrobatchId, ModelId, WorkerId};
pub use job_spec::fault::{SpecFault, SpecFaults};
pub use job_spec::field::SpecField;
pub use job_spec::limits;
pub use job_spec::valid::ValidJobSpec;
pub use job_spec::{JobSpec, SpecDefaults};
pub use message::{DecodeError, JobMessage};
pub use microbatch_key::{MicrobatchKey, MicrobatchKeyError};
pub use model_name::{ModelName, ModelNameError};
pub use object_key::{ObjectKey, ObjectKeyError};
pub use recipe::Recipe;
pub use sha256::{Sha256Digest, Sha256DigestError};
pub use state::{
    AttemptOutcome, ErrorClass, JobState, Lease, LeaseLost, NoiseScheduler, PriorityBand, TRANSITIONS,
};
pub use topology::{
    DEAD_LETTER_EXCHANGE, DEAD_LETTER_QUEUE, DELIVERY_LIMIT, ExchangeDeclaration, JOB_QUEUE_MAX_LENGTH,
    QueueArgument, QueueDeclaration, TRACEPARENT_HEADER, dead_letter_exchange, dead_letter_queue, job_queue,
    prefetch,
};
pub use words::UnknownWord;
