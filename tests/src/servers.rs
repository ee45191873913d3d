//! A set of real servers: `darkroom up --servers-only` as a child process, in a folder of its own, on free ports.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Deserialize;
use sqlx::{Connection, PgConnection};

use crate::process::binary;
use crate::waiting::eventually;

/// How long a broker that is up takes at most to answer a handshake.
const HANDSHAKE: Duration = Duration::from_secs(3);

/// Where the servers answer, as `darkroom up --servers-only` prints it in one line.
#[derive(Debug, Clone, Deserialize)]
pub struct Addresses {
    /// Postgres, as a superuser of this private cluster.
    pub database_url: String,
    /// RabbitMQ, the default virtual host.
    pub amqp_url: String,
    /// The S3 endpoint.
    pub aws_endpoint_url: String,
    /// The bucket.
    pub s3_bucket: String,
    /// Credentials of the S3 server.
    pub aws_access_key_id: String,
    /// Their secret half.
    pub aws_secret_access_key: String,
    /// Any region will do, but the SDK asks for one.
    pub aws_region: String,
}

/// Running servers; the last owner stops them.
pub struct Servers {
    addresses: Addresses,
    child: Mutex<Child>,
    data_dir: PathBuf,
    _folder: tempfile::TempDir,
}

impl Servers {
    /// The set that all tests of this process share. It lives as long as some test holds it.
    pub fn shared() -> Arc<Servers> {
        static SHARED: OnceLock<Mutex<Weak<Servers>>> = OnceLock::new();
        let mut shared =
            SHARED.get_or_init(Mutex::default).lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        shared.upgrade().unwrap_or_else(|| {
            let servers = Arc::new(Servers::start());
            *shared = Arc::downgrade(&servers);
            servers
        })
    }

    /// A set of this test's own, to be broken.
    pub fn start() -> Servers {
        // Postgres and RabbitMQ run unprivileged, so every folder above their data has to let them pass.
        let folder = tempfile::Builder::new()
            .prefix("darkroom-test-")
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .tempdir()
            .expect("a temporary folder");
        let data_dir = folder.path().join("stack");
        // A write beyond a limit that a test sets is to fail and not to kill (`full_disk.rs`).
        let mut child = Command::new("sh")
            .args(["-c", "trap '' XFSZ; exec \"$0\" \"$@\""])
            .arg(binary("darkroom"))
            .args(["up", "--servers-only", "--data-dir"])
            .arg(&data_dir)
            .env_remove("DATABASE_URL")
            .env_remove("AMQP_URL")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("`darkroom up` starts");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("piped"))
            .read_line(&mut line)
            .expect("its output can be read");
        let addresses = serde_json::from_str(&line).unwrap_or_else(|error| {
            let mut log = String::new();
            let _ = child.kill();
            let _ = child.stderr.take().expect("piped").read_to_string(&mut log);
            panic!("`darkroom up --servers-only` printed {line:?} ({error}); its log:\n{log}")
        });
        // Its log must not fill the pipe and block it.
        let mut stderr = child.stderr.take().expect("piped");
        std::thread::spawn(move || std::io::copy(&mut stderr, &mut std::io::sink()));
        Servers { addresses, child: Mutex::new(child), data_dir, _folder: folder }
    }

    /// Where they answer.
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// The process of `darkroom up`, which is the S3 server too.
    pub fn id(&self) -> u32 {
        self.child.lock().unwrap_or_else(std::sync::PoisonError::into_inner).id()
    }

    /// The folder with all their data.
    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    /// Kills the broker's process, as a crashed node would go; the local stack starts it again on the same port
    /// with the same data. Returns when it answers again.
    pub async fn restart_broker(&self, deadline: Duration) {
        let pid = self.broker_pid().expect("the broker runs");
        kill(pid, Signal::SIGKILL).expect("the broker can be killed");
        eventually(
            "another broker process",
            deadline,
            || async { self.broker_pid() },
            |now| now.is_some_and(|now| now != pid),
        )
        .await;
        self.broker_answers(deadline).await;
    }

    /// Waits until the broker takes a connection.
    pub async fn broker_answers(&self, deadline: Duration) {
        let uri = self.addresses.amqp_url.clone();
        eventually(
            "the broker to answer again",
            deadline,
            || async {
                // A broker that is still booting may take the connection and never answer the handshake.
                let connecting = lapin::Connection::connect(&uri, lapin::ConnectionProperties::default());
                matches!(tokio::time::timeout(HANDSHAKE, connecting).await, Ok(Ok(_)))
            },
            |answers| *answers,
        )
        .await;
    }

    /// Ends Postgres without a checkpoint or a goodbye ("immediate" shutdown), as a crash would; the local stack starts it
    /// again, and it recovers from its log. Returns when it answers again.
    pub async fn restart_postgres(&self, deadline: Duration) {
        let pid = self.postgres_pid().expect("Postgres runs");
        kill(pid, Signal::SIGQUIT).expect("Postgres can be killed");
        let url = &self.addresses.database_url;
        eventually(
            "another Postgres that answers",
            deadline,
            || async {
                let another = self.postgres_pid().is_some_and(|now| now != pid);
                another
                    && matches!(tokio::time::timeout(HANDSHAKE, PgConnection::connect(url)).await, Ok(Ok(_)))
            },
            |answers| *answers,
        )
        .await;
    }

    /// The server process of Postgres, by its own pid file; `None` while there is none alive.
    pub fn postgres_pid(&self) -> Option<Pid> {
        let file = self.data_dir.join("postgres").join("data").join("postmaster.pid");
        let text = std::fs::read_to_string(file).ok()?;
        let pid = Pid::from_raw(text.lines().next()?.trim().parse().ok()?);
        kill(pid, None).ok().map(|()| pid)
    }

    /// Runs `rabbitmqctl ARGUMENTS` on the broker.
    pub fn rabbitmqctl(&self, arguments: &[&str]) {
        let output = self.run_rabbitmqctl(arguments);
        assert!(output.status.success(), "rabbitmqctl {arguments:?}: {}", both(&output));
    }

    /// Stops the Raft server of a quorum queue of the default virtual host, and leaves everything else of the queue.
    pub fn stop_queue_process(&self, queue: &str) {
        self.rabbitmqctl(&[
            "eval",
            &format!("ok = ra:stop_server(quorum_queues, {{'%2F_{queue}', node()}})."),
        ]);
    }

    /// What `rabbitmqctl ARGUMENTS` prints, whether it succeeds or not.
    pub fn try_rabbitmqctl(&self, arguments: &[&str]) -> String {
        both(&self.run_rabbitmqctl(arguments))
    }

    fn run_rabbitmqctl(&self, arguments: &[&str]) -> Output {
        let ports = std::fs::read_to_string(self.data_dir.join("ports.json")).expect("the stack's ports");
        let ports: serde_json::Value = serde_json::from_str(&ports).expect("JSON");
        Command::new("/usr/lib/rabbitmq/bin/rabbitmqctl")
            .args(["--node", "darkroom@localhost"])
            .args(arguments)
            .env("HOME", self.data_dir.join("rabbitmq").join("home"))
            .env("ERL_EPMD_PORT", ports["epmd"].to_string())
            .output()
            .expect("rabbitmqctl can be run")
    }

    /// The broker's process, by the pid file that RabbitMQ itself writes; `None` while there is none alive.
    pub fn broker_pid(&self) -> Option<Pid> {
        let text = std::fs::read_to_string(self.data_dir.join("rabbitmq").join("pid")).ok()?;
        let pid = Pid::from_raw(text.trim().parse().ok()?);
        kill(pid, None).ok().map(|()| pid)
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        let child = self.child.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner());
        // SIGTERM and not SIGKILL: it has servers of its own to stop.
        let _ = kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM);
        let _ = child.wait();
    }
}

fn both(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}
