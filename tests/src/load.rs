//! Load: one scheduler, many `solid-color` workers and a backlog, and what grows meanwhile.
//!
//! Time is scaled: 45,000 pictures are half an hour's work for 50 GPUs that take 2 seconds a picture. Here a picture takes
//! 20 ms, so that the run is as long as the servers, the scheduler and 50 worker processes on this machine make it. What
//! matters is not the rate but that memory, connections and the age of what waits in the broker settle.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::fleet::Fleet;
use crate::process::Process;
use crate::servers::Servers;

/// How often it is looked.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Without any progress for so long, something is stuck.
const STUCK: Duration = Duration::from_secs(300);
/// Memory and connections of the last third against the middle third: more than this is growth.
const GROWTH: f64 = 1.15;
/// Prompts in one file: each is a batch of its own.
const BATCH: u32 = 5_000;

/// How much of it.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Pictures owed.
    pub jobs: u32,
    /// Worker processes.
    pub workers: u32,
    /// Time a picture takes.
    pub milliseconds: u32,
}

/// One look at everything.
#[derive(Debug, Clone, Copy)]
struct Sample {
    elapsed: f64,
    completed: i64,
    scheduler_mib: f64,
    worker_mib: f64,
    connections: i64,
    /// Of the message that waits longest in the broker.
    oldest_wait: f64,
}

/// What came of it.
#[derive(Debug)]
pub struct Report {
    load: Load,
    samples: Vec<Sample>,
    completed: i64,
    charged: i64,
}

/// Runs the load to its end, telling `tell` how it goes and went.
///
/// # Panics
/// When nothing moves for five minutes.
pub async fn run(load: Load, tell: impl Fn(&str)) -> Report {
    let fleet = Fleet::new(Arc::new(Servers::start())).await;
    for first in (0..load.jobs).step_by(BATCH as usize) {
        let prompts = "a prompt\n".repeat(BATCH.min(load.jobs - first) as usize);
        fleet.submit(&prompts, &["--num-inference-steps", "2", "--width", "64", "--height", "64"]);
    }
    tell(&format!("{} jobs are submitted; starting {} workers", load.jobs, load.workers));
    let scheduler = fleet.serve();
    let options = ["--max-microbatch", "4", "--max-wait-ms", "20"];
    let workers: Vec<Process> =
        (0..load.workers).map(|_| fleet.solid_color_worker(load.milliseconds, &options)).collect();

    let (started, mut moved) = (Instant::now(), Instant::now());
    let mut samples: Vec<Sample> = Vec::new();
    let mut ticks = tokio::time::interval(LOOK_EVERY);
    loop {
        ticks.tick().await;
        let sample = look(&fleet, started, &scheduler, &workers).await;
        let before = samples.last().map_or(0, |sample| sample.completed);
        if sample.completed > before {
            moved = Instant::now();
        }
        assert!(moved.elapsed() < STUCK, "nothing was completed for {STUCK:?}");
        let rate = (sample.completed - before) as f64 / LOOK_EVERY.as_secs_f64();
        let left = (i64::from(load.jobs) - sample.completed) as f64 / rate.max(0.1);
        tell(&format!("{sample}  {rate:6.1}/s, ETA {left:.0} s"));
        samples.push(sample);
        if sample.completed >= i64::from(load.jobs) {
            break;
        }
    }
    let completed = fleet.jobs_in("completed").await;
    let charged = fleet.count("SELECT count(*) FROM jobs WHERE attempt <> 1").await;
    let report = Report { load, samples, completed, charged };
    // Before the fleet goes: removing so many objects can take longer than drawing them.
    tell(&report.to_string());
    report
}

async fn look(fleet: &Fleet, started: Instant, scheduler: &Process, workers: &[Process]) -> Sample {
    let connections = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()";
    let oldest = "SELECT coalesce(extract(epoch FROM now() - min(published_at)), 0)::bigint
                  FROM jobs WHERE state = 'available' AND published_at IS NOT NULL";
    let memory: Vec<f64> = workers.iter().map(resident_mib).collect();
    Sample {
        elapsed: started.elapsed().as_secs_f64(),
        completed: fleet.jobs_in("completed").await,
        scheduler_mib: resident_mib(scheduler),
        worker_mib: memory.iter().sum::<f64>() / memory.len() as f64,
        connections: fleet.count(connections).await,
        oldest_wait: fleet.count(oldest).await as f64,
    }
}

/// A process's resident memory in MiB; 0 when it is gone.
fn resident_mib(process: &Process) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.id())).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<f64>().ok());
    kib.unwrap_or_default() / 1024.0
}

impl Report {
    /// Means of the middle and of the last third of the run.
    fn thirds(&self, of: impl Fn(&Sample) -> f64) -> (f64, f64) {
        let third = self.samples.len().div_ceil(3);
        let mean = |samples: &[Sample]| samples.iter().map(&of).sum::<f64>() / samples.len().max(1) as f64;
        let late = &self.samples[third.min(self.samples.len())..];
        let (middle, last) = late.split_at(late.len() / 2);
        (mean(middle), mean(last))
    }

    fn figures(&self) -> [(&'static str, (f64, f64)); 4] {
        [
            ("scheduler, MiB resident", self.thirds(|sample| sample.scheduler_mib)),
            ("a worker, MiB resident (mean)", self.thirds(|sample| sample.worker_mib)),
            ("connections to Postgres", self.thirds(|sample| sample.connections as f64)),
            ("oldest message in the broker, s", self.thirds(|sample| sample.oldest_wait)),
        ]
    }

    /// Whether every job was completed at its first attempt and nothing grew. A message may wait a few seconds more or less.
    pub fn is_clean(&self) -> bool {
        let grew = self.figures().iter().any(|(_, (middle, last))| *last > middle * GROWTH + 5.0);
        self.completed == i64::from(self.load.jobs) && self.charged == 0 && !grew
    }
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { elapsed, completed, scheduler_mib, worker_mib, connections, oldest_wait } = self;
        write!(
            f,
            "{elapsed:6.0} s  {completed:6} completed  scheduler {scheduler_mib:5.1} MiB  \
             worker {worker_mib:5.1} MiB  {connections:3} connections  oldest message {oldest_wait:3.0} s"
        )
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Load { jobs, workers, milliseconds } = self.load;
        let seconds = self.samples.last().map_or(0.0, |sample| sample.elapsed);
        writeln!(
            f,
            "\n{workers} workers, {milliseconds} ms a picture: {} of {jobs} jobs completed in {seconds:.0} s, {:.0}/s; {} with more than one attempt",
            self.completed,
            self.completed as f64 / seconds.max(0.1),
            self.charged
        )?;
        writeln!(f, "{:34} {:>12} {:>10}", "", "middle third", "last third")?;
        for (what, (middle, last)) in self.figures() {
            writeln!(f, "{what:34} {middle:12.1} {last:10.1}")?;
        }
        write!(f, "{}", if self.is_clean() { "nothing grew" } else { "SOMETHING GREW OR WAS LOST" })
    }
}
