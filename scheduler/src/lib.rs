//! Darkroom's command line, its serve loops, and the local stack.
//!
//! `darkroom submit` writes rows; the serve loops ([`maintenance`]) publish them to RabbitMQ up to a watermark
//! ([`relay`]) and heal what broke ([`republisher`], [`rescuer`], [`stager`]); others look after what lies about
//! ([`orphan_collector`], [`object_inspector`], [`dead_letter_recorder`]). Workers do the rest. RabbitMQ is behind
//! the wall [`queue`], S3 behind [`object_store`], and Postgres is [`schema::PgCatalog`]. [`local_stack`] starts all
//! three on one machine.
pub mod amqp;
pub mod cli;
pub mod commands;
pub mod config;
pub mod contact_sheet;
pub mod dead_letter_recorder;
pub mod doctor;
pub mod fetch;
pub mod local_stack;
pub mod logging;
pub mod maintenance;
pub mod model_folder;
pub mod object_inspector;
pub mod object_store;
pub mod orphan_collector;
pub mod preflight;
pub mod prompt_file;
pub mod queue;
pub mod relay;
pub mod republisher;
pub mod rescuer;
pub mod stager;
pub mod submission;
pub mod terminal;
pub mod verification;
