//! Darkroom's GPU worker.
//!
//! The life of a job, in files: [`consumer`] takes a message, [`batcher`] groups it, [`claimer`] makes it ours, [`engine`]
//! draws it, [`completer`] stores it, records it and acknowledges the message. [`lease`] keeps the claim alive meanwhile,
//! [`run`] starts all of them and drains them, [`trace`] writes down when each did what. Four walls are traits: [`queue::Queue`] (RabbitMQ in [`amqp`]),
//! [`object_store::ObjectStore`], [`catalog::Catalog`] and [`pipeline::Pipeline`]. [`diffusion`] is the model code.

pub mod amqp;
pub mod backoff;
pub mod batcher;
pub mod batching_args;
pub mod bench;
pub mod catalog;
pub mod claimer;
pub mod completer;
pub mod config;
pub mod consumer;
pub mod control;
pub mod diffusion;
pub mod engine;
pub mod failure;
pub mod fitness;
pub mod generate;
pub mod infotext;
pub mod kernel_args;
pub mod lease;
pub mod logging;
pub mod metrics;
pub mod microbatch;
pub mod model_files;
pub mod object_store;
pub mod output;
pub mod pipeline;
pub mod png;
pub mod queue;
pub mod run;
pub mod solid_color;
pub mod stable_diffusion;
pub mod start;
pub mod trace;
pub mod tune;
