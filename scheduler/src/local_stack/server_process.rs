//! One child process of the local stack: started, watched until it answers, stopped in good order, and never left
//! behind. Who is running is written down first, so that the next start can clear away what a killed one left.
use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use tokio::process::{Child, Command};
use tokio::time;
use tracing::{debug, warn};

use super::server_user::ServerUser;

/// Between two looks at a condition that nobody can announce to us.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// How much of a log is quoted when a server does not come up.
const QUOTED_LINES: usize = 12;

/// A running child in a process group of its own.
#[derive(Debug)]
pub struct ServerProcess {
    name: String,
    child: Child,
    pid: Pid,
    stop_signal: Signal,
    log: PathBuf,
}

impl ServerProcess {
    /// Starts `command`, with standard output and error appended to `log`, and records it in `children`.
    pub fn spawn(
        name: &str,
        mut command: Command,
        stop_signal: Signal,
        log: &Path,
        children: &ChildrenFile,
    ) -> Result<Self> {
        let output = OpenOptions::new().create(true).append(true).open(log);
        let output = output.with_context(|| format!("cannot open the log {}", log.display()))?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let program = command.as_std().get_program().to_string_lossy().into_owned();
        let child = command.spawn().with_context(|| format!("cannot start {name} (by {program})"))?;
        let pid = child.id().context("the child ended before it had a process id")?;
        let pid = Pid::from_raw(i32::try_from(pid)?);
        children.record(name, pid)?;
        debug!(server = name, pid = pid.as_raw(), "Started {name}");
        Ok(Self { name: name.to_owned(), child, pid, stop_signal, log: log.to_owned() })
    }

    /// The process id, which is the process group's too.
    pub fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    /// Asks `answers` again and again until it says yes; an error if the process ends first or `limit` passes.
    pub async fn wait_until_ready<F>(&mut self, limit: Duration, mut answers: impl FnMut() -> F) -> Result<()>
    where
        F: Future<Output = bool>,
    {
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                bail!("{} ended before it was ready ({status}){}", self.name, self.quoted_log());
            }
            // One unanswered question must not use up the whole limit.
            if time::timeout(limit / 4, answers()).await.unwrap_or(false) {
                return Ok(());
            }
            if started.elapsed() > limit {
                bail!("{} did not answer within {} s{}", self.name, limit.as_secs(), self.quoted_log());
            }
            time::sleep(POLL_INTERVAL).await;
        }
    }

    /// Waits until the process ends by itself.
    pub async fn exited(&mut self) -> Result<ExitStatus> {
        self.child.wait().await.with_context(|| format!("cannot wait for {}", self.name))
    }

    /// Asks the process to stop, waits up to `grace`, then kills its whole group.
    pub async fn stop(mut self, grace: Duration) -> Result<()> {
        if self.child.try_wait()?.is_none() {
            signal_group(self.pid, self.stop_signal)?;
        }
        let ended = time::timeout(grace, self.child.wait()).await;
        if ended.is_err() {
            warn!(server = self.name, "{} did not stop within {grace:?}; killing it", self.name);
        }
        // Also after a good end: a child of the child must not stay.
        signal_group(self.pid, Signal::SIGKILL)?;
        self.child.wait().await?;
        debug!(server = self.name, "Stopped {}", self.name);
        Ok(())
    }

    /// The end of the log, for an error message.
    pub fn quoted_log(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        let quoted: String = lines[lines.len().saturating_sub(QUOTED_LINES)..]
            .iter()
            .map(|line| format!("\n  | {line}"))
            .collect();
        format!("; its log {} ends with:{quoted}", self.log.display())
    }
}

fn signal_group(group: Pid, signal: Signal) -> Result<()> {
    match killpg(group, signal) {
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("cannot send {signal} to process group {group}")),
    }
}

/// Process ids with their start times: an id alone may belong to a stranger by now.
#[derive(Debug)]
pub struct ChildrenFile {
    path: PathBuf,
}

/// A process as the kernel tells it apart from a later one with the same id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// Process id.
    pub pid: i32,
    /// When it started, in clock ticks since boot (field 22 of /proc/PID/stat).
    pub start_time: u64,
}

impl ProcessIdentity {
    /// The identity of the process `pid`, if it runs. A zombie does not run.
    pub fn of(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The second field is the program's name in parentheses and may itself hold spaces and parentheses.
        let fields: Vec<&str> = stat.get(stat.rfind(')')? + 1..)?.split_whitespace().collect();
        let (state, start_time) = (fields.first()?, fields.get(19)?.parse().ok()?);
        (*state != "Z").then_some(Self { pid, start_time })
    }

    /// Whether this very process still runs.
    pub fn runs(&self) -> bool {
        Self::of(self.pid) == Some(*self)
    }

    /// Sends `signal` to it if it still runs.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        if !self.runs() {
            return Ok(());
        }
        match nix::sys::signal::kill(Pid::from_raw(self.pid), signal) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(error) => Err(error).with_context(|| format!("cannot send {signal} to process {}", self.pid)),
        }
    }

    /// Waits until it is gone; false if it still runs after `limit`.
    pub async fn gone_within(&self, limit: Duration) -> bool {
        let gone = async {
            while self.runs() {
                time::sleep(POLL_INTERVAL).await;
            }
        };
        time::timeout(limit, gone).await.is_ok()
    }
}

impl ChildrenFile {
    /// The file at `path`, which need not exist.
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    fn record(&self, name: &str, pid: Pid) -> Result<()> {
        let Some(identity) = ProcessIdentity::of(pid.as_raw()) else { return Ok(()) };
        let mut children = self.read()?;
        children.insert(name.to_owned(), identity);
        let text = serde_json::to_string_pretty(&children)?;
        ServerUser::Myself.write_private_file(&self.path, &text, 0o600)
    }

    fn read(&self) -> Result<BTreeMap<String, ProcessIdentity>> {
        match fs::read_to_string(&self.path) {
            Ok(text) => serde_json::from_str(&text)
                .with_context(|| format!("{} is not what `darkroom up` writes", self.path.display())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(BTreeMap::new()),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", self.path.display())),
        }
    }

    /// Ends what an earlier, killed `darkroom up` left running, then forgets it. Returns the names of what was ended.
    pub async fn clear_away_stale(&self, grace: Duration) -> Result<Vec<String>> {
        let stale: Vec<_> = self.read()?.into_iter().filter(|(_, identity)| identity.runs()).collect();
        for (_, identity) in &stale {
            signal_group(Pid::from_raw(identity.pid), Signal::SIGTERM)?;
        }
        for (name, identity) in &stale {
            if !identity.gone_within(grace).await {
                warn!(
                    server = name,
                    pid = identity.pid,
                    "{name} of an earlier run does not stop; killing it"
                );
                signal_group(Pid::from_raw(identity.pid), Signal::SIGKILL)?;
                identity.gone_within(grace).await;
            }
        }
        self.forget()?;
        Ok(stale.into_iter().map(|(name, _)| name).collect())
    }

    /// Removes the file, when all children are gone.
    pub fn forget(&self) -> Result<()> {
        match fs::remove_file(&self.path) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error).with_context(|| format!("cannot remove {}", self.path.display())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sleeper(folder: &Path, script: &str) -> (ServerProcess, ChildrenFile) {
        let children = ChildrenFile::new(folder.join("children.json"));
        let mut command = ServerUser::Myself.command("/bin/sh", Signal::SIGKILL);
        command.arg("-c").arg(script);
        let process =
            ServerProcess::spawn("sleeper", command, Signal::SIGTERM, &folder.join("log"), &children)
                .unwrap();
        (process, children)
    }

    #[tokio::test]
    async fn a_server_that_ends_early_is_an_error_with_its_last_words() {
        let folder = tempfile::tempdir().unwrap();
        let (mut process, _) = sleeper(folder.path(), "echo cannot bind; exit 3");
        let error = process.wait_until_ready(Duration::from_secs(20), async || false).await.unwrap_err();
        let text = error.to_string();
        assert!(text.contains("sleeper ended before it was ready (exit status: 3)"), "{text}");
        assert!(text.contains("| cannot bind"), "{text}");
    }

    #[tokio::test]
    async fn a_stubborn_group_is_killed() {
        let folder = tempfile::tempdir().unwrap();
        let (mut process, _) = sleeper(folder.path(), "trap '' TERM; echo up; sleep 1000 & wait; sleep 1000");
        let log = folder.path().join("log");
        process
            .wait_until_ready(Duration::from_secs(20), async || {
                fs::read_to_string(&log).unwrap().contains("up")
            })
            .await
            .unwrap();
        let identity = ProcessIdentity::of(process.pid()).unwrap();
        process.stop(Duration::from_millis(200)).await.unwrap();
        assert!(!identity.runs());
    }

    #[tokio::test]
    async fn what_a_killed_run_left_is_cleared_away() {
        let folder = tempfile::tempdir().unwrap();
        let (mut process, children) = sleeper(folder.path(), "sleep 1000");
        // Reaps the child as `init` would; otherwise it stays a zombie of this very test process.
        let reaper = tokio::spawn(async move { process.exited().await });
        assert_eq!(children.clear_away_stale(Duration::from_secs(20)).await.unwrap(), ["sleeper"]);
        reaper.await.unwrap().unwrap();
        assert_eq!(children.clear_away_stale(Duration::from_secs(1)).await.unwrap(), Vec::<String>::new());
    }

    #[test]
    fn this_process_runs_and_one_with_another_start_time_does_not() {
        let me = ProcessIdentity::of(i32::try_from(std::process::id()).unwrap()).unwrap();
        assert!(me.runs());
        assert!(!ProcessIdentity { start_time: me.start_time + 1, ..me }.runs());
    }
}
