//! What one scheduler, one Postgres and one broker carry, computed from what `bench-fleet` measured.
//!
//! A discrete-event simulation ([`simulation`]) of many GPUs around three servers: the broker's queue (one at a time, as a
//! quorum queue's leader works), Postgres (as many at a time as it has cores) and the scheduler's relay (which publishes a chunk
//! through the broker while Postgres marks the one before). How long each serves a microbatch is the processor time that `bench-fleet` measured
//! for it. What the model leaves out, and which way that errs: the network and the disk (on the measured machine the
//! commits' flushes are in none of the processor times), Postgres' growth with its tables and connections, and S3, which is
//! somebody else's to scale. So its numbers are an upper bound that says what binds first, not a promise.

pub mod plot;
pub mod simulation;

use std::fmt;

use crate::bench_fleet::Report;
pub use simulation::{Outcome, Servers, Workload};

/// What a picture, a microbatch and a second of a GPU ask of each server, in seconds of one core.
#[derive(Debug, Clone, Copy)]
pub struct Demands {
    /// Postgres, for each picture: its row written, published, claimed and completed.
    pub postgres: f64,
    /// Postgres, for each second that a GPU holds leases.
    pub postgres_lease: f64,
    /// The broker, for each message: in, out, acknowledged.
    pub broker: f64,
    /// The scheduler, for each message that it publishes.
    pub relay: f64,
}

/// Machines to simulate on.
#[derive(Debug, Clone, Copy)]
pub struct Machines {
    /// Cores that Postgres has for itself.
    pub postgres_cores: usize,
}

/// Kinds of GPUs that are fed.
pub const SPEEDS: [(&str, Workload); 2] = [
    ("2 s a picture", Workload { pictures_per_second: 0.5, microbatch: 4 }),
    ("6 pictures/s", Workload { pictures_per_second: 6.0, microbatch: 16 }),
];

/// Fleet sizes.
pub const GPUS: [usize; 12] = [10, 25, 50, 100, 200, 400, 800, 1_200, 1_600, 2_400, 3_200, 6_400];

/// Seconds simulated for each point, after a quarter of that to settle.
const SECONDS: f64 = 120.0;

/// One point of the plot.
#[derive(Debug, Clone, Copy)]
pub struct Point {
    /// GPUs around the servers.
    pub gpus: usize,
    /// What came of it.
    pub outcome: Outcome,
}

/// One kind of GPU over all fleet sizes.
#[derive(Debug, Clone)]
pub struct Curve {
    /// The kind.
    pub name: &'static str,
    /// What each does.
    pub workload: Workload,
    /// What it asks of the servers.
    pub demands: Demands,
    /// From small to large.
    pub points: Vec<Point>,
}

impl Demands {
    /// From a measurement.
    pub fn of(report: &Report) -> Self {
        Self {
            postgres: report.cost(|costs| costs.postgres) / 1e3,
            postgres_lease: report.cost(|costs| costs.lease) / 1e3,
            broker: report.cost(|costs| costs.broker) / 1e3,
            relay: report.cost(|costs| costs.scheduler) / 1e3,
        }
    }

    /// From that of several measurements whose microbatches are nearest to the workload's: a small one costs Postgres more a
    /// picture. `None` without any.
    pub fn nearest(reports: &[Report], workload: Workload) -> Option<Self> {
        let distance = |report: &&Report| (report.microbatch as usize).abs_diff(workload.microbatch);
        reports.iter().min_by_key(distance).map(Self::of)
    }
}

/// Simulates every kind of GPU at every fleet size, with the costs that `demands` gives for its microbatches.
pub fn curves(demands: impl Fn(Workload) -> Demands, machines: Machines) -> Vec<Curve> {
    let curve = |&(name, workload): &(&'static str, Workload)| {
        let demands = demands(workload);
        let servers = Servers { demands, postgres_cores: machines.postgres_cores };
        let point =
            |&gpus: &usize| Point { gpus, outcome: simulation::run(servers, workload, gpus, SECONDS) };
        Curve { name, workload, demands, points: GPUS.iter().map(point).collect() }
    };
    SPEEDS.iter().map(curve).collect()
}

impl Curve {
    /// The largest fleet of those simulated whose GPUs draw at least 97 % of the time.
    pub fn fed(&self) -> Option<Point> {
        self.points.iter().rev().find(|point| point.outcome.gpu_share >= 0.97).copied()
    }

    /// What is busiest in the smallest fleet that is not fed.
    pub fn binds_first(&self) -> &'static str {
        let hungry = self.points.iter().find(|point| point.outcome.gpu_share < 0.97);
        hungry.map_or("nothing", |point| point.outcome.busiest())
    }
}

impl fmt::Display for Curve {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}, microbatches of {}", self.name, self.workload.microbatch)?;
        writeln!(
            f,
            "{:>6} {:>11} {:>12} {:>10} {:>8} {:>7}  busiest",
            "GPUs", "pictures/s", "GPUs draw", "Postgres", "broker", "relay"
        )?;
        for Point { gpus, outcome } in &self.points {
            let Outcome { rate, gpu_share, postgres, broker, relay } = *outcome;
            writeln!(
                f,
                "{gpus:6} {rate:11.0} {:10.1} % {:8.0} % {:6.0} % {:5.0} %  {}",
                gpu_share * 100.0,
                postgres * 100.0,
                broker * 100.0,
                relay * 100.0,
                outcome.busiest()
            )?;
        }
        match self.fed() {
            Some(Point { gpus, .. }) => {
                write!(f, "fed at 97 % or more: {gpus} GPUs; then {} binds", self.binds_first())
            }
            None => write!(f, "fed at 97 % or more: none of these"),
        }
    }
}
