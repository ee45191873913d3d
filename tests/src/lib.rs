//! The harness of the fleet tests: real RabbitMQ, Postgres and S3, and the shipped binaries as processes, driven by
//! verbs of the domain (`fleet.submit`, `worker.kill`, `fleet.pictures`).
//!
//! One set of servers is started for the whole test process; each test gets a database and a model name of its own,
//! and with the model name its own queues and object keys. A test that breaks a server starts a set for itself.

//! What breaks: [`proxy`] and [`link`] break the network of one process, [`s3_front`] the object store, [`full_disk`] takes
//! a server's room away, [`broker`] puts messages where none belong, and the kill points of `schema::failpoint` end
//! processes between two steps. [`chaos`] does all of that at once under load, and [`checker`] is the judge. [`load`] breaks
//! nothing and looks at what grows. [`guards`] takes away what keeps a promise, and tests have to fail.

//! What is fast: [`overlap`] measures one worker against its pipeline, [`bench_fleet`] the control plane against the servers that it is
//! made of, and [`capacity`] simulates from that what they carry.

pub mod bench_fleet;
pub mod broker;
pub mod capacity;
pub mod chaos;
pub mod checker;
pub mod cpu;
pub mod fleet;
pub mod full_disk;
pub mod guards;
pub mod link;
pub mod load;
pub mod overlap;
pub mod process;
pub mod proxy;
pub mod s3_front;
pub mod servers;
pub mod trace_file;
pub mod waiting;

pub use broker::Broker;
pub use fleet::Fleet;
pub use link::{Link, Wall};
pub use process::Process;
pub use proxy::Mode;
pub use s3_front::{S3Fault, S3Front};
pub use servers::Servers;
pub use waiting::eventually;

use std::num::ParseIntError;
use std::str::FromStr;

use anyhow::Context;

/// A whole number from the environment.
///
/// # Errors
/// If it is something else.
pub fn setting<N>(name: &str, otherwise: N) -> anyhow::Result<N>
where
    N: FromStr<Err = ParseIntError>,
{
    match std::env::var(name) {
        Ok(text) => text.parse().with_context(|| format!("{name} has to be a whole number, but is `{text}`")),
        Err(_) => Ok(otherwise),
    }
}

/// The middle one; 0 of none.
pub fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    match numbers.len() {
        0 => 0.0,
        count if count % 2 == 1 => numbers[count / 2],
        count => f64::midpoint(numbers[count / 2 - 1], numbers[count / 2]),
    }
}
