//! The catalog against a real Postgres 15: each test has a database of its own, made from a migrated template.
#![expect(clippy::unwrap_used, reason = "clippy.toml allows it in test functions; this is for their helpers")]

mod support;
mod suspects;

mod batches;
mod cancellation;
mod claims;
mod completion;
mod constraints;
mod digests;
mod image_constraints;
mod interleavings;
mod licences;
mod migrations;
mod notices;
mod objects;
mod plans;
mod promises;
mod recipes;
mod relay;
mod submission;
mod transitions;
