//! The local PostgreSQL: initialized once with one user and one database, bound to loopback, asking for a password.
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use secrecy::ExposeSecret;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use super::credentials::{Credentials, NAME};
use super::data_dir::DataDir;
use super::server_process::{ChildrenFile, ServerProcess};

/// Where Debian installs each major version.
const INSTALLATIONS: &str = "/usr/lib/postgresql";

/// A crash recovery of a large batch's write-ahead log takes a while; a fresh start takes half a second.
const READY_LIMIT: Duration = Duration::from_secs(120);

/// Room for several workers and many tests, each with a small pool.
const MAX_CONNECTIONS: u32 = 400;

/// The programs and the data folder of the local PostgreSQL.
#[derive(Debug)]
pub struct Postgres {
    programs: PathBuf,
    data_dir: DataDir,
    port: u16,
}

impl Postgres {
    /// Finds the newest installed PostgreSQL, or the one that made the data folder.
    pub fn find(data_dir: &DataDir, port: u16) -> Result<Self> {
        let mut versions = installed(Path::new(INSTALLATIONS));
        versions.sort();
        let Some(newest) = versions.last() else {
            bail!(
                "PostgreSQL is not installed: no {INSTALLATIONS}/*/bin/postgres\nhint: run `make deps`, or \
                 `apt-get install postgresql` (its own service need not run)"
            )
        };
        let made_by = fs::read_to_string(data_dir.postgres().join("data/PG_VERSION")).ok();
        let version = match made_by.as_deref().map(str::trim).map(str::parse::<u32>) {
            None => newest,
            Some(Ok(made_by)) if versions.contains(&made_by) => &made_by.clone(),
            Some(made_by) => bail!(
                "the database in {} was made by PostgreSQL {}, but only {versions:?} is installed\nhint: install that \
                 version, or choose another folder by --data-dir",
                data_dir.postgres().display(),
                made_by.map_or_else(|_| "of an unknown version".to_owned(), |version| version.to_string())
            ),
        };
        let programs = Path::new(INSTALLATIONS).join(version.to_string()).join("bin");
        Ok(Self { programs, data_dir: data_dir.clone(), port })
    }

    /// Makes the database cluster if there is none. It is built beside its place and then moved there, so that a start
    /// that was killed half-way leaves nothing that looks finished. Returns whether it was made now.
    pub async fn initialize(&self, credentials: &Credentials) -> Result<bool> {
        let user = self.data_dir.server_user;
        let folder = self.data_dir.postgres();
        let unfinished = folder.join("data.unfinished");
        if folder.join("data").exists() {
            return Ok(false);
        }
        if unfinished.exists() {
            fs::remove_dir_all(&unfinished).context("cannot remove an unfinished database cluster")?;
        }
        let password_file = folder.join("password");
        user.write_private_file(&password_file, credentials.postgres_password.expose_secret(), 0o600)?;
        let mut initdb = user.command(self.programs.join("initdb"), Signal::SIGKILL);
        initdb.arg("-D").arg(&unfinished).args(["-E", "UTF8", "--locale=C.UTF-8", "-A", "scram-sha-256"]);
        initdb.args(["-U", NAME, "--no-instructions"]).arg("--pwfile").arg(&password_file);
        let made = complete(initdb, "").await;
        fs::remove_file(&password_file)?;
        made.context("initdb failed")?;
        // The single-user server needs neither a port nor a password, and is done when it returns.
        let mut single = user.command(self.programs.join("postgres"), Signal::SIGKILL);
        single.arg("--single").arg("-D").arg(&unfinished).arg("postgres");
        complete(single, &format!("CREATE DATABASE {NAME};\n"))
            .await
            .context("cannot create the database")?;
        fs::rename(&unfinished, folder.join("data"))
            .context("cannot move the new database cluster in place")?;
        Ok(true)
    }

    /// Starts the server and waits until it accepts connections.
    pub async fn start(&self, children: &ChildrenFile) -> Result<ServerProcess> {
        // SIGINT is PostgreSQL's "fast" shutdown: open sessions are ended, nothing committed is lost.
        let mut command = self.data_dir.server_user.command(self.programs.join("postgres"), Signal::SIGINT);
        command.arg("-D").arg(self.data_dir.postgres().join("data"));
        for setting in [
            "listen_addresses=127.0.0.1".to_owned(),
            format!("port={}", self.port),
            // A socket's path may have 107 bytes only, and a data folder's can be longer.
            "unix_socket_directories=".to_owned(),
            format!("max_connections={MAX_CONNECTIONS}"),
        ] {
            command.args(["-c", &setting]);
        }
        let log = self.data_dir.logs().join("postgres.log");
        let mut process = ServerProcess::spawn("postgres", command, Signal::SIGINT, &log, children)?;
        let port = self.port.to_string();
        process
            .wait_until_ready(READY_LIMIT, async || {
                let mut question = Command::new(self.programs.join("pg_isready"));
                question.args(["-q", "-h", "127.0.0.1", "-p", &port, "-U", NAME, "-d", NAME]);
                question.status().await.is_ok_and(|status| status.success())
            })
            .await?;
        Ok(process)
    }
}

/// The major versions below `folder` that have a server.
fn installed(folder: &Path) -> Vec<u32> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.path().join("bin/postgres").exists())
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

/// Runs `command` to its end with `input`; an error with its output if it fails.
async fn complete(mut command: Command, input: &str) -> Result<()> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes()).await?;
    }
    let output = child.wait_with_output().await?;
    // `postgres --single` reports a failed statement on standard error and still exits with 0.
    let errors = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() || errors.contains("ERROR:") || errors.contains("FATAL:") {
        bail!("{}: {}{}", output.status, String::from_utf8_lossy(&output.stdout), errors);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_with_a_server_are_found() {
        let folder = tempfile::tempdir().unwrap();
        for version in ["9", "15", "17"] {
            fs::create_dir_all(folder.path().join(version).join("bin")).unwrap();
        }
        for version in ["9", "15"] {
            fs::write(folder.path().join(version).join("bin/postgres"), "").unwrap();
        }
        let mut versions = installed(folder.path());
        versions.sort();
        assert_eq!(versions, [9, 15]);
        assert_eq!(installed(&folder.path().join("missing")), Vec::<u32>::new());
    }
}
