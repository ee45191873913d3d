//! The whole fleet, as its users run it: shipped binaries, real RabbitMQ, Postgres and S3.
#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions; this is for their helpers")]

mod broken;
mod faults_clock;
mod faults_disk;
mod faults_freeze;
mod faults_kill;
mod faults_links;
mod faults_postgres;
mod faults_queue;
mod faults_s3;
mod guards;
mod judged;
mod main_job;
mod operations;
mod poison;
mod recipes;
mod rules;
mod tidy;
