//! Log lines, on standard error.

use std::io::IsTerminal;

use anyhow::{Context, Result};
use tracing_subscriber::EnvFilter;

use crate::config::{Cli, LogFormat};

/// Starts logging as the command line asks.
pub fn start(cli: &Cli) -> Result<()> {
    let filter =
        EnvFilter::try_new(&cli.log).with_context(|| format!("--log has a bad filter `{}`", cli.log))?;
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match cli.log_format {
        // Colors are for terminals, not for files.
        LogFormat::Pretty => lines.with_ansi(std::io::stderr().is_terminal()).init(),
        LogFormat::Json => lines.json().init(),
    }
    Ok(())
}
