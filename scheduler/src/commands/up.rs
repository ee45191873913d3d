//! `darkroom up`: the whole fleet on one machine, until somebody stops it.
mod detached;

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use schema::PgCatalog;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::serve::{CONNECTIONS, stop_signal};
use crate::amqp::AmqpQueue;
use crate::cli::UpArgs;
use crate::config::{S3Settings, Settings};
use crate::local_stack::data_dir::{self, DataDir};
use crate::local_stack::server_process::ProcessIdentity;
use crate::local_stack::server_user::ServerUser;
use crate::local_stack::workers::{self, WorkerPlan, Workers};
use crate::local_stack::{LocalStack, ServerReady};
use crate::maintenance::{self, Bucket};
use crate::object_store::S3ObjectStore;
use crate::terminal::Terminal;

/// What runs in this process beside the servers.
struct Fleet {
    catalog: PgCatalog,
    queue: Arc<AmqpQueue>,
    loops: JoinHandle<()>,
    loops_shutdown: CancellationToken,
    workers: Workers,
}

pub(super) async fn run(arguments: UpArgs, settings: &Settings, terminal: Terminal) -> Result<()> {
    if arguments.detach {
        return detached::run(settings.data_dir(), terminal).await;
    }
    let plan = worker_plan(&arguments)?;
    let data_dir = DataDir::open(settings.data_dir())?;
    data_dir::link_from_here(data_dir.root());
    let files = RunFiles::write(&data_dir, arguments.ready_file.as_deref())?;

    // A stop that is asked for while the servers start is obeyed at once: dropping them kills them.
    let mut stop = std::pin::pin!(stop_asked(arguments.stop_with_stdin));
    let mut stack = tokio::select! {
        started = LocalStack::start(data_dir, |ready| tell(terminal, &ready)) => started?,
        stopped = &mut stop => return stopped,
    };
    let mut fleet = None;
    let ended = tokio::select! {
        stopped = &mut stop => stopped,
        failed = operate(&mut stack, &mut fleet, plan, &arguments, &files, terminal) => failed,
    };
    terminal.tell("stopping");
    let stopping = async {
        if let Some(fleet) = fleet {
            fleet.stop().await?;
        }
        stack.stop().await
    };
    // Asked a second time, we stop waiting: dropping the rest kills it.
    let stopped = tokio::select! {
        stopped = stopping => stopped,
        asked = stop_signal() => asked,
    };
    // Why it ended matters more than what went wrong at the end.
    ended.and(stopped)
}

/// Runs everything on the servers; ends only with an error.
async fn operate(
    stack: &mut LocalStack,
    fleet: &mut Option<Fleet>,
    plan: Option<WorkerPlan>,
    arguments: &UpArgs,
    files: &RunFiles,
    terminal: Terminal,
) -> Result<()> {
    stack.endpoints().write(&data_dir::env_file(stack.data_dir().root()))?;
    if let Some(plan) = plan {
        *fleet = Some(Fleet::start(stack, arguments, plan).await?);
    }
    files.announce()?;
    show(stack, arguments, terminal)?;
    tokio::select! {
        failed = stack.watch_over() => failed.map(|never| match never {}),
        failed = tend(fleet.as_mut()) => failed,
    }
}

impl Fleet {
    async fn start(stack: &LocalStack, arguments: &UpArgs, plan: WorkerPlan) -> Result<Self> {
        let endpoints = stack.endpoints();
        let catalog = PgCatalog::connect(&endpoints.database_url, CONNECTIONS).await?;
        catalog.migrate().await.context("cannot bring the tables up to date")?;
        let queue = Arc::new(AmqpQueue::start(&endpoints.amqp_url)?);
        queue.connected().await;
        let loops_shutdown = CancellationToken::new();
        let s3 = S3Settings::of_local_stack(endpoints);
        let bucket = Bucket { store: S3ObjectStore::new(&s3).await, name: s3.bucket };
        let loops = tokio::spawn(maintenance::run(
            catalog.clone(),
            Arc::clone(&queue),
            Some(bucket),
            arguments.serve.settings(),
            loops_shutdown.clone(),
        ));
        let workers = Workers::new(plan, endpoints, stack.data_dir());
        Ok(Self { catalog, queue, loops, loops_shutdown, workers })
    }

    /// Workers first, who need all the rest; then the loops.
    async fn stop(self) -> Result<()> {
        self.workers.stop().await?;
        self.loops_shutdown.cancel();
        self.loops.await.context("the serve loops failed")?;
        if let Some(queue) = Arc::into_inner(self.queue) {
            queue.close().await;
        }
        self.catalog.close().await;
        Ok(())
    }
}

/// Keeps the workers running; waits for ever if there are none.
async fn tend(fleet: Option<&mut Fleet>) -> Result<()> {
    match fleet {
        Some(fleet) => fleet.workers.tend(&fleet.catalog).await.map(|never| match never {}),
        None => std::future::pending().await,
    }
}

/// The workers to run, found before any server starts; `None` for the servers alone.
fn worker_plan(arguments: &UpArgs) -> Result<Option<WorkerPlan>> {
    if arguments.servers_only {
        return Ok(None);
    }
    let binary = match arguments.workers {
        0 => workers::PROGRAM.into(),
        _ => workers::find_binary(arguments.worker_binary.as_deref())?,
    };
    Ok(Some(WorkerPlan {
        binary,
        models: arguments.models.clone(),
        per_model: arguments.workers,
        arguments: arguments.worker_arguments.clone(),
    }))
}

/// Ends when somebody asks us to stop.
async fn stop_asked(with_stdin: bool) -> Result<()> {
    tokio::select! {
        stopped = stop_signal() => stopped,
        () = stdin_closed(with_stdin) => Ok(()),
    }
}

/// Ends when standard input is closed, or never if that is not asked for.
async fn stdin_closed(wanted: bool) {
    let (sender, receiver) = oneshot::channel::<()>();
    if wanted {
        // A thread of its own and not the runtime's: a read that never ends would keep the runtime from ending.
        std::thread::spawn(move || {
            // However it ends, there is nobody at the other end any more.
            let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
            let _ = sender.send(());
        });
        let _ = receiver.await;
    } else {
        std::future::pending().await
    }
}

/// Files that say that we run. They go when we end, however that comes about, unless we are killed.
struct RunFiles {
    ready: Option<std::path::PathBuf>,
    remove: Vec<std::path::PathBuf>,
}

impl RunFiles {
    fn write(data_dir: &DataDir, ready: Option<&Path>) -> Result<Self> {
        let pid = data_dir::pid_file(data_dir.root());
        let identity =
            ProcessIdentity::of(i32::try_from(std::process::id())?).context("/proc does not show us")?;
        ServerUser::Myself.write_private_file(&pid, &serde_json::to_string(&identity)?, 0o600)?;
        let mut remove = vec![pid, data_dir::env_file(data_dir.root())];
        remove.extend(ready.map(Path::to_owned));
        let files = Self { ready: ready.map(Path::to_owned), remove };
        if let Some(ready) = &files.ready {
            // Left by a killed run, it would say what is not true yet.
            let _ = std::fs::remove_file(ready);
        }
        Ok(files)
    }

    fn announce(&self) -> Result<()> {
        match &self.ready {
            Some(ready) => ServerUser::Myself.write_private_file(ready, "ready\n", 0o644),
            None => Ok(()),
        }
    }
}

impl Drop for RunFiles {
    fn drop(&mut self) {
        for path in &self.remove {
            // Some were never written.
            let _ = std::fs::remove_file(path);
        }
    }
}

fn tell(terminal: Terminal, ready: &ServerReady) {
    let ServerReady { name, port, took } = ready;
    terminal.tell(&format!("{name:<10} ready on 127.0.0.1:{port} after {:.1} s", took.as_secs_f64()));
}

fn show(stack: &LocalStack, arguments: &UpArgs, terminal: Terminal) -> Result<()> {
    let terminal = Terminal { json: terminal.json || arguments.servers_only };
    let description = stack.describe();
    terminal.show(&description, || {
        let workers = match arguments.workers {
            0 => "no workers".to_owned(),
            1 => "one worker for each registered model".to_owned(),
            count => format!("{count} workers for each registered model"),
        };
        format!(
            "darkroom is up: {workers}; logs in {}/log, pictures in {}/{}\n\
             other commands find it by themselves from this folder; for psql, aws and others: source {}",
            description.data_dir, description.s3_folder, description.s3_bucket, description.env_file
        )
    })
}
