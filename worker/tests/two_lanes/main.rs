//! Every promise of `tests/in_memory` again, with a second thread that finishes one microbatch while the next is denoised; and what
//! only two threads have: that they overlap, how much waits between them, and what a failure in one leaves of the other.
#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions; this is for their helpers")]

#[path = "../in_memory/catalog.rs"]
mod catalog;
#[path = "../support/checkpoint.rs"]
mod checkpoint;
#[path = "../in_memory/drain.rs"]
mod drain;
#[path = "../in_memory/failures.rs"]
mod failures;
#[path = "../support/golden.rs"]
mod golden;
#[path = "../in_memory/half_precision.rs"]
mod half_precision;
#[path = "../in_memory/leases.rs"]
mod leases;
#[path = "../in_memory/order.rs"]
mod order;
#[path = "../in_memory/pipelines.rs"]
mod pipelines;
#[path = "../in_memory/queue.rs"]
mod queue;
#[path = "../in_memory/store.rs"]
mod store;
#[path = "../in_memory/trace.rs"]
mod trace;
#[path = "../in_memory/worker_under_test.rs"]
mod worker_under_test;

mod between;
mod overlap;
mod same_bits;

const LANES: worker::engine::Lanes = worker::engine::Lanes::Two;
