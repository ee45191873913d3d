//! The local stack's workers: one or more `darkroom-worker run` for each registered model, started as soon as the
//! model is there and started again when they end.
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use schema::{ModelName, PgCatalog};
use tokio::time;
use tracing::{info, warn};

use super::data_dir::DataDir;
use super::env_file::Endpoints;
use super::server_process::{ChildrenFile, ServerProcess};
use super::server_user::ServerUser;

/// The worker's program.
pub const PROGRAM: &str = "darkroom-worker";

/// How often the list of models is read; a new model's worker starts within this time.
const MODELS_INTERVAL: Duration = Duration::from_secs(1);

/// The pause before a worker that ended is started again doubles from the first to the last.
const BACKOFF: std::ops::Range<Duration> = Duration::from_secs(1)..Duration::from_secs(60);

/// A worker that ran this long was fine: its next end begins with a short pause again.
const HEALTHY_AFTER: Duration = Duration::from_secs(60);

/// Time for a worker to finish or give back what it draws before it is killed.
const STOP_GRACE: Duration = Duration::from_secs(60);

/// Which workers to run.
#[derive(Clone, Debug)]
pub struct WorkerPlan {
    /// The worker's program.
    pub binary: PathBuf,
    /// The models to serve; empty for every registered one.
    pub models: Vec<ModelName>,
    /// Workers for each model.
    pub per_model: usize,
    /// Further arguments to `darkroom-worker run`.
    pub arguments: Vec<OsString>,
}

/// One worker's place: filled by a process, or empty until a time.
#[derive(Debug)]
struct Place {
    name: String,
    model: ModelName,
    process: Option<(ServerProcess, Instant)>,
    start_at: Instant,
    backoff: Duration,
}

/// The workers of a running stack.
#[derive(Debug)]
pub struct Workers {
    plan: WorkerPlan,
    endpoints: Endpoints,
    logs: PathBuf,
    children: ChildrenFile,
    places: Vec<Place>,
}

/// The worker's program: `configured`, or `darkroom-worker` beside the running program.
///
/// # Errors
/// If there is no such file.
pub fn find_binary(configured: Option<&Path>) -> Result<PathBuf> {
    let binary = match configured {
        Some(path) => path.to_owned(),
        None => std::env::current_exe().context("cannot tell where this program is")?.with_file_name(PROGRAM),
    };
    if !binary.is_file() {
        bail!(
            "there is no worker program at {}\nhint: build it with `make build`, name it by --worker-binary, or run \
             without a worker by --workers 0",
            binary.display()
        );
    }
    binary.canonicalize().with_context(|| format!("cannot resolve {}", binary.display()))
}

impl Workers {
    /// No worker runs yet; [`tend`](Self::tend) starts them.
    pub fn new(plan: WorkerPlan, endpoints: &Endpoints, data_dir: &DataDir) -> Self {
        Self {
            plan,
            endpoints: endpoints.clone(),
            logs: data_dir.logs(),
            children: ChildrenFile::new(data_dir.children()),
            places: Vec::new(),
        }
    }

    /// Starts workers for models that have none and in place of those that ended, for ever.
    ///
    /// Run it on the main thread; see [`ServerUser::command`].
    ///
    /// # Errors
    /// If a worker cannot even be started.
    pub async fn tend(&mut self, catalog: &PgCatalog) -> Result<std::convert::Infallible> {
        let mut interval = time::interval(MODELS_INTERVAL);
        interval.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            match catalog.models().await {
                Ok(models) => models.into_iter().for_each(|model| self.make_places(&model.name)),
                // The database may be restarting. The workers that run are tended all the same.
                Err(error) => {
                    warn!(error = format!("{:#}", anyhow::Error::from(error)), "Cannot list the models")
                }
            }
            for index in 0..self.places.len() {
                self.tend_place(index).await?;
            }
        }
    }

    fn make_places(&mut self, model: &ModelName) {
        let wanted = self.plan.models.is_empty() || self.plan.models.contains(model);
        if !wanted || self.places.iter().any(|place| place.model == *model) {
            return;
        }
        self.places.extend((1..=self.plan.per_model).map(|number| Place {
            name: format!("worker-{model}-{number}"),
            model: model.clone(),
            process: None,
            start_at: Instant::now(),
            backoff: BACKOFF.start,
        }));
    }

    async fn tend_place(&mut self, index: usize) -> Result<()> {
        let place = &mut self.places[index];
        if let Some((process, started)) = &mut place.process {
            // A tick's look at whether it ended, not a wait.
            let Ok(status) = time::timeout(Duration::ZERO, process.exited()).await else { return Ok(()) };
            let status = status?.to_string();
            if started.elapsed() > HEALTHY_AFTER {
                place.backoff = BACKOFF.start;
            }
            warn!(
                worker = place.name,
                status,
                "{} ended ({status}); starting it again in {:?}{}",
                place.name,
                place.backoff,
                process.quoted_log()
            );
            place.start_at = Instant::now() + place.backoff;
            place.backoff = (place.backoff * 2).min(BACKOFF.end);
            place.process = None;
        }
        if Instant::now() >= place.start_at {
            let mut command =
                ServerUser::Myself.command_in_our_environment(&self.plan.binary, Signal::SIGKILL);
            command.args(["run", "--model", place.model.as_str()]).args(&self.plan.arguments);
            // Meant for other servers, these would win over or mix with the stack's own.
            for foreign in ["AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"] {
                command.env_remove(foreign);
            }
            // By environment, so that a `--name` among the worker's arguments wins.
            command.envs(self.endpoints.variables()).env("DARKROOM_WORKER_NAME", &place.name);
            // The log is a file, where colors are only noise.
            command.env("NO_COLOR", "1");
            let log = self.logs.join(format!("{}.log", place.name));
            let process = ServerProcess::spawn(&place.name, command, Signal::SIGTERM, &log, &self.children)?;
            info!(worker = place.name, log = %log.display(), "Started {}; it logs to {}", place.name, log.display());
            place.process = Some((process, Instant::now()));
        }
        Ok(())
    }

    /// Asks all workers to stop, at once, and waits until they have.
    ///
    /// # Errors
    /// If one could not be stopped.
    pub async fn stop(self) -> Result<()> {
        let processes = self.places.into_iter().filter_map(|place| place.process);
        let stops = processes.map(|(process, _)| process.stop(STOP_GRACE));
        futures::future::join_all(stops).await.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_worker_program_is_told_with_a_way_out() {
        let error = find_binary(Some(Path::new("/nowhere/darkroom-worker"))).unwrap_err().to_string();
        assert!(
            error.starts_with("there is no worker program at /nowhere/darkroom-worker\nhint: "),
            "{error}"
        );
    }
}
