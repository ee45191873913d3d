//! A folder with a local stack in it, and the program run as people run it.
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use scheduler::local_stack::server_process::ProcessIdentity;
use serde_json::{Value, json};
use tokio::time;

/// Starting and stopping servers on two cores that also compile something takes its time.
const PATIENCE: Duration = Duration::from_secs(240);

/// Asks until the answer is yes.
pub async fn eventually(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let started = Instant::now();
    while !is_so().await {
        assert!(started.elapsed() < PATIENCE, "waited in vain until {what}");
        time::sleep(Duration::from_millis(50)).await;
    }
}

/// What a command printed, and how it ended.
#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    pub fn success(self) -> Self {
        assert_eq!(self.code, 0, "{self:?}");
        self
    }

    pub fn success_json(self) -> Value {
        let ran = self.success();
        let last = ran.stdout.lines().last().unwrap_or_else(|| panic!("no output: {ran:?}"));
        serde_json::from_str(last).unwrap_or_else(|error| panic!("{error}: {ran:?}"))
    }
}

/// A folder that goes when the test ends.
pub struct Folder(tempfile::TempDir);

impl Folder {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        // Root's servers run as another user, who has to get in.
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        Self(folder)
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn data_dir(&self) -> PathBuf {
        self.path().join("data")
    }

    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path
    }

    /// The smallest folder that `models add` takes for a model.
    pub fn write_model(&self) -> PathBuf {
        let write = |path: &str, value: Value| self.write(&format!("model/{path}"), &value.to_string());
        write(
            "model_index.json",
            json!({"_class_name": "StableDiffusionPipeline", "safety_checker": [null, null]}),
        );
        write("unet/config.json", json!({"sample_size": 16}));
        write("vae/config.json", json!({"block_out_channels": [1, 1, 1, 1]}));
        write("scheduler/scheduler_config.json", json!({"_class_name": "PNDMScheduler"}));
        write("tokenizer/vocab.json", json!({}));
        for component in ["unet", "vae", "text_encoder"] {
            write(&format!("{component}/model.safetensors"), json!("weights"));
        }
        self.path().join("model")
    }

    /// The program, with this folder's stack and nothing of ours that could name another.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_darkroom"));
        for name in
            ["DATABASE_URL", "AMQP_URL", "S3_BUCKET", "AWS_ENDPOINT_URL", "DARKROOM_MODEL", "DARKROOM_LOG"]
        {
            command.env_remove(name);
        }
        command.args(arguments).arg("--data-dir").arg(self.data_dir());
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Ran {
        let output = self.command(arguments).stdin(Stdio::null()).output().unwrap();
        Ran {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// The stack's child processes as they run now.
    pub fn children(&self) -> Vec<ProcessIdentity> {
        self.children_by_name().into_values().collect()
    }

    /// One child process of the stack as it runs now.
    pub fn child(&self, name: &str) -> ProcessIdentity {
        self.children_by_name()[name]
    }

    fn children_by_name(&self) -> BTreeMap<String, ProcessIdentity> {
        serde_json::from_str(&fs::read_to_string(self.data_dir().join("children.json")).unwrap()).unwrap()
    }

    /// Deletes a queue with all its messages, behind everyone's back.
    pub async fn delete_queue(&self, amqp_url: &str, name: &str) {
        let connection =
            lapin::Connection::connect(amqp_url, lapin::ConnectionProperties::default()).await.unwrap();
        let amqp_channel = connection.create_channel().await.unwrap();
        amqp_channel.queue_delete(name.into(), lapin::options::QueueDeleteOptions::default()).await.unwrap();
        connection.close(200, "OK".into()).await.unwrap();
    }
}

/// A running `darkroom up`.
pub struct Up {
    child: Child,
    /// The line of JSON that it printed when it was ready.
    pub description: Value,
    /// Kept open, so that the program can go on printing.
    _stdout: BufReader<ChildStdout>,
}

impl Up {
    /// Starts it and waits until it is ready.
    pub fn start(folder: &Folder, arguments: &[&str]) -> Self {
        let mut command = folder.command(&[&["up"], arguments].concat());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        let description = serde_json::from_str(&line)
            .unwrap_or_else(|error| panic!("`darkroom up` did not come up ({error}): {line:?}"));
        Self { child, description, _stdout: stdout }
    }

    pub async fn stop_by_stdin(mut self) {
        drop(self.child.stdin.take());
        self.ended().await;
    }

    pub async fn stop_by_signal(self) {
        ProcessIdentity::of(i32::try_from(self.child.id()).unwrap())
            .unwrap()
            .signal(Signal::SIGTERM)
            .unwrap();
        self.ended().await;
    }

    /// Waits until it has ended well.
    pub async fn ended(mut self) {
        let child = &mut self.child;
        eventually("`darkroom up` has ended", async || child.try_wait().unwrap().is_some()).await;
        let status = self.child.wait().unwrap();
        assert!(status.success(), "`darkroom up` ended with {status}");
    }

    pub async fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        // Ended already in a test that passes; in one that fails, the servers go with it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
