//! `darkroom-worker`: see [`worker`].

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{error, info};
use worker::config::{Cli, Command, Config};
use worker::generate::{self, BadInput};
use worker::run::Shutdown;

/// The caller's mistake, as clap reports its own.
const USAGE: u8 = 2;

/// The exit code for everything else.
const FAILURE: u8 = 1;

fn main() -> ExitCode {
    schema::failpoint::arm();
    let cli = Cli::parse();
    // Here, where there is one thread still: the environment can be written to.
    worker::diffusion::cuda::set_environment();
    let ended = worker::logging::start(&cli).and_then(|()| match cli.command {
        Command::Generate(arguments) => generate::run(&arguments),
        Command::Bench(arguments) => worker::bench::run(&arguments),
        Command::Tune(arguments) => worker::tune::run(&arguments),
        Command::Run(config) => leave(serve(*config)),
    });
    ended.map_or_else(|error| ExitCode::from(exit_code(&error)), |()| ExitCode::SUCCESS)
}

/// Ends the process without running the destructors of libtorch's statics: a step that did not end in the grace period
/// may still be running, and crashes when they are gone.
fn leave(ended: Result<()>) -> ! {
    let code = ended.map_or_else(|error| exit_code(&error), |()| 0);
    // SAFETY: `_exit` may be called at any time. What it skips is nothing of ours: logs are written unbuffered.
    unsafe { nix::libc::_exit(code.into()) }
}

#[expect(clippy::print_stderr, reason = "the last word goes to the person, whatever the log filter says")]
fn exit_code(error: &anyhow::Error) -> u8 {
    eprintln!("error: {error:#}");
    if error.is::<BadInput>() { USAGE } else { FAILURE }
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
