//! From settings to a running worker: connects, checks the model, registers, loads, runs, and says goodbye.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use schema::{
    CatalogError, CatalogNotice, Model, NewWorker, PgCatalog, PriorityBand, WorkerId, concerns,
    dead_letter_queue, job_queue,
};
use tokio::sync::mpsc;
use tokio::time::{interval, sleep, timeout};
use tracing::{info, warn};

use crate::amqp::{self, AmqpQueue, AmqpSettings};
use crate::backoff::{Backoff, Chain, Patience};
use crate::config::{Config, PipelineChoice};
use crate::engine::{Engine, Lanes};
use crate::metrics::Metrics;
use crate::model_files;
use crate::object_store::S3ObjectStore;
use crate::pipeline::PipelineLoader;
use crate::run::{Adapters, FAREWELL, RunError, RunSettings, Shutdown, StopReason, run};
use crate::solid_color::{self, SolidColorPipeline};
use crate::stable_diffusion::{self, StableDiffusionPipeline};
use crate::trace::Trace;

/// How long a starting worker waits for the catalog.
const CATALOG_PATIENCE: Duration = Duration::from_secs(300);
/// The stages' statements come one at a time each: claims, extensions, completions, and the listener besides.
const CATALOG_CONNECTIONS: u32 = 5;
/// How often the worker's row is told that it lives.
const SEEN_INTERVAL: Duration = Duration::from_secs(15);
/// The longest `name` of a worker's row.
const MAX_NAME_CHARS: usize = 200;
/// Where Linux tells the machine's name.
const HOST_NAME: &str = "/proc/sys/kernel/hostname";

/// Serves the fleet until it is asked to stop.
pub async fn start(config: Config, shutdown: Shutdown) -> Result<()> {
    let metrics = Arc::new(Metrics::default());
    let catalog = connect_catalog(&config, &shutdown).await?;
    let model = catalog.model_by_name(&config.model).await?;
    let Some(model) = model else {
        bail!("there is no model `{}`\nhint: register it with `darkroom models add`", config.model);
    };
    check_broker(&config).await?;
    let loading = Loading::new(&config, &model)?;
    let store = S3ObjectStore::connect(config.s3_bucket.clone(), config.s3_addressing()).await;
    let worker = new_worker(&config, &model);
    let worker_id = worker.worker_id;
    catalog.register_worker(&worker).await.context("this worker could not be registered")?;
    info!(worker.id = %worker_id, worker.name = worker.name, model = %config.model, "Loading the {} pipeline", worker.pipeline);

    let served = serve(&config, &catalog, store, loading, &worker, metrics, shutdown).await;
    let reason = match &served {
        Ok(StopReason::Asked) => "asked to stop".to_owned(),
        Ok(StopReason::Idle) => "idle".to_owned(),
        Err(error) => format!("{error:#}"),
    };
    let is_unfit = |error: &anyhow::Error| matches!(error.downcast_ref(), Some(RunError::Unfit { .. }));
    let farewell = async {
        match &served {
            Err(error) if is_unfit(error) => catalog.worker_unfit(worker_id, &reason).await,
            _ => catalog.worker_stopped(worker_id, &reason).await,
        }
    };
    match timeout(FAREWELL, farewell).await {
        Ok(Ok(())) => info!(worker.id = %worker_id, "Stopped: {reason}"),
        Ok(Err(error)) => warn!(error = %Chain(&error), "The worker's end could not be recorded"),
        Err(_) => warn!("The worker's end could not be recorded in time"),
    }
    served.map(drop)
}

async fn serve(
    config: &Config,
    catalog: &PgCatalog,
    store: S3ObjectStore,
    loading: Loading,
    worker: &NewWorker,
    metrics: Arc<Metrics>,
    shutdown: Shutdown,
) -> Result<StopReason> {
    let trace = open_trace(config)?;
    let engine = tokio::select! {
        engine = loading.run(config.lanes(), trace.clone()) => engine?,
        () = shutdown.drain.cancelled() => return Ok(StopReason::Asked),
    };
    // Only now, so that no message waits while weights are read.
    let amqp = AmqpSettings {
        url: config.amqp_url.clone(),
        model: config.model.clone(),
        prefetch: config.prefetch(),
        connection_name: format!("darkroom-worker {}", worker.name),
    };
    let queue = Arc::new(AmqpQueue::start(amqp, metrics.clone())?);
    let (wake_up, wake_ups) = mpsc::channel(1);
    let mut helpers = tokio::task::JoinSet::new();
    helpers.spawn(listen(catalog.clone(), wake_up));
    helpers.spawn(stay_seen(catalog.clone(), worker.worker_id));
    let settings = RunSettings {
        worker_id: worker.worker_id,
        model: config.model.clone(),
        max_microbatch: config.max_microbatch.into(),
        max_wait: config.max_wait(),
        lease: config.lease(),
        grace: config.grace(),
        exit_when_idle: config.exit_when_idle(),
        unfit_after: config.unfit_after.into(),
    };
    let adapters = Adapters {
        queue: queue.clone(),
        store: Arc::new(store),
        catalog: Arc::new(catalog.clone()),
        engine,
        wake_ups,
        metrics,
        trace: trace.clone(),
    };
    let ended = run(settings, adapters, shutdown).await;
    queue.close().await;
    if let Err(error) = trace.close() {
        warn!(error = %Chain(&error), "The trace could not be written");
    }
    Ok(ended?)
}

fn open_trace(config: &Config) -> Result<Trace> {
    let Some(file) = &config.trace else { return Ok(Trace::default()) };
    Trace::to_file(file).with_context(|| format!("the trace {} cannot be written", file.display()))
}

async fn connect_catalog(config: &Config, shutdown: &Shutdown) -> Result<PgCatalog> {
    let patience = Patience { limit: CATALOG_PATIENCE, give_up: shutdown.drain.clone() };
    let connect = || PgCatalog::connect(&config.database_url, CATALOG_CONNECTIONS);
    let catalog = patience.insist("connect to the catalog", CatalogError::is_transient, connect).await?;
    if !catalog.migration_status().await?.is_current() {
        bail!("the catalog's tables are older than this program\nhint: run `darkroom migrate`");
    }
    Ok(catalog)
}

/// Refuses a broker that would break a promise. One that does not answer now is waited for later, as at any time.
async fn check_broker(config: &Config) -> Result<()> {
    let Some(version) = amqp::broker_version(&config.amqp_url).await? else { return Ok(()) };
    let queues = [job_queue(&config.model, PriorityBand::Normal), dead_letter_queue()];
    for concern in queues.iter().flat_map(|queue| concerns(version, queue)) {
        if concern.breaks_a_promise {
            bail!("{}\nhint: {}", concern.what, concern.hint);
        }
        warn!(hint = concern.hint, "{}", concern.what);
    }
    Ok(())
}

/// How the pipeline is loaded, and what has to be found true meanwhile.
struct Loading {
    load: PipelineLoader,
    /// The registered model and the folder that should hold it.
    files: Option<(Model, PathBuf)>,
}

impl Loading {
    fn new(config: &Config, model: &Model) -> Result<Self> {
        match config.pipeline {
            PipelineChoice::SolidColor => {
                let time_per_picture = config.solid_color_time();
                let load = move || Ok(Box::new(SolidColorPipeline::new(time_per_picture)) as _);
                Ok(Self { load: Box::new(load), files: None })
            }
            PipelineChoice::StableDiffusion => {
                let folder = config.model_dir.clone().unwrap_or_else(|| PathBuf::from(&model.folder));
                let files = Some((model.clone(), folder.clone()));
                let options = config.kernels.load_options(config.device, config.dtype)?;
                let batching = config.batching()?;
                let load = move || {
                    Ok(Box::new(StableDiffusionPipeline::load_batching(&folder, options, batching)?) as _)
                };
                Ok(Self { load: Box::new(load), files })
            }
        }
    }

    /// Loads the weights and checks side by side that they are the registered ones: the disk is read once for both. Other
    /// weights than the registered ones are the first thing to hear about.
    async fn run(self, lanes: Lanes, trace: Trace) -> Result<Engine> {
        let Self { load, files } = self;
        let verify = async {
            let Some((model, folder)) = files else { return Ok(()) };
            let verify = tokio::task::spawn_blocking(move || model_files::verify(&model, &folder));
            anyhow::Ok(verify.await.context("checking the model's files died")??)
        };
        let (verified, engine) = tokio::join!(verify, Engine::load(load, lanes, trace));
        verified?;
        Ok(engine?)
    }
}

fn new_worker(config: &Config, model: &Model) -> NewWorker {
    let host = host_name(Path::new(HOST_NAME));
    let (pipeline, device, dtype) = match config.pipeline {
        PipelineChoice::SolidColor => (solid_color::NAME, "cpu".to_owned(), "f32".to_owned()),
        PipelineChoice::StableDiffusion => {
            (stable_diffusion::NAME, config.device.to_string(), config.dtype.to_string())
        }
    };
    NewWorker {
        worker_id: WorkerId::generate(),
        name: config.name.clone().unwrap_or_else(|| host.clone()).chars().take(MAX_NAME_CHARS).collect(),
        host,
        model_id: model.model_id,
        pipeline: pipeline.to_owned(),
        device,
        dtype,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        lease_seconds: u32::try_from(config.lease_seconds).unwrap_or(u32::MAX),
        max_microbatch: config.max_microbatch.into(),
    }
}

fn host_name(file: &Path) -> String {
    let name = std::fs::read_to_string(file).unwrap_or_default().trim().to_owned();
    if name.is_empty() { "unknown".to_owned() } else { name }
}

/// Passes cancellations on as wake-ups. Ends when nobody wants them any more.
async fn listen(catalog: PgCatalog, wake_up: mpsc::Sender<()>) {
    let mut backoff = Backoff::for_server();
    while !wake_up.is_closed() {
        let error = match catalog.listen().await {
            Ok(mut listener) => loop {
                match listener.next().await {
                    Ok(CatalogNotice::JobsAvailable) => {}
                    Ok(_) => {
                        // A full channel holds a wake-up already.
                        let _ = wake_up.try_send(());
                        backoff = Backoff::for_server();
                    }
                    Err(error) => break error,
                }
            },
            Err(error) => error,
        };
        warn!(error = %Chain(&error), "Cannot listen for cancellations; they are noticed a little later");
        sleep(backoff.next_delay()).await;
    }
}

async fn stay_seen(catalog: PgCatalog, worker_id: WorkerId) {
    let mut ticks = interval(SEEN_INTERVAL);
    loop {
        ticks.tick().await;
        if let Err(error) = catalog.worker_seen(worker_id).await {
            warn!(error = %Chain(&error), "The worker's sign of life could not be recorded");
        }
    }
}
