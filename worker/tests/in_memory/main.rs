//! The whole path of a job against walls made of memory: which order things happen in, and what a lost lease, a cancellation, a
//! failing server, a broken pipeline and a shutdown leave behind. No servers, no sleeping: tests wait for events.
#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions; this is for their helpers")]

#[path = "../support/checkpoint.rs"]
mod checkpoint;
#[path = "../support/golden.rs"]
mod golden;

mod catalog;
mod drain;
mod failures;
mod half_precision;
mod leases;
mod order;
mod pipelines;
mod queue;
mod store;
mod trace;
mod worker_under_test;

/// One thread for both halves of a call; `tests/two_lanes` repeats these tests with two.
const LANES: worker::engine::Lanes = worker::engine::Lanes::One;
