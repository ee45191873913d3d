//! One of the shipped binaries as a child process, its log kept for the failure message.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::waiting::eventually;

/// A binary of the workspace, beside the test's own executable.
///
/// # Panics
/// When it was not built: `cargo test -p fleet-tests` alone builds no binaries, `cargo build --workspace` does.
pub fn binary(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a test has an executable");
    let folder = test.parent().and_then(Path::parent).expect("target/<profile>/deps/it");
    let path = folder.join(name);
    assert!(path.exists(), "{} is missing: run `cargo build --workspace` first", path.display());
    path
}

/// A running child process. Dropping it kills it.
pub struct Process {
    child: Child,
    log: PathBuf,
    name: String,
}

impl Process {
    /// Starts `command`, both outputs going to `log`.
    pub fn spawn(name: &str, mut command: Command, log: PathBuf) -> Process {
        let file = File::create(&log).unwrap_or_else(|error| panic!("{}: {error}", log.display()));
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone().expect("a file handle can be duplicated"))
            .stderr(file)
            .spawn()
            .unwrap_or_else(|error| panic!("{name} does not start: {error}"));
        Process { child, log, name: name.to_owned() }
    }

    /// What the process has printed so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Sends `signal`.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal)
            .unwrap_or_else(|error| panic!("{}: {error}", self.name));
    }

    /// `kill -9`, and waits until the process is gone.
    pub fn kill(&mut self) {
        self.child.kill().expect("an own child can be killed");
        self.child.wait().expect("an own child can be waited for");
    }

    /// The exit status, once the process ends by itself within `deadline`.
    pub async fn exit(&mut self, deadline: Duration) -> ExitStatus {
        let what = format!("{} to exit", self.name);
        let child = std::sync::Mutex::new(&mut self.child);
        let status = eventually(
            &what,
            deadline,
            || async {
                child.lock().expect("one test, one lock").try_wait().expect("an own child can be waited for")
            },
            Option::is_some,
        )
        .await;
        status.expect("the condition says so")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already; both calls then answer with an error that says so.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<_> = log.lines().rev().take(60).collect();
            let tail: Vec<_> = tail.into_iter().rev().collect();
            #[expect(clippy::print_stderr, reason = "the log of a failed test belongs in its output")]
            {
                eprintln!("--- {} ---\n{}", self.name, tail.join("\n"));
            }
        }
    }
}
