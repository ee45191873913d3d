//! The settings of `darkroom-worker`: a flag, or its environment variable. Beside `kernel_args`, which other commands share, the only
//! file that reads the environment, apart from the AWS library, which reads the standard AWS variables itself.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::ensure;
use schema::ModelName;
use secrecy::SecretString;

use crate::batching_args::{Switch, batching};
use crate::bench::BenchArgs;
use crate::diffusion::{Batching, ComputeDevice, ComputeDtype};
use crate::engine::Lanes;
use crate::generate::GenerateArgs;
use crate::kernel_args::KernelArgs;
use crate::object_store::Addressing;
use crate::tune::TuneArgs;

/// Darkroom's GPU worker.
#[derive(Debug, clap::Parser)]
#[command(name = "darkroom-worker", version, max_term_width = 110)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Which log lines to show: a level, or targets with levels such as `worker=debug,warn`. Prompts appear at `debug`
    /// only.
    #[arg(long, env = "DARKROOM_LOG", global = true, default_value = "info", value_name = "FILTER")]
    pub log: String,
    /// How log lines look. They go to standard error.
    #[arg(long, env = "DARKROOM_LOG_FORMAT", global = true, default_value = "pretty", value_name = "FORMAT")]
    pub log_format: LogFormat,
}

/// What the program can do.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Draws a fleet's jobs until it is asked to stop (SIGTERM or Ctrl-C; a second one hastens it).
    Run(Box<Config>),
    /// Makes one picture from a prompt, without a fleet.
    Generate(Box<GenerateArgs>),
    /// Measures the model's speed, stage by stage, with weights drawn from a seed.
    Bench(Box<BenchArgs>),
    /// Finds the fastest engine of cuDNN for each convolution of a model on this GPU, and pins them in a file.
    Tune(Box<TuneArgs>),
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    Pretty,
    /// One JSON object a line.
    Json,
}

/// What draws the pictures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum PipelineChoice {
    /// The model.
    StableDiffusion,
    /// One plain color per seed: needs no model folder and no GPU, for trying a fleet out.
    SolidColor,
}

/// The settings of `run`.
#[derive(Clone, Debug, clap::Args)]
pub struct Config {
    /// The registered model to serve.
    #[arg(long, env = "DARKROOM_MODEL", value_name = "NAME")]
    pub model: ModelName,
    /// The model's folder on this machine, if it is not where `darkroom models add` found it. Its files have to have the
    /// registered digests.
    #[arg(long, env = "DARKROOM_MODEL_DIR", value_name = "DIR")]
    pub model_dir: Option<PathBuf>,
    /// What draws the pictures.
    #[arg(long, env = "DARKROOM_PIPELINE", default_value = "stable-diffusion", value_name = "NAME")]
    pub pipeline: PipelineChoice,
    /// Where to compute: cpu, cuda or cuda:N. One worker uses one GPU; start one for each.
    #[arg(long, env = "DARKROOM_DEVICE", default_value = "cpu")]
    pub device: ComputeDevice,
    /// Precision to compute in: f32, f16 or bf16. On a GPU 16 bits take half the memory and less than half the time; on
    /// a CPU they are slow. The first noise is drawn in it too, so it changes which picture belongs to a seed.
    #[arg(long, env = "DARKROOM_DTYPE", default_value = "f32")]
    pub dtype: ComputeDtype,
    /// What a GPU computes with.
    #[command(flatten)]
    pub kernels: KernelArgs,
    /// The most jobs that share a forward pass. More is faster on a GPU until memory or its arithmetic is full (16 to 33
    /// on a big one); a CPU gains nothing from it. The worker holds three times as many messages of each priority band.
    #[arg(long, env = "DARKROOM_MAX_MICROBATCH", default_value_t = 4, value_name = "N",
          value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub max_microbatch: u16,
    /// On a GPU, launch a denoising step as one CUDA graph, where it can be. Not measured yet, so off by itself.
    #[arg(
        long,
        env = "DARKROOM_GRAPH",
        value_name = "on|off",
        default_value = "off",
        hide_possible_values = true
    )]
    pub graph: Switch,
    /// Decode and check one microbatch while the next is denoised, by a second thread and, on a GPU, on a second stream. Pictures
    /// are the same. It takes memory for both at once; on a CPU the two share
    /// its cores. Not measured on a GPU yet, so off by itself.
    #[arg(
        long,
        env = "DARKROOM_OVERLAP_DECODE",
        value_name = "on|off",
        default_value = "off",
        hide_possible_values = true
    )]
    pub overlap_decode: Switch,
    /// Compute so many pictures at once, the missing ones made up, so that a picture's last bits do not depend on its company;
    /// at least --max-microbatch, or 0 to make nothing up [default: --max-microbatch on a GPU; a CPU, which computes each
    /// picture by itself, does without].
    #[arg(long, env = "DARKROOM_PAD_BATCH", value_name = "N", value_parser = clap::value_parser!(u16).range(0..=1024))]
    pub pad_batch: Option<u16>,
    /// How long a job waits for others of its kind when the worker could start. Small against the time of a microbatch.
    #[arg(long, env = "DARKROOM_MAX_WAIT_MS", default_value_t = 100, value_name = "MS")]
    pub max_wait_ms: u64,
    /// How long a job stays this worker's after its last sign of life; as long a dead worker's jobs wait to be rescued.
    #[arg(long, env = "DARKROOM_LEASE_SECONDS", default_value_t = 60, value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(3..=3600))]
    pub lease_seconds: u64,
    /// How long a running microbatch may go on after the worker is asked to stop; what does not fit goes back at once. The
    /// worker needs up to 5 seconds more. The default fits the shortest notice there is, 15 seconds for a GKE Spot node.
    #[arg(long, env = "DARKROOM_GRACE_SECONDS", default_value_t = 10, value_name = "SECONDS")]
    pub grace_seconds: u64,
    /// How long `--pipeline solid-color` takes for one picture.
    #[arg(long, env = "DARKROOM_SOLID_COLOR_MS", default_value_t = 0, value_name = "MS")]
    pub solid_color_ms: u64,
    /// Stop after so many seconds without work. By default the worker waits forever.
    #[arg(long, env = "DARKROOM_EXIT_WHEN_IDLE_SECONDS", value_name = "SECONDS")]
    pub exit_when_idle_seconds: Option<u64>,
    /// Hand everything back, say unfit, and exit with an error when so many jobs in a row failed alike: then it is the
    /// machine and not the jobs. Lower it where bad cards are common and jobs rarely fail.
    #[arg(long, env = "DARKROOM_UNFIT_AFTER", default_value_t = 5, value_name = "JOBS",
          value_parser = clap::value_parser!(u16).range(2..=1000))]
    pub unfit_after: u16,
    /// What people call this worker. By default the name of its machine.
    #[arg(long, env = "DARKROOM_WORKER_NAME", value_name = "NAME")]
    pub name: Option<String>,
    /// Write how long each stage of each microbatch takes to this file, in Chrome's trace format, which Perfetto opens. It
    /// grows by about 3 kB a picture.
    #[arg(long, env = "DARKROOM_TRACE", value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// PostgreSQL, as postgres://USER:PASSWORD@HOST:PORT/DATABASE.
    #[arg(long, env = "DATABASE_URL", hide_env_values = true, value_name = "URL")]
    pub database_url: SecretString,
    /// RabbitMQ, as amqp:// or amqps://USER:PASSWORD@HOST:PORT/VHOST.
    #[arg(long, env = "AMQP_URL", hide_env_values = true, value_name = "URL")]
    pub amqp_url: SecretString,
    /// Bucket for the pictures. The standard AWS variables (AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID …) tell the
    /// rest.
    #[arg(long, env = "S3_BUCKET", value_name = "NAME")]
    pub s3_bucket: String,
}

impl Config {
    /// See [`Config::max_wait_ms`].
    pub fn max_wait(&self) -> Duration {
        Duration::from_millis(self.max_wait_ms)
    }

    /// See [`Config::lease_seconds`].
    pub fn lease(&self) -> Duration {
        Duration::from_secs(self.lease_seconds)
    }

    /// See [`Config::grace_seconds`].
    pub fn grace(&self) -> Duration {
        Duration::from_secs(self.grace_seconds)
    }

    /// See [`Config::solid_color_ms`].
    pub fn solid_color_time(&self) -> Duration {
        Duration::from_millis(self.solid_color_ms)
    }

    /// See [`Config::exit_when_idle_seconds`].
    pub fn exit_when_idle(&self) -> Option<Duration> {
        self.exit_when_idle_seconds.map(Duration::from_secs)
    }

    /// See [`Config::pad_batch`] and [`Config::graph`]; an error if batches would not be filled up always.
    pub fn batching(&self) -> anyhow::Result<Batching> {
        let suited = if self.device.is_cuda() { self.max_microbatch } else { 0 };
        let pad_batch = self.pad_batch.unwrap_or(suited);
        ensure!(
            pad_batch == 0 || pad_batch >= self.max_microbatch,
            "`--pad-batch` must be 0 or at least `--max-microbatch`, {}, but is {pad_batch}",
            self.max_microbatch
        );
        Ok(batching(self.device, self.graph, pad_batch))
    }

    /// See [`Config::overlap_decode`].
    pub fn lanes(&self) -> Lanes {
        if self.overlap_decode.is_on() { Lanes::Two } else { Lanes::One }
    }

    /// Messages of one band that the worker holds.
    pub fn prefetch(&self) -> u16 {
        schema::prefetch(self.max_microbatch)
    }

    /// Servers other than Amazon's are addressed by path.
    pub fn s3_addressing(&self) -> Addressing {
        let is_set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        if is_set("AWS_ENDPOINT_URL") || is_set("AWS_ENDPOINT_URL_S3") {
            Addressing::ByPath
        } else {
            Addressing::ByHost
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::BatchSize;
    use clap::{CommandFactory, Parser};

    #[test]
    fn the_command_line_is_well_formed_and_below_its_budget() {
        Cli::command().debug_assert();
        let run = Cli::command();
        let run = run.find_subcommand("run").expect("there is a subcommand run");
        assert!(run.get_arguments().count() < 25, "a new setting names the one it replaces");
    }

    #[test]
    fn no_secret_is_shown_by_debug_formatting() {
        let arguments = [
            "darkroom-worker",
            "run",
            "--model",
            "demo",
            "--database-url",
            "postgres://u:hidden@h/d",
            "--amqp-url",
            "amqp://u:hidden@h",
            "--s3-bucket",
            "pictures",
        ];
        let cli = Cli::try_parse_from(arguments).expect("these arguments are enough");
        assert!(!format!("{cli:?}").contains("hidden"));
    }

    /// `run` with what it cannot do without, and `more`.
    fn parsed(more: &[&str]) -> Result<Cli, clap::Error> {
        let arguments = ["darkroom-worker", "run", "--model", "demo", "--database-url", "a"];
        let rest = ["--amqp-url", "b", "--s3-bucket", "c"];
        Cli::try_parse_from(arguments.iter().chain(&rest).chain(more))
    }

    fn config(more: &[&str]) -> Config {
        let Command::Run(config) = parsed(more).expect("these are enough").command else {
            panic!("another command")
        };
        *config
    }

    #[test]
    fn a_gpu_is_given_batches_of_one_size_unless_it_is_told_otherwise() {
        let size = |more: &[&str]| {
            let config = config(&[&["--max-microbatch", "8"], more].concat());
            config.batching().map(|batching| batching.size)
        };
        assert_eq!(size(&[]).unwrap(), BatchSize::Alone);
        assert_eq!(size(&["--device", "cuda"]).unwrap(), BatchSize::Padded(8));
        assert_eq!(size(&["--device", "cuda", "--pad-batch", "0"]).unwrap(), BatchSize::AsGiven);
        assert_eq!(size(&["--pad-batch", "9"]).unwrap(), BatchSize::Padded(9));
        let error = size(&["--device", "cuda", "--pad-batch", "7"]).unwrap_err().to_string();
        assert_eq!(error, "`--pad-batch` must be 0 or at least `--max-microbatch`, 8, but is 7");
    }

    #[test]
    fn decoding_overlaps_only_where_it_is_asked_for() {
        let lanes = |more: &[&str]| config(more).lanes();
        assert_eq!(lanes(&[]), Lanes::One);
        assert_eq!(lanes(&["--device", "cuda"]), Lanes::One);
        assert_eq!(lanes(&["--overlap-decode", "on"]), Lanes::Two);
    }

    #[test]
    fn values_out_of_range_are_refused() {
        for (flag, value) in [
            ("--max-microbatch", "0"),
            ("--lease-seconds", "0"),
            ("--device", "tpu"),
            ("--dtype", "f64"),
            ("--pipeline", "sdxl"),
            ("--model", "Not A Slug"),
        ] {
            assert!(parsed(&[flag, value]).is_err(), "{flag} {value}");
        }
    }
}
