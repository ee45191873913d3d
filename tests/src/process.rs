//! One of the shipped binaries as a child process, its log kept for the failure message.

use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
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
    // A test lies in target/<profile>/deps, a binary beside what it starts.
    let folders = test.ancestors().skip(1).take(2);
    let found = folders.map(|folder| folder.join(name)).find(|path| path.exists());
    found
        .unwrap_or_else(|| panic!("{name} is missing near {}: run `cargo build --workspace`", test.display()))
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

    /// Its number.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends `signal`.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal)
            .unwrap_or_else(|error| panic!("{}: {error}", self.name));
    }

    /// Whether it has not ended.
    pub fn runs(&mut self) -> bool {
        self.child.try_wait().expect("an own child can be waited for").is_none()
    }

    /// Waits until a kill point ends it.
    ///
    /// # Panics
    /// If it ends otherwise, or runs on after `deadline`: perhaps the binaries were built without their kill points.
    pub async fn aborted(&mut self, deadline: Duration) {
        let status = self.exit(deadline).await;
        assert_eq!(
            status.signal(),
            Some(Signal::SIGABRT as i32),
            "{} ended with {status}; kill points need --features worker/failpoints,scheduler/failpoints\n{}",
            self.name,
            self.log()
        );
    }

    /// Stops it in its tracks (SIGSTOP), and returns once it stands still.
    pub async fn freeze(&self) {
        self.signal(Signal::SIGSTOP);
        let state = || async { Some(stat(self.id())?.swap_remove(0)) };
        let is_stopped = |state: &Option<String>| state.as_deref() == Some("T");
        eventually("a frozen process", Duration::from_secs(30), state, is_stopped).await;
    }

    /// Lets it go on as if nothing had happened.
    pub fn thaw(&self) {
        self.signal(Signal::SIGCONT);
    }

    /// Waits until its log holds `text`.
    pub async fn says(&self, text: &str, deadline: Duration) {
        let what = format!("{} to say {text:?}", self.name);
        eventually(&what, deadline, || async { self.log().contains(text) }, |said| *said).await;
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
            #[expect(clippy::print_stderr, reason = "the log of a failed test belongs in its output")]
            {
                eprintln!("--- {} ---\n{}", self.name, tail(&self.log(), 60));
            }
        }
    }
}

/// What the kernel tells of process `pid` in `/proc/PID/stat`, from the field after its name on: its state, its parent's
/// number and more (proc(5)). `None` once it is gone.
pub(crate) fn stat(pid: u32) -> Option<Vec<String>> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold spaces and parentheses.
    Some(stat.rsplit_once(") ")?.1.split_whitespace().map(str::to_owned).collect())
}

/// The last `count` lines of a log.
pub(crate) fn tail(log: &str, count: usize) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}
