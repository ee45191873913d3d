//! Log lines on standard error.
use std::io::{self, IsTerminal};

use anyhow::{Context, Result};
use tracing_subscriber::EnvFilter;

use crate::config::LogFormat;

/// Libraries that tell of every retry, refused signature and closed channel, where we do so ourselves or expect it. A
/// filter that the user sets is taken as it is.
const QUIET: &str =
    "lapin=off,s3s=off,s3s_fs=error,sqlx=warn,aws_config=warn,aws_smithy_runtime=warn,hyper=warn";

/// Starts logging by `filter`, or at `default_level` if there is none.
///
/// # Errors
/// If the filter cannot be read, or logging was started before.
pub fn start(filter: Option<&str>, default_level: &str, format: LogFormat) -> Result<()> {
    let directives = filter.map_or_else(|| format!("{default_level},{QUIET}"), str::to_owned);
    let filter = EnvFilter::try_new(&directives)
        .with_context(|| format!("cannot read the log filter {directives:?}"))?;
    let logging = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    let started = match format {
        LogFormat::Json => logging.json().try_init(),
        LogFormat::Pretty => logging.with_ansi(io::stderr().is_terminal()).with_target(false).try_init(),
    };
    started.map_err(|error| anyhow::anyhow!("cannot start logging: {error}"))
}
