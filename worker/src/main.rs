//! `darkroom-worker`: see [`worker`].

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{error, info};
use tracing_subscriber::EnvFilter;
use worker::config::{Cli, Command, Config, LogFormat};
use worker::generate::{self, BadInput};
use worker::run::Shutdown;

/// What `sysexits.h` calls EX_USAGE's neighbor for bad input: the caller's mistake, as clap reports its own.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Err(error) = start_logging(&cli) {
        return complain(&error);
    }
    let ended = match cli.command {
        Command::Generate(arguments) => generate::run(&arguments),
        Command::Run(config) => serve(*config),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => complain(&error),
    }
}

#[expect(clippy::print_stderr, reason = "the last word goes to the person, whatever the log filter says")]
fn complain(error: &anyhow::Error) -> ExitCode {
    eprintln!("error: {error:#}");
    if error.is::<BadInput>() { ExitCode::from(USAGE) } else { ExitCode::FAILURE }
}

fn start_logging(cli: &Cli) -> Result<()> {
    let filter =
        EnvFilter::try_new(&cli.log).with_context(|| format!("--log has a bad filter `{}`", cli.log))?;
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match cli.log_format {
        LogFormat::Pretty => lines.init(),
        LogFormat::Json => lines.json().init(),
    }
    Ok(())
}

fn serve(config: Config) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let ended = runtime.block_on(async {
        let shutdown = Shutdown::default();
        tokio::spawn(watch_signals(shutdown.clone()));
        worker::start::start(config, shutdown).await
    });
    // An engine in the middle of a step, or an encoder, is not waited for: nothing of it will be kept.
    runtime.shutdown_background();
    ended
}

async fn watch_signals(shutdown: Shutdown) {
    let (Ok(mut terminate), Ok(mut interrupt)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return error!("Signals cannot be watched; the worker will not drain");
    };
    for token in [&shutdown.drain, &shutdown.hasten] {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        info!("A signal asks the worker to {}", if shutdown.drain.is_cancelled() { "hurry" } else { "stop" });
        token.cancel();
    }
}
