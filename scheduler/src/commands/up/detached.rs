//! `darkroom up --detach`: starts the same command without that flag in a session of its own, and waits until it says
//! that it is ready.
use std::ffi::OsString;
use std::fs::File;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use tokio::process::Command;
use tokio::time;

use crate::local_stack::data_dir::{self, DataDir};
use crate::terminal::Terminal;

/// A first start makes a database; on a busy machine this takes minutes.
const READY_LIMIT: Duration = Duration::from_secs(300);
/// Between two looks at the ready file.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

pub(super) async fn run(root: &Path, terminal: Terminal) -> Result<()> {
    // Fails here rather than in the background, if it has to; the background process locks the folder again.
    let logs = DataDir::open(root)?.logs();
    let log = logs.join("up.log");
    let output = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
    let ready = tempfile::TempDir::new_in(&logs)?;
    let ready_file = ready.path().join("ready");

    // `setsid` makes a session without a terminal, so that closing this one does not reach it.
    let mut command = Command::new("setsid");
    command.arg(std::env::current_exe()?).args(arguments(std::env::args_os().skip(1), &ready_file, root));
    command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
    let mut child = command.spawn().context("cannot start the background process")?;
    let started = time::Instant::now();
    while !ready_file.exists() {
        if let Some(status) = child.try_wait()? {
            bail!(
                "it ended before it was ready ({status})\n{}",
                std::fs::read_to_string(&log).unwrap_or_default().trim_end()
            );
        }
        if started.elapsed() > READY_LIMIT {
            if let Some(pid) = child.id() {
                kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGTERM)?;
            }
            bail!("it was not ready within {} s; its log is {}", READY_LIMIT.as_secs(), log.display());
        }
        time::sleep(POLL_INTERVAL).await;
    }
    let data =
        json!({ "data_dir": root, "env_file": data_dir::env_file(root), "log": log, "pid": child.id() });
    terminal.show(&data, || {
        let told = std::fs::read_to_string(&log).unwrap_or_default();
        // What `up` itself tells has no timestamp in front; its log lines do.
        let told: String = told
            .lines()
            .filter(|line| line.starts_with(char::is_alphabetic))
            .map(|line| format!("{line}\n"))
            .collect();
        format!("{told}it runs in the background; stop it with `darkroom down`")
    })
}

/// Our own arguments for the background process: without the flag, with the ready file, the folder spelled out. What
/// follows `--` belongs to the worker and stays last.
fn arguments(ours: impl Iterator<Item = OsString>, ready_file: &Path, root: &Path) -> Vec<OsString> {
    let ours: Vec<OsString> = ours.collect();
    let end = ours.iter().position(|argument| argument == "--").unwrap_or(ours.len());
    let (before, after) = ours.split_at(end);
    let mut arguments: Vec<OsString> =
        before.iter().filter(|argument| *argument != "--detach").cloned().collect();
    // The last one counts, but clap takes it only once.
    let mut kept = Vec::new();
    let mut rest = arguments.drain(..);
    while let Some(argument) = rest.next() {
        let text = argument.to_string_lossy();
        if text == "--data-dir" || text == "--ready-file" {
            rest.next();
        } else if !text.starts_with("--data-dir=") && !text.starts_with("--ready-file=") {
            kept.push(argument);
        }
    }
    drop(rest);
    kept.extend(["--ready-file".into(), ready_file.into(), "--data-dir".into(), root.into()]);
    kept.extend(after.iter().cloned());
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_background_process_gets_our_arguments() {
        let ours = "--json up --data-dir here --detach --workers 2 --ready-file=x -- --detach --device cpu";
        let told = arguments(ours.split(' ').map(OsString::from), Path::new("/r"), Path::new("/d"));
        let told: Vec<_> = told.iter().map(|argument| argument.to_string_lossy()).collect();
        assert_eq!(
            told.join(" "),
            "--json up --workers 2 --ready-file /r --data-dir /d -- --detach --device cpu"
        );
    }
}
