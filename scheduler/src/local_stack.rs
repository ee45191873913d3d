//! The servers that a fleet needs, on one machine: RabbitMQ and PostgreSQL as child processes from Debian's packages,
//! S3 inside this process. All bound to loopback, all data below one folder, nothing left behind.
//!
//! A server that ends while the stack runs is started again, because that is what a real installation does and what
//! the fleet has to live with; one that keeps ending stops the stack.
pub mod credentials;
pub mod data_dir;
pub mod env_file;
mod ports;
mod postgres;
mod rabbitmq;
mod s3;
pub mod server_process;
pub mod server_user;
pub mod workers;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use tracing::warn;

use credentials::{Credentials, NAME};
use data_dir::DataDir;
use env_file::Endpoints;
use ports::Ports;
use postgres::Postgres;
use rabbitmq::RabbitMq;
use s3::S3Server;
use secrecy::{ExposeSecret, SecretString};
use server_process::{ChildrenFile, ServerProcess};

/// Time for a server to write everything down before it is killed. RabbitMQ takes 2 to 5 s.
const STOP_GRACE: Duration = Duration::from_secs(30);

/// A server may end this often...
const MAX_RESTARTS: usize = 5;
/// ...within this time before we give up.
const RESTART_WINDOW: Duration = Duration::from_secs(60);

/// Running servers.
#[derive(Debug)]
pub struct LocalStack {
    data_dir: DataDir,
    ports: Ports,
    credentials: Credentials,
    endpoints: Endpoints,
    children: ChildrenFile,
    postgres_program: Postgres,
    rabbitmq_program: RabbitMq,
    postgres: ServerProcess,
    port_mapper: ServerProcess,
    rabbitmq: ServerProcess,
    s3: S3Server,
    /// When servers were started again, newest last.
    restarts: VecDeque<Instant>,
}

/// A server that answered for the first time.
#[derive(Clone, Debug)]
pub struct ServerReady {
    /// What people call it.
    pub name: &'static str,
    /// Its port on 127.0.0.1.
    pub port: u16,
    /// From its start to its first answer.
    pub took: Duration,
}

/// All there is to know about the running stack, for `--json`. Holds passwords.
#[derive(Clone, Debug, Serialize)]
pub struct StackDescription {
    /// The data folder.
    pub data_dir: String,
    /// The file with the shell exports.
    pub env_file: String,
    /// `postgres://…`.
    pub database_url: String,
    /// `amqp://…`.
    pub amqp_url: String,
    /// RabbitMQ's management interface, `http://…`.
    pub management_url: String,
    /// The bucket.
    pub s3_bucket: String,
    /// The S3 server, `http://…`.
    pub aws_endpoint_url: String,
    /// The region to sign for.
    pub aws_region: String,
    /// The S3 access key id.
    pub aws_access_key_id: String,
    /// The S3 secret access key.
    pub aws_secret_access_key: String,
    /// The folder in which the bucket's pictures lie as plain files.
    pub s3_folder: String,
    /// PostgreSQL's process id now; it changes when the server is started again.
    pub postgres_pid: i32,
    /// RabbitMQ's process id now.
    pub rabbitmq_pid: i32,
}

impl LocalStack {
    /// Starts the servers on the data in `data_dir`, clearing away first what a killed run left, and tells `ready`
    /// of each as it answers.
    ///
    /// # Errors
    /// If a server is not installed or does not come up; those that did are killed again.
    pub async fn start(data_dir: DataDir, ready: impl Fn(ServerReady)) -> Result<Self> {
        let children = ChildrenFile::new(data_dir.children());
        for name in children.clear_away_stale(STOP_GRACE).await? {
            warn!(server = name, "Ended {name}, which an earlier run had left");
        }
        let ports = Ports::remembered_or_chosen(&data_dir.ports())?;
        let credentials = Credentials::remembered_or_made(&data_dir.credentials())?;
        let (aws_endpoint_url, aws_region) = Endpoints::local_endpoint(ports.s3);
        let endpoints = Endpoints {
            database_url: credentials.database_url(ports.postgres),
            amqp_url: credentials.amqp_url(ports.amqp),
            s3_bucket: NAME.to_owned(),
            aws_endpoint_url,
            aws_region,
            aws_access_key_id: credentials.s3_access_key_id.clone(),
            aws_secret_access_key: credentials.s3_secret_access_key.clone(),
        };
        let postgres_program = Postgres::find(&data_dir, ports.postgres)?;
        let rabbitmq_program = RabbitMq::find(&data_dir, ports)?;

        let started = Instant::now();
        let s3 = S3Server::start(&data_dir.objects(), ports.s3, &credentials).await?;
        ready(ServerReady { name: "S3", port: ports.s3, took: started.elapsed() });
        // Both at once: each leaves a core idle half of the time.
        let start_postgres = async {
            let started = Instant::now();
            postgres_program.initialize(&credentials).await?;
            let process = postgres_program.start(&children).await?;
            ready(ServerReady { name: "PostgreSQL", port: ports.postgres, took: started.elapsed() });
            anyhow::Ok(process)
        };
        let start_rabbitmq = async {
            let started = Instant::now();
            rabbitmq_program.configure(&credentials)?;
            let port_mapper = rabbitmq_program.start_port_mapper(&children).await?;
            let process = rabbitmq_program.start(&endpoints.amqp_url, &children).await?;
            ready(ServerReady { name: "RabbitMQ", port: ports.amqp, took: started.elapsed() });
            anyhow::Ok((port_mapper, process))
        };
        let (postgres, (port_mapper, rabbitmq)) = tokio::try_join!(start_postgres, start_rabbitmq)?;
        Ok(Self {
            data_dir,
            ports,
            credentials,
            endpoints,
            children,
            postgres_program,
            rabbitmq_program,
            postgres,
            port_mapper,
            rabbitmq,
            s3,
            restarts: VecDeque::new(),
        })
    }

    /// How to connect.
    pub fn endpoints(&self) -> &Endpoints {
        &self.endpoints
    }

    /// The data folder.
    pub fn data_dir(&self) -> &DataDir {
        &self.data_dir
    }

    /// Where to write down further children, so that a later start clears them away too.
    pub fn children(&self) -> &ChildrenFile {
        &self.children
    }

    /// RabbitMQ's management interface, with name and password.
    pub fn management_url(&self) -> SecretString {
        self.credentials.management_url(self.ports.management)
    }

    /// Everything, secrets included.
    pub fn describe(&self) -> StackDescription {
        let path = |path: std::path::PathBuf| path.display().to_string();
        StackDescription {
            data_dir: path(self.data_dir.root().to_owned()),
            env_file: path(data_dir::env_file(self.data_dir.root())),
            database_url: self.endpoints.database_url.expose_secret().to_owned(),
            amqp_url: self.endpoints.amqp_url.expose_secret().to_owned(),
            management_url: self.management_url().expose_secret().to_owned(),
            s3_bucket: self.endpoints.s3_bucket.clone(),
            aws_endpoint_url: self.endpoints.aws_endpoint_url.clone(),
            aws_region: self.endpoints.aws_region.clone(),
            aws_access_key_id: self.endpoints.aws_access_key_id.clone(),
            aws_secret_access_key: self.endpoints.aws_secret_access_key.expose_secret().to_owned(),
            s3_folder: path(self.data_dir.objects()),
            postgres_pid: self.postgres.pid(),
            rabbitmq_pid: self.rabbitmq.pid(),
        }
    }

    /// Starts servers again when they end. Returns only with an error: when one keeps ending or does not come up.
    ///
    /// Run it on the main thread; see [`server_user::ServerUser::command`].
    pub async fn watch_over(&mut self) -> Result<std::convert::Infallible> {
        enum Ended {
            Postgres,
            PortMapper,
            RabbitMq,
            S3,
        }
        loop {
            let ended = tokio::select! {
                status = self.postgres.exited() => (Ended::Postgres, "postgres", status?.to_string()),
                status = self.port_mapper.exited() => (Ended::PortMapper, "epmd", status?.to_string()),
                status = self.rabbitmq.exited() => (Ended::RabbitMq, "rabbitmq", status?.to_string()),
                () = self.s3.exited() => (Ended::S3, "s3", "its task ended".to_owned()),
            };
            let (server, name, status) = ended;
            warn!(server = name, status, "{name} ended; starting it again");
            self.note_restart(name)?;
            match server {
                Ended::Postgres => self.postgres = self.postgres_program.start(&self.children).await?,
                Ended::PortMapper => {
                    self.port_mapper = self.rabbitmq_program.start_port_mapper(&self.children).await?;
                }
                Ended::RabbitMq => {
                    let url = &self.endpoints.amqp_url;
                    self.rabbitmq = self.rabbitmq_program.start(url, &self.children).await?;
                }
                Ended::S3 => {
                    self.s3 =
                        S3Server::start(&self.data_dir.objects(), self.ports.s3, &self.credentials).await?;
                }
            }
            warn!(server = name, "{name} is back");
        }
    }

    fn note_restart(&mut self, name: &str) -> Result<()> {
        let now = Instant::now();
        self.restarts.retain(|&restart| now.duration_since(restart) < RESTART_WINDOW);
        if self.restarts.len() >= MAX_RESTARTS {
            bail!(
                "{name} ended again after {MAX_RESTARTS} restarts within {} s\nhint: its log is in {}",
                RESTART_WINDOW.as_secs(),
                self.data_dir.logs().display()
            );
        }
        self.restarts.push_back(now);
        Ok(())
    }

    /// Stops the servers: the broker first, which others do not need, then the rest.
    ///
    /// # Errors
    /// If one could not be stopped; the others are stopped all the same.
    pub async fn stop(self) -> Result<()> {
        let rabbitmq = self.rabbitmq.stop(STOP_GRACE).await.context("cannot stop RabbitMQ");
        let port_mapper = self.port_mapper.stop(STOP_GRACE).await.context("cannot stop epmd");
        let postgres = self.postgres.stop(STOP_GRACE).await.context("cannot stop PostgreSQL");
        let s3 = self.s3.stop().await;
        rabbitmq.and(port_mapper).and(postgres).and(s3)?;
        self.children.forget()
    }
}
