//! The whole fleet, as its users run it: shipped binaries, real RabbitMQ, Postgres and S3.

mod broken;
mod main_job;
mod rules;
mod tidy;
