//! `darkroom down`
use std::time::Duration;

use anyhow::{Result, bail};
use nix::sys::signal::Signal;
use serde_json::json;

use crate::config::Settings;
use crate::local_stack::data_dir;
use crate::local_stack::server_process::ProcessIdentity;
use crate::terminal::Terminal;

/// Workers may finish what they draw, and three servers write everything down.
const LIMIT: Duration = Duration::from_secs(180);

pub(super) async fn run(settings: &Settings, terminal: Terminal) -> Result<()> {
    let path = data_dir::pid_file(settings.data_dir());
    let running = match std::fs::read_to_string(&path) {
        Ok(text) => serde_json::from_str::<ProcessIdentity>(&text).ok().filter(ProcessIdentity::runs),
        Err(_) => None,
    };
    let Some(running) = running else {
        let data = json!({ "stopped": false, "data_dir": settings.data_dir() });
        return terminal
            .show(&data, || format!("nothing runs with its data in {}", settings.data_dir().display()));
    };
    running.signal(Signal::SIGTERM)?;
    if !running.gone_within(LIMIT).await {
        bail!("process {} did not stop within {} s", running.pid, LIMIT.as_secs());
    }
    let data = json!({ "stopped": true, "data_dir": settings.data_dir() });
    terminal.show(&data, || format!("stopped; the data stays in {}", settings.data_dir().display()))
}
