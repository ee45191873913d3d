//! The whole fleet, as its users run it: shipped binaries, real RabbitMQ, Postgres and S3.
#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions; this is for their helpers")]

mod broken;
mod main_job;
mod rules;
mod tidy;
