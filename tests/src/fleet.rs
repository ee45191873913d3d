//! One test's fleet: a database, a model name, and the verbs that people use.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use aws_sdk_s3::primitives::ByteStream;
use sqlx::postgres::{PgPool, PgPoolOptions};
use sqlx::{Executor, FromRow, Row};

use crate::process::{Process, binary};
use crate::servers::Servers;
use crate::waiting::eventually;

/// Who submits in these tests.
pub const PRINCIPAL: &str = "tester";

/// What there is to accept.
const LICENCE: &str = "The licence of a checkpoint of random numbers: do no harm with it.\n";

/// A fleet of its own database, model name and therefore queues.
pub struct Fleet {
    servers: Arc<Servers>,
    database_url: String,
    pool: PgPool,
    model: String,
    folder: tempfile::TempDir,
    started: AtomicUsize,
}

/// An image row, as the checks need it.
#[derive(Debug, Clone, PartialEq, FromRow)]
pub struct ImageRow {
    /// Its job's place in the batch.
    pub ordinal: i32,
    /// Where the object lies; none for a withheld picture.
    pub object_key: Option<String>,
    /// The object's digest in hex.
    pub sha256: Option<String>,
    /// The object's size.
    pub size_bytes: Option<i64>,
    /// What the safety checker saw, of a withheld picture too; none if there was no checker.
    pub concept_scores: Option<Vec<f32>>,
}

impl Fleet {
    /// A migrated database, the tiny checkpoint registered, its licence accepted by [`PRINCIPAL`].
    pub async fn new(servers: Arc<Servers>) -> Fleet {
        let fleet = Fleet::without_acceptance(servers).await;
        fleet.accept_licence(PRINCIPAL);
        fleet
    }

    /// The same with another checkpoint's folder.
    pub async fn with_checkpoint(servers: Arc<Servers>, checkpoint: &Path) -> Fleet {
        let fleet = Fleet::registered(servers, checkpoint).await;
        fleet.accept_licence(PRINCIPAL);
        fleet
    }

    /// The tiny checkpoint, but nobody has accepted anything yet.
    pub async fn without_acceptance(servers: Arc<Servers>) -> Fleet {
        Fleet::registered(servers, &checkpoint()).await
    }

    async fn registered(servers: Arc<Servers>, checkpoint: &Path) -> Fleet {
        let id = uuid::Uuid::new_v4().simple().to_string();
        let database = format!("fleet_{}", &id[..12]);
        let admin = PgPoolOptions::new()
            .max_connections(1)
            .connect(&servers.addresses().database_url)
            .await
            .expect("Postgres answers");
        admin.execute(format!("CREATE DATABASE {database}").as_str()).await.expect("a database can be made");
        admin.close().await;
        let mut url = servers.addresses().database_url.clone();
        let path = url.rfind('/').expect("a URL with a database");
        let query = url[path..].find('?').map(|at| url[path + at..].to_owned()).unwrap_or_default();
        url.truncate(path + 1);
        url.push_str(&database);
        url.push_str(&query);
        let folder = tempfile::tempdir().expect("a temporary folder");
        let pool = PgPoolOptions::new().max_connections(4).connect_lazy(&url).expect("a valid URL");
        let model = format!("tiny-{}", &id[..12]);
        let fleet = Fleet { servers, database_url: url, pool, model, folder, started: AtomicUsize::new(0) };
        fleet.darkroom(&["migrate"]).succeeded();
        let checkpoint = checkpoint.to_str().expect("a UTF-8 path");
        let licence = fleet.write("LICENCE", LICENCE);
        fleet
            .darkroom(&[
                "models",
                "add",
                &fleet.model,
                checkpoint,
                "--licence",
                licence.to_str().expect("UTF-8"),
            ])
            .succeeded();
        fleet
    }

    /// `principal` accepts the model's licence, naming the text by its digest.
    pub fn accept_licence(&self, principal: &str) {
        let digest = sha256_hex(LICENCE.as_bytes());
        self.darkroom(&["licence", "accept", &self.model, "--principal", principal, "--yes", &digest])
            .succeeded();
    }

    /// The name under which the tiny checkpoint is registered.
    pub fn model(&self) -> &str {
        &self.model
    }

    /// The servers it runs on.
    pub fn servers(&self) -> &Servers {
        &self.servers
    }

    /// Its database.
    pub fn pool(&self) -> &PgPool {
        &self.pool
    }

    /// How to connect to its database.
    pub fn database_url(&self) -> &str {
        &self.database_url
    }

    /// Where its scratch files and the logs of its processes lie.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A scratch file of this test.
    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::write(&path, text).expect("the scratch folder can be written");
        path
    }

    /// A command of the workspace that finds this fleet by its environment.
    pub fn command(&self, name: &str) -> Command {
        let addresses = self.servers.addresses();
        let mut command = Command::new(binary(name));
        command
            .current_dir(self.folder.path())
            .env("DATABASE_URL", &self.database_url)
            .env("AMQP_URL", &addresses.amqp_url)
            .env("S3_BUCKET", &addresses.s3_bucket)
            .env("AWS_ENDPOINT_URL", &addresses.aws_endpoint_url)
            .env("AWS_ACCESS_KEY_ID", &addresses.aws_access_key_id)
            .env("AWS_SECRET_ACCESS_KEY", &addresses.aws_secret_access_key)
            .env("AWS_REGION", &addresses.aws_region)
            .env_remove("RUST_LOG");
        command
    }

    /// Runs `darkroom ARGUMENTS` to its end.
    pub fn darkroom(&self, arguments: &[&str]) -> Finished {
        let output = self.command("darkroom").args(arguments).output().expect("`darkroom` can be run");
        Finished { arguments: arguments.join(" "), output }
    }

    /// Submits `prompts` (one a line) with `options`; the batch's id.
    pub fn submit(&self, prompts: &str, options: &[&str]) -> String {
        let finished = self.try_submit(prompts, options).succeeded();
        finished.json()["batch_id"].as_str().expect("`submit --json` names the batch").to_owned()
    }

    /// The same, whatever becomes of it.
    pub fn try_submit(&self, prompts: &str, options: &[&str]) -> Finished {
        let number = self.started.fetch_add(1, Ordering::Relaxed);
        let file = self.write(&format!("prompts-{number}.txt"), prompts);
        let mut arguments = vec!["submit", file.to_str().expect("UTF-8"), "--model", &self.model];
        arguments.extend(["--principal", PRINCIPAL, "--json"]);
        arguments.extend(options);
        self.darkroom(&arguments)
    }

    /// Starts `darkroom serve`.
    pub fn serve(&self) -> Process {
        let mut command = self.command("darkroom");
        command.arg("serve");
        self.spawn("darkroom serve", command)
    }

    /// Starts a worker that draws plain colours, `milliseconds` a picture.
    pub fn solid_color_worker(&self, milliseconds: u32, options: &[&str]) -> Process {
        self.solid_color_worker_with(&[], milliseconds, options)
    }

    /// Starts a worker with the real pipeline on the CPU.
    pub fn worker(&self, options: &[&str]) -> Process {
        let mut command = self.command("darkroom-worker");
        command.args(["run", "--model", &self.model, "--device", "cpu"]).args(options);
        self.spawn("darkroom-worker run", command)
    }

    /// Starts `darkroom serve OPTIONS` with settings of its own in its environment.
    pub fn serve_with(&self, env: &[(&str, String)], options: &[&str]) -> Process {
        let mut command = self.command("darkroom");
        command.arg("serve").args(options).envs(env.iter().map(|(name, value)| (name, value)));
        self.spawn("darkroom serve", command)
    }

    /// Starts a worker as [`solid_color_worker`](Self::solid_color_worker) does, with settings of its own in its
    /// environment.
    pub fn solid_color_worker_with(
        &self,
        env: &[(&str, String)],
        milliseconds: u32,
        options: &[&str],
    ) -> Process {
        let mut command = self.command("darkroom-worker");
        command.args(["run", "--model", &self.model, "--pipeline", "solid-color"]);
        command.args(["--solid-color-ms", &milliseconds.to_string()]).args(options);
        command.envs(env.iter().map(|(name, value)| (name, value)));
        self.spawn("darkroom-worker run", command)
    }

    /// Starts a command, its outputs kept in a log of its own.
    pub fn spawn(&self, name: &str, command: Command) -> Process {
        let number = self.started.fetch_add(1, Ordering::Relaxed);
        Process::spawn(
            &format!("{name} ({number})"),
            command,
            self.folder.path().join(format!("{number}.log")),
        )
    }

    /// One number from SQL.
    pub async fn count(&self, sql: &str) -> i64 {
        let row =
            sqlx::query(sql).fetch_one(&self.pool).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
        row.get(0)
    }

    /// How many jobs are in `state`.
    pub async fn jobs_in(&self, state: &str) -> i64 {
        self.count(&format!("SELECT count(*) FROM jobs WHERE state = '{state}'")).await
    }

    /// Waits until `sql` counts `expected`.
    pub async fn await_count(&self, what: &str, sql: &str, expected: i64, deadline: Duration) {
        eventually(what, deadline, || self.count(sql), |seen| *seen == expected).await;
    }

    /// Waits until every job is in a final state.
    pub async fn await_all_final(&self, deadline: Duration) {
        let open = "SELECT count(*) FROM jobs WHERE finalized_at IS NULL";
        self.await_count("all jobs to be final", open, 0, deadline).await;
    }

    /// Waits until some job is running.
    pub async fn await_running(&self, deadline: Duration) {
        let running = || self.jobs_in("running");
        eventually("a running job", deadline, running, |running| *running > 0).await;
    }

    /// The batch's image rows, in order.
    pub async fn images(&self, batch_id: &str) -> Vec<ImageRow> {
        sqlx::query_as(
            "SELECT ordinal, object_key, images.sha256::text AS sha256, size_bytes, concept_scores \
             FROM images JOIN jobs USING (job_id) WHERE jobs.batch_id = $1::uuid ORDER BY ordinal",
        )
        .bind(batch_id)
        .fetch_all(&self.pool)
        .await
        .expect("the image rows can be read")
    }

    /// The promises P2 and P3 for a batch of `expected` published pictures: one image row a job, each naming an
    /// object that exists with that digest and size, and no object that no row names beyond `orphans`.
    pub async fn assert_nothing_lost_nothing_twice(&self, batch_id: &str, expected: usize, orphans: usize) {
        let rows = self.images(batch_id).await;
        assert_eq!(rows.len(), expected, "one image row for each of {expected} jobs");
        let mut keys = Vec::new();
        for row in &rows {
            let key = row.object_key.clone().expect("nothing is withheld here");
            let bytes = self.object(&key).await;
            assert_eq!(Some(bytes.len() as i64), row.size_bytes, "{key}");
            assert_eq!(Some(sha256_hex(&bytes)), row.sha256, "{key}");
            keys.push(key);
        }
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), expected, "every job has an object of its own");
        let found = self.objects(&format!("v1/{batch_id}/")).await;
        assert!(
            found.len() <= expected + orphans,
            "{} objects for {expected} jobs; at most {orphans} may be orphans of a killed attempt",
            found.len()
        );
    }

    /// An object's bytes.
    pub async fn object(&self, key: &str) -> Vec<u8> {
        let bucket = &self.servers.addresses().s3_bucket;
        let object = self.s3().await.get_object().bucket(bucket).key(key).send().await;
        let body: ByteStream = object.unwrap_or_else(|error| panic!("{key}: {error:?}")).body;
        body.collect().await.expect("the object can be read").to_vec()
    }

    /// Puts an object where no worker has put one, or in place of a worker's.
    pub async fn put_object(&self, key: &str, bytes: &[u8]) {
        let bucket = &self.servers.addresses().s3_bucket;
        let body = ByteStream::from(bytes.to_vec());
        let put = self.s3().await.put_object().bucket(bucket).key(key).body(body).send().await;
        put.unwrap_or_else(|error| panic!("{key}: {error:?}"));
    }

    /// Removes an object behind everybody's back.
    pub async fn delete_object(&self, key: &str) {
        let bucket = &self.servers.addresses().s3_bucket;
        let deleted = self.s3().await.delete_object().bucket(bucket).key(key).send().await;
        deleted.unwrap_or_else(|error| panic!("{key}: {error:?}"));
    }

    /// The keys below `prefix`.
    pub async fn objects(&self, prefix: &str) -> Vec<String> {
        let s3 = self.s3().await;
        let bucket = &self.servers.addresses().s3_bucket;
        let mut pages = s3.list_objects_v2().bucket(bucket).prefix(prefix).into_paginator().send();
        let mut keys = Vec::new();
        while let Some(page) = pages.next().await {
            let page = page.expect("the bucket can be listed");
            keys.extend(page.contents().iter().filter_map(|object| object.key().map(str::to_owned)));
        }
        keys
    }

    /// A client of its bucket, with the SDK settings that the worker has.
    pub async fn s3(&self) -> aws_sdk_s3::Client {
        let addresses = self.servers.addresses();
        let credentials = aws_sdk_s3::config::Credentials::new(
            &addresses.aws_access_key_id,
            &addresses.aws_secret_access_key,
            None,
            None,
            "fleet-tests",
        );
        let config = aws_sdk_s3::Config::builder()
            .behavior_version_latest()
            .region(aws_sdk_s3::config::Region::new(addresses.aws_region.clone()))
            .endpoint_url(&addresses.aws_endpoint_url)
            .credentials_provider(credentials)
            .force_path_style(true)
            .build();
        aws_sdk_s3::Client::from_conf(config)
    }
}

/// A command that has ended.
pub struct Finished {
    arguments: String,
    output: Output,
}

impl Finished {
    /// Itself, if it succeeded.
    ///
    /// # Panics
    /// With both outputs, if it did not.
    pub fn succeeded(self) -> Finished {
        assert!(
            self.output.status.success(),
            "`darkroom {}`: {}\n{}",
            self.arguments,
            self.stdout(),
            self.stderr()
        );
        self
    }

    /// Its exit code; none when a signal ended it.
    pub fn code(&self) -> Option<i32> {
        self.output.status.code()
    }

    /// What it printed for machines and people.
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.output.stdout).into_owned()
    }

    /// What it said beside that.
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.output.stderr).into_owned()
    }

    /// Its standard output as JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout()).unwrap_or_else(|error| {
            panic!("`darkroom {}` printed {:?}: {error}", self.arguments, self.stdout())
        })
    }
}

/// The SHA-256 of `bytes` in hex.
pub fn sha256_hex(bytes: &[u8]) -> String {
    use sha2::Digest;
    hex::encode(sha2::Sha256::digest(bytes))
}

/// The tiny checkpoint of the golden files: the real layout, random weights.
pub fn checkpoint() -> PathBuf {
    let workspace =
        Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests crate lies in the workspace");
    workspace.join("worker/tests/golden/tiny")
}
