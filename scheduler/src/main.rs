//! The program `darkroom`.
use std::process::ExitCode;

use clap::Parser;
use scheduler::cli::Cli;
use scheduler::commands::{self, Outcome};
use scheduler::terminal::{ClosedOutput, Terminal, UsageError, describe_error};

/// The command line or an input file is wrong, as clap says it too.
const USAGE: u8 = 2;

// The main thread runs the command itself, and the children of `up` end with the thread that started them.
#[tokio::main]
async fn main() -> ExitCode {
    schema::failpoint::arm();
    let cli = Cli::parse();
    let terminal = Terminal { json: cli.global.json };
    match commands::run(cli).await {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Incomplete) => ExitCode::FAILURE,
        Err(error) if error.is::<ClosedOutput>() => ExitCode::SUCCESS,
        Err(error) => {
            terminal.tell(&describe_error(&error));
            if error.is::<UsageError>() { ExitCode::from(USAGE) } else { ExitCode::FAILURE }
        }
    }
}
