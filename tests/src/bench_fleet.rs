//! The control plane at its limit: pictures that cost nothing to draw, so that what is measured is submit → publish → consume →
//! claim → store → record → acknowledge; and beside it, in the same run, each server alone.
//!
//! Everything shares this machine's cores, in the fleet and alone. A repetition does each part once, so that a machine that is
//! busy with something else slows all of them; what counts is the ratio of medians. Processor time is that of the fleet's
//! run, by process: from it `capacity` computes what larger machines would carry.

mod parts;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::fleet::Fleet;
use crate::process::Process;
use crate::servers::Servers;
use crate::{cpu, median};

pub use parts::Size;

const DEADLINE: Duration = Duration::from_secs(600);
/// How each picture is to be drawn: as small as a job may be.
const SMALL: [&str; 6] = ["--num-inference-steps", "1", "--width", "64", "--height", "64"];

/// Pictures a second of each part in one repetition.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Rates {
    /// From `darkroom submit` to the last row, by the shipped programs.
    pub fleet: f64,
    /// Messages published with confirms.
    pub publish: f64,
    /// Messages consumed and acknowledged.
    pub consume: f64,
    /// Objects put.
    pub put: f64,
    /// The claiming and completing statements, nothing around them.
    pub claim_and_complete: f64,
    /// Image rows into a table that checks nothing.
    pub bare_rows: f64,
}

/// Milliseconds of processor time a picture in the fleet's run.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Costs {
    /// `darkroom submit`.
    pub submit: f64,
    /// `darkroom serve`.
    pub scheduler: f64,
    /// All of RabbitMQ.
    pub broker: f64,
    /// All of PostgreSQL.
    pub postgres: f64,
    /// The S3 server.
    pub s3: f64,
    /// All workers.
    pub workers: f64,
    /// PostgreSQL, not for a picture but for each look at a worker's leases on two microbatches: one a second.
    pub lease: f64,
}

/// Milliseconds of processor time a picture of each part alone: of the servers, and of this program as their client.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Alone {
    /// Messages published, consumed and acknowledged.
    pub broker: f64,
    /// Objects put.
    pub put: f64,
    /// The claiming and completing statements.
    pub claim_and_complete: f64,
}

/// Picks a cost.
type CostOf = fn(&Costs) -> f64;

/// What came of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// Pictures in each part and repetition.
    pub jobs: u32,
    /// Worker processes.
    pub workers: u32,
    /// The most pictures in a microbatch.
    pub microbatch: u32,
    /// Each repetition's rates.
    pub repetitions: Vec<Rates>,
    /// Each repetition's costs.
    pub costs: Vec<Costs>,
    /// Each repetition's costs of the parts alone.
    pub alone: Vec<Alone>,
}

/// The processes of the fleet's run.
const COSTS: [(&str, CostOf); 6] = [
    ("darkroom submit", |costs| costs.submit),
    ("darkroom serve", |costs| costs.scheduler),
    ("RabbitMQ", |costs| costs.broker),
    ("PostgreSQL", |costs| costs.postgres),
    ("S3 server", |costs| costs.s3),
    ("workers", |costs| costs.workers),
];

/// A running fleet without work, and the processes whose time is counted.
struct Running {
    fleet: Fleet,
    scheduler: Process,
    workers: Vec<Process>,
}

/// Runs all parts `repetitions` times.
///
/// # Panics
/// When any of them fails.
pub async fn run(size: Size, repetitions: u32, tell: impl Fn(&str)) -> Report {
    let servers = Arc::new(Servers::start());
    let alone = Fleet::new(servers.clone()).await;
    let mut report = Report {
        jobs: size.jobs,
        workers: size.workers,
        microbatch: size.microbatch,
        repetitions: Vec::new(),
        costs: Vec::new(),
        alone: Vec::new(),
    };
    // Of this program and all below it, the idle worker and scheduler with the servers: what a part costs alone.
    let used = || cpu::tree_seconds(std::process::id());
    let running = start(&servers, size).await;
    // Everything is connected, warm and has its statements prepared.
    one_batch(&running, size.jobs.min(500)).await;
    for repetition in 1..=repetitions {
        let (batch_id, fleet, costs) = one_batch(&running, size.jobs).await;
        let job_ids = parts::job_ids(&running.fleet, &batch_id).await;
        let png = any_object(&running.fleet, &batch_id).await;
        let mut marks = vec![used()];
        let (publish, consume) = parts::broker(&running.fleet, &job_ids, size).await;
        marks.push(used());
        let put = parts::puts(&running.fleet, &job_ids, &png, size).await;
        marks.push(used());
        // In a database of its own, where nobody else claims.
        let owed = alone.submit(&"a prompt\n".repeat(size.jobs as usize), &SMALL);
        let job_ids = parts::job_ids(&alone, &owed).await;
        marks.push(used());
        let claim_and_complete = parts::claim_and_complete(&alone, &job_ids, size).await;
        marks.push(used());
        let cost = |of: usize| (marks[of + 1] - marks[of]) * 1e3 / f64::from(size.jobs);
        let part_costs = Alone { broker: cost(0), put: cost(1), claim_and_complete: cost(3) };
        let bare_rows = parts::bare_rows(&alone, &owed, size).await;
        let held = alone.submit(&"a prompt\n".repeat(2 * size.microbatch as usize), &SMALL);
        let lease = parts::leases(&alone, &parts::job_ids(&alone, &held).await).await;
        let costs = Costs { lease, ..costs };
        let rates = Rates { fleet, publish, consume, put, claim_and_complete, bare_rows };
        tell(&format!("{repetition}/{repetitions}: {rates:.0?} {costs:.3?} {part_costs:.3?}"));
        report.alone.push(part_costs);
        report.repetitions.push(rates);
        report.costs.push(costs);
    }
    report
}

async fn start(servers: &Arc<Servers>, size: Size) -> Running {
    let fleet = Fleet::new(servers.clone()).await;
    // Beyond what is owed: the watermark is about cancelling soon, which nobody does here.
    let scheduler = fleet.serve_with(&[], &["--watermark", "10000"]);
    let microbatch = size.microbatch.to_string();
    let options = ["--max-microbatch", microbatch.as_str(), "--max-wait-ms", "20"];
    let workers: Vec<Process> = (0..size.workers).map(|_| fleet.solid_color_worker(0, &options)).collect();
    Running { fleet, scheduler, workers }
}

/// Submits a batch and waits for its end: its id, the pictures a second, and where the processor time went.
async fn one_batch(running: &Running, jobs: u32) -> (String, f64, Costs) {
    let Running { fleet, scheduler, workers } = running;
    let servers = fleet.servers();
    let used = || {
        let stack = cpu::own_seconds(servers.id());
        let broker = cpu::tree_seconds(servers.broker_pid().expect("the broker runs").as_raw() as u32);
        let postgres = cpu::tree_seconds(servers.postgres_pid().expect("Postgres runs").as_raw() as u32);
        let workers: f64 = workers.iter().map(|worker| cpu::own_seconds(worker.id())).sum();
        let submit = cpu::own_children_seconds();
        [submit, cpu::own_seconds(scheduler.id()), broker, postgres, stack, workers]
    };
    let before = used();
    let batch_id = fleet.submit(&"a prompt\n".repeat(jobs as usize), &SMALL);
    let submitted = used()[0];
    // Asked twenty times a second, so it has to cost next to nothing: one look into an index.
    let open = format!(
        "SELECT count(*) FROM (SELECT FROM jobs WHERE batch_id = '{batch_id}'
            AND state IN ('available', 'running', 'retryable') LIMIT 1) AS open"
    );
    fleet.await_count("all jobs to be final", &open, 0, DEADLINE).await;
    let mut after = used();
    after[0] = submitted;
    let cost = |index: usize| (after[index] - before[index]) * 1e3 / f64::from(jobs);
    let costs = Costs {
        submit: cost(0),
        scheduler: cost(1),
        broker: cost(2),
        postgres: cost(3),
        s3: cost(4),
        workers: cost(5),
        lease: 0.0,
    };
    // By the database's clock: from the submission's transaction to the last picture's.
    let milliseconds = format!(
        "SELECT (extract(epoch FROM max(images.created_at) - min(batches.created_at)) * 1000)::bigint
         FROM images JOIN batches USING (batch_id) WHERE batch_id = '{batch_id}'"
    );
    let milliseconds = fleet.count(&milliseconds).await;
    (batch_id, f64::from(jobs) * 1e3 / milliseconds as f64, costs)
}

/// The bytes of one of the batch's pictures.
async fn any_object(fleet: &Fleet, batch_id: &str) -> Vec<u8> {
    let row = fleet.images(batch_id).await.into_iter().next().expect("a picture");
    fleet.object(&row.object_key.expect("nothing is withheld here")).await
}

impl Report {
    fn median(&self, of: impl Fn(&Rates) -> f64) -> f64 {
        median(self.repetitions.iter().map(of).collect())
    }

    /// A cost's median over the repetitions.
    pub fn cost(&self, of: impl Fn(&Costs) -> f64) -> f64 {
        median(self.costs.iter().map(of).collect())
    }

    /// The fleet's rate.
    pub fn fleet(&self) -> f64 {
        self.median(|rates| rates.fleet)
    }

    /// Each part's name and rate alone.
    pub fn parts(&self) -> [(&'static str, f64); 5] {
        [
            ("broker: publish + confirm", self.median(|rates| rates.publish)),
            ("broker: consume + ack", self.median(|rates| rates.consume)),
            ("S3 server: PUT", self.median(|rates| rates.put)),
            ("Postgres: claim + complete", self.median(|rates| rates.claim_and_complete)),
            ("Postgres: bare rows", self.median(|rates| rates.bare_rows)),
        ]
    }

    /// What each part costs alone, in milliseconds of processor time a picture.
    pub fn costs_alone(&self) -> [(&'static str, f64); 3] {
        let middle = |of: fn(&Alone) -> f64| median(self.alone.iter().map(of).collect());
        [
            ("broker: publish to ack", middle(|alone| alone.broker)),
            ("S3 server: PUT", middle(|alone| alone.put)),
            ("Postgres: claim + complete", middle(|alone| alone.claim_and_complete)),
        ]
    }

    /// What the costliest part costs alone over what the fleet costs: the ratio of rates where only processors limit both. Unlike the
    /// rates it says the same on a machine that others use too.
    pub fn ratio_of_costs(&self) -> f64 {
        let costliest = self.costs_alone().iter().map(|(_, cost)| *cost).fold(0.0, f64::max);
        costliest / COSTS.iter().map(|(_, of)| self.cost(of)).sum::<f64>()
    }

    /// The fleet's rate over that of the slowest part.
    pub fn ratio(&self) -> f64 {
        self.fleet() / self.parts().iter().map(|(_, rate)| *rate).fold(f64::INFINITY, f64::min)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { jobs, workers, microbatch, repetitions, .. } = self;
        writeln!(
            f,
            "{jobs} pictures, {workers} workers, microbatches of up to {microbatch}, median of {}\n",
            repetitions.len()
        )?;
        writeln!(f, "{:30} {:>10} {:>18}", "", "pictures/s", "fleet / this alone")?;
        writeln!(f, "{:30} {:10.0}", "fleet, submit to last row", self.fleet())?;
        for (name, rate) in self.parts() {
            writeln!(f, "{name:30} {rate:10.0} {:18.2}", self.fleet() / rate)?;
        }
        writeln!(f, "\nof the slowest part alone: {:.0} %\n", self.ratio() * 100.0)?;
        writeln!(f, "processor time a picture in the fleet's run, ms")?;
        for (name, of) in COSTS {
            writeln!(f, "{name:30} {:10.3}", self.cost(of))?;
        }
        let total: f64 = COSTS.iter().map(|(_, of)| self.cost(of)).sum();
        writeln!(f, "{:30} {total:10.3}", "all")?;
        writeln!(f, "\nand of each part alone, its client included, ms")?;
        for (name, cost) in self.costs_alone() {
            writeln!(f, "{name:30} {cost:10.3}")?;
        }
        writeln!(
            f,
            "by processor time, of the costliest part alone: {:.0} %\n",
            self.ratio_of_costs() * 100.0
        )?;
        write!(f, "{:30} {:10.3}", "PostgreSQL, leases, a second", self.cost(|costs| costs.lease))
    }
}
