//! Postgres and its rules: every statement that Darkroom runs, grouped by who runs it.
//!
//! A method's name repeats the guard in its `WHERE`: `…_if_leased` changes nothing when the lease is lost, and says
//! so with a typed answer. All times are the database's. Statements that touch several jobs lock them in the
//! order of their ids, so that two of them never wait for each other in a circle.

pub(crate) mod batches;
pub(crate) mod cancel;
pub(crate) mod claims;
pub(crate) mod completion;
pub(crate) mod connection;
mod copy;
pub(crate) mod dead_letters;
pub(crate) mod error;
pub(crate) mod failures;
pub(crate) mod health;
pub(crate) mod licences;
pub(crate) mod listener;
pub(crate) mod models;
pub(crate) mod objects;
pub(crate) mod relay;
pub(crate) mod rescue;
mod rows;
pub(crate) mod submission;
pub(crate) mod verification;
pub(crate) mod workers;
