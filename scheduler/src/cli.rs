//! The command line: what there is to say, and how to choose.
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use schema::{ModelName, PriorityBand};

use crate::config::GlobalArgs;
use crate::maintenance::{INSPECTED_SAMPLE, MaintenanceSettings, ORPHANS_OLDER_THAN};
use crate::prompt_file::PromptFormat;
use crate::relay::{MOST_WATERMARK, Watermark};
use crate::submission::BatchDefaults;

/// Turns batches of prompts into pictures on a fleet of GPU workers.
#[derive(Debug, Parser)]
#[command(
    name = "darkroom",
    version,
    max_term_width = 110,
    after_help = "A BATCH is named by its id, the beginning of its id, its name, or `latest`.\n\
                  Exit codes: 0 done; 1 failed; 2 the command line or an input file is wrong."
)]
pub struct Cli {
    /// Settings of every command.
    #[command(flatten)]
    pub global: GlobalArgs,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start everything on this machine: PostgreSQL, RabbitMQ, S3, the serve loops and workers.
    Up(UpArgs),
    /// Stop what `up` started.
    Down,
    /// Run the serve loops against real servers. Two at once do no harm.
    Serve(ServeArgs),
    /// Bring the database's tables up to date.
    Migrate(MigrateArgs),
    /// Register and list models.
    #[command(subcommand)]
    Models(ModelsCommand),
    /// Read and accept models' licences.
    #[command(subcommand)]
    Licence(LicenceCommand),
    /// Enqueue a file of prompts as one batch.
    Submit(Box<SubmitArgs>),
    /// List the latest batches.
    Batches(BatchesArgs),
    /// Show how far a batch has come, or all unfinished ones and the workers.
    Status(StatusArgs),
    /// Follow a batch to its end; exits with 1 if some of its jobs were discarded.
    Watch(WatchArgs),
    /// Cancel a batch, or one job of it. What is drawn stays.
    Cancel(CancelArgs),
    /// Download a batch's pictures, checked against their records.
    Fetch(FetchArgs),
    /// Check a batch completely, rows and objects; exits with 1 if a promise is broken. Changes nothing.
    Verify(VerifyArgs),
    /// Try out what the fleet leans on and say what to change; exits with 1 if something is dangerous.
    Doctor,
    /// Look after objects, messages and dead letters once, as `serve` does all the time; exits with 1 if an object is
    /// missing or not what its row says.
    Reconcile(ReconcileArgs),
}

/// `darkroom up`
#[derive(Debug, Args)]
pub struct UpArgs {
    /// Models to run workers for; may be given several times. By default every registered model.
    #[arg(long = "model", value_name = "NAME")]
    pub models: Vec<ModelName>,
    /// Workers for each model. 0 starts none. More than one only pays with more than one GPU.
    #[arg(long, env = "DARKROOM_WORKERS", default_value_t = 1, value_name = "N")]
    pub workers: usize,
    /// The worker's program. By default `darkroom-worker` beside this one.
    #[arg(long, env = "DARKROOM_WORKER_BINARY", value_name = "FILE")]
    pub worker_binary: Option<PathBuf>,
    /// Start the servers alone, without migrations, serve loops and workers, and print one line of JSON with how to
    /// reach them. For tests.
    #[arg(long)]
    pub servers_only: bool,
    /// Return when everything is ready, and leave it running; stop it with `darkroom down`.
    #[arg(long, conflicts_with_all = ["servers_only", "stop_with_stdin"])]
    pub detach: bool,
    /// Write this file when everything is ready.
    #[arg(long, value_name = "FILE")]
    pub ready_file: Option<PathBuf>,
    /// Stop when standard input is closed, so that nothing outlives the program that started this one.
    #[arg(long)]
    pub stop_with_stdin: bool,
    /// How the serve loops behave.
    #[command(flatten)]
    pub serve: ServeArgs,
    /// Further arguments for `darkroom-worker run`, after `--`.
    #[arg(last = true, value_name = "WORKER_ARGUMENT")]
    pub worker_arguments: Vec<OsString>,
}

/// `darkroom serve`
#[derive(Clone, Copy, Debug, Args)]
pub struct ServeArgs {
    /// Unclaimed messages to keep in each queue: some minutes of the fleet's work. Fewer make cancelling, priorities
    /// and fairness take effect sooner; too few let workers wait, or start with microbatches that are not full [default: ten
    /// microbatches for each worker that is there, at least 1000].
    #[arg(long, env = "DARKROOM_WATERMARK", value_name = "N",
          value_parser = clap::value_parser!(u32).range(1..=i64::from(MOST_WATERMARK)))]
    pub watermark: Option<u32>,
    /// Seconds after which messages count as lost if their queue is empty and nobody claimed their jobs. Longer than
    /// a microbatch takes, or workers get messages twice, which is harmless.
    #[arg(long, env = "DARKROOM_REPUBLISH_AFTER", default_value_t = 120, value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub republish_after: u64,
}

impl ServeArgs {
    /// As the loops take it.
    pub fn settings(self) -> MaintenanceSettings {
        let Self { watermark, republish_after } = self;
        let watermark = watermark.map_or(Watermark::ForWorkers, Watermark::Fixed);
        MaintenanceSettings { watermark, republish_after: Duration::from_secs(republish_after) }
    }
}

/// `darkroom migrate`
#[derive(Debug, Args)]
pub struct MigrateArgs {
    /// Say what would be done and change nothing.
    #[arg(long)]
    pub dry_run: bool,
}

/// `darkroom models …`
#[derive(Debug, Subcommand)]
pub enum ModelsCommand {
    /// Register a model's folder under a name. Registering the same again changes nothing.
    Add(ModelsAddArgs),
    /// List the registered models.
    List,
}

/// `darkroom models add`
#[derive(Debug, Args)]
pub struct ModelsAddArgs {
    /// What `submit` and the queues will call it: lower-case letters, digits, `.`, `_` and `-`.
    pub name: ModelName,
    /// Its folder in the diffusers layout, at a path where the workers find it too.
    pub folder: PathBuf,
    /// Its licence text, which everyone who submits has to accept. By default LICENSE or LICENCE in the folder.
    #[arg(long, value_name = "FILE")]
    pub licence: Option<PathBuf>,
    /// What to call the licence. By default the first line of the text.
    #[arg(long, value_name = "TEXT")]
    pub licence_name: Option<String>,
}

/// `darkroom licence …`
#[derive(Debug, Subcommand)]
pub enum LicenceCommand {
    /// Print a model's licence text and its SHA-256.
    Show {
        /// The model.
        model: ModelName,
    },
    /// Accept a model's licence, after reading it.
    Accept {
        /// The model.
        model: ModelName,
        /// Who accepts, and submits later.
        #[command(flatten)]
        who: PrincipalArgs,
        /// Accept without being shown the text and asked: the SHA-256 of the text that was read, as `licence show`
        /// prints it, or at least its first 12 digits.
        #[arg(long, value_name = "SHA256")]
        yes: Option<String>,
    },
}

/// Who acts.
#[derive(Clone, Debug, Args)]
pub struct PrincipalArgs {
    /// Who acts. By default the user who runs this program.
    #[arg(long, env = "DARKROOM_PRINCIPAL", value_name = "NAME")]
    pub principal: Option<String>,
}

/// `darkroom submit`
#[derive(Debug, Args)]
pub struct SubmitArgs {
    /// The prompt file, or `-` for standard input.
    pub file: PathBuf,
    /// The model that draws. May be left out if only one is registered.
    #[arg(long, env = "DARKROOM_MODEL", value_name = "NAME")]
    pub model: Option<ModelName>,
    /// What to call the batch. By default the file's name.
    #[arg(long, value_name = "TEXT")]
    pub name: Option<String>,
    /// Who submits. The model's licence has to be accepted by the same name.
    #[command(flatten)]
    pub who: PrincipalArgs,
    /// One key, one batch: submitting again with the same key and content changes nothing. Give one wherever a
    /// submission may be repeated, as in scripts.
    #[arg(long, value_name = "TEXT")]
    pub idempotency_key: Option<String>,
    /// How urgent the batch is: high, normal or low.
    #[arg(long, default_value_t, value_name = "BAND")]
    pub priority: PriorityBand,
    /// How the file is written. By default told from its ending: .csv, .jsonl, anything else is text.
    #[arg(long, value_name = "FORMAT")]
    pub format: Option<PromptFormat>,
    /// Pictures of each prompt, with its seed and those that follow it, or a random one each if it has none.
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub num_images_per_prompt: u32,
    /// Times a job may fail before it is discarded. Lost workers and shutdowns do not count.
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=100))]
    pub max_attempts: u16,
    /// Check everything and write nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Settings for prompts that have none of their own.
    #[command(flatten, next_help_heading = "Defaults of the batch")]
    pub defaults: BatchDefaults,
}

/// `darkroom batches`
#[derive(Debug, Args)]
pub struct BatchesArgs {
    /// How many to list.
    #[arg(long, default_value_t = 20, value_name = "N")]
    pub limit: u32,
}

/// `darkroom status`
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// The batch.
    pub batch: Option<String>,
}

/// `darkroom watch`
#[derive(Debug, Args)]
pub struct WatchArgs {
    /// The batch.
    pub batch: String,
}

/// `darkroom cancel`
#[derive(Debug, Args)]
pub struct CancelArgs {
    /// The batch.
    pub batch: String,
    /// Cancel this job alone, counted from 0 in the order of the prompt file.
    #[arg(long, value_name = "ORDINAL")]
    pub job: Option<u32>,
}

/// `darkroom fetch`
#[derive(Debug, Args)]
pub struct FetchArgs {
    /// The batch.
    pub batch: String,
    /// The folder for the pictures; made if it is not there. Those that are there already are not fetched again.
    #[arg(long, short, value_name = "DIR")]
    pub output: PathBuf,
    /// Also draw all pictures on one page, each with its prompt, seed and verdict.
    #[arg(long, value_name = "FILE.png")]
    pub contact_sheet: Option<PathBuf>,
}

/// `darkroom verify`
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// The batch.
    pub batch: String,
    /// Download and hash every picture. Without it the store is asked for size and SHA-256, and some stores keep none.
    #[arg(long)]
    pub deep: bool,
}

/// `darkroom reconcile`
#[derive(Debug, Args)]
pub struct ReconcileArgs {
    /// Say what would be done and change nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Seconds that an object has to be old, by the store's clock, before it can count as an orphan.
    #[arg(long, default_value_t = ORPHANS_OLDER_THAN.as_secs(), value_name = "SECONDS")]
    pub orphans_older_than: u64,
    /// Pictures to compare with their rows, drawn by chance.
    #[arg(long, default_value_t = INSPECTED_SAMPLE, value_name = "N")]
    pub sample: u32,
    /// Also download those of the sample whose SHA-256 the store does not tell.
    #[arg(long)]
    pub deep: bool,
    /// Seconds after which messages count as lost if their queue is empty and nobody claimed their jobs.
    #[arg(long, default_value_t = 120, value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub republish_after: u64,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_argument_says_how_to_choose_it() {
        fn check(command: &clap::Command) {
            for argument in command.get_arguments() {
                assert!(argument.get_help().is_some(), "{}: {}", command.get_name(), argument.get_id());
            }
            command.get_subcommands().for_each(check);
        }
        check(&Cli::command());
    }

    #[test]
    fn settings_stay_few() {
        let mut settings = std::collections::BTreeSet::new();
        fn collect(command: &clap::Command, settings: &mut std::collections::BTreeSet<OsString>) {
            settings.extend(
                command.get_arguments().filter_map(|argument| argument.get_env()).map(OsString::from),
            );
            command.get_subcommands().for_each(|command| collect(command, settings));
        }
        collect(&Cli::command(), &mut settings);
        assert!(settings.len() < 25, "{settings:?}");
    }

    #[test]
    fn a_submission_is_read() {
        let line = "darkroom submit p.csv --model demo --priority high --num-images-per-prompt 4 --seed 7 \
                    --guidance-scale 0 --scheduler euler_a --dry-run --json";
        let cli = Cli::try_parse_from(line.split_whitespace()).unwrap();
        assert!(cli.global.json);
        let Command::Submit(submit) = cli.command else { panic!("not a submission") };
        assert_eq!(submit.model.unwrap().as_str(), "demo");
        assert_eq!(submit.priority, PriorityBand::High);
        assert_eq!((submit.num_images_per_prompt, submit.defaults.seed, submit.dry_run), (4, Some(7), true));
        assert_eq!(submit.defaults.scheduler, Some(schema::NoiseScheduler::EulerA));
    }

    #[test]
    fn mistakes_are_told_with_what_is_allowed() {
        for (line, expected) in [
            ("darkroom submit p --priority urgent", "high, normal, low"),
            ("darkroom submit p --scheduler k_euler", "euler_a"),
            ("darkroom submit p --num-images-per-prompt 0", "1..=10000"),
            ("darkroom models add UPPER dir", "lower-case letters"),
            ("darkroom up --detach --servers-only", "cannot be used with"),
            ("darkroom serve --watermark 0", "1..=900000"),
        ] {
            let error = Cli::try_parse_from(line.split_whitespace()).unwrap_err().to_string();
            assert!(error.contains(expected), "{line}: {error}");
        }
    }

    #[test]
    fn the_workers_arguments_follow_two_dashes() {
        let line =
            "darkroom up --model demo --model other --workers 2 -- --pipeline solid-color --device cuda:0";
        let Command::Up(up) = Cli::try_parse_from(line.split_whitespace()).unwrap().command else {
            panic!("not up")
        };
        assert_eq!(up.models.len(), 2);
        assert_eq!(up.worker_arguments, ["--pipeline", "solid-color", "--device", "cuda:0"]);
    }
}
