//! `capacity FILE.png FILE.json...`: from what `bench-fleet` measured, with one or several sizes of microbatches, what larger fleets could
//! do (`CAPACITY_CORES` of Postgres).
#![expect(clippy::print_stdout, reason = "a program whose output is its report")]

use anyhow::{Context, Result, ensure};
use fleet_tests::bench_fleet::Report;
use fleet_tests::capacity::{Demands, Machines, curves, plot};
use fleet_tests::setting;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let picture = arguments.next().context("first argument: the PNG to write")?;
    let read = |measured: String| -> Result<Report> {
        let text = std::fs::read_to_string(&measured).with_context(|| format!("cannot read {measured}"))?;
        serde_json::from_str(&text).with_context(|| format!("{measured} is no report"))
    };
    let reports = arguments.map(read).collect::<Result<Vec<Report>>>()?;
    ensure!(!reports.is_empty(), "further arguments: the JSON files that bench-fleet wrote");
    let demands = |workload| Demands::nearest(&reports, workload).expect("there is a report");
    let machines = Machines { postgres_cores: setting("CAPACITY_CORES", 2)? as usize };
    let curves = curves(demands, machines);
    for curve in &curves {
        println!("{curve}\n{:?}\n", curve.demands);
    }
    let title = format!("One scheduler, one broker, one Postgres on {} cores", machines.postgres_cores);
    plot::draw(&title, &curves).save(&picture).with_context(|| format!("cannot write {picture}"))?;
    Ok(())
}
