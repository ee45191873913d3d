//! The harness of the fleet tests: real RabbitMQ, Postgres and S3, and the shipped binaries as processes, driven by
//! verbs of the domain (`fleet.submit`, `worker.kill`, `fleet.pictures`).
//!
//! One set of servers is started for the whole test process; each test gets a database and a model name of its own,
//! and with the model name its own queues and object keys. A test that breaks a server starts a set for itself.

pub mod fleet;
pub mod process;
pub mod servers;
pub mod waiting;

pub use fleet::Fleet;
pub use process::Process;
pub use servers::Servers;
pub use waiting::eventually;
