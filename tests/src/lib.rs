//! The harness of the fleet tests: real RabbitMQ, Postgres and S3, and the shipped binaries as processes, driven by
//! verbs of the domain (`fleet.submit`, `worker.kill`, `fleet.pictures`).
//!
//! One set of servers is started for the whole test process; each test gets a database and a model name of its own,
//! and with the model name its own queues and object keys. A test that breaks a server starts a set for itself.

//! What breaks: [`proxy`] and [`link`] break the network of one process, [`s3_front`] the object store, [`full_disk`] takes
//! a server's room away, [`broker`] puts messages where none belong, and the kill points of `schema::failpoint` end
//! processes between two steps. [`chaos`] does all of that at once under load, and [`checker`] is the judge. [`load`] breaks
//! nothing and looks at what grows. [`guards`] takes away what keeps a promise, and tests have to fail.

pub mod broker;
pub mod chaos;
pub mod checker;
pub mod fleet;
pub mod full_disk;
pub mod guards;
pub mod link;
pub mod load;
pub mod process;
pub mod proxy;
pub mod s3_front;
pub mod servers;
pub mod waiting;

pub use broker::Broker;
pub use fleet::Fleet;
pub use link::{Link, Wall};
pub use process::Process;
pub use proxy::Mode;
pub use s3_front::{S3Fault, S3Front};
pub use servers::Servers;
pub use waiting::eventually;
