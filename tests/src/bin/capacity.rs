//! `capacity FILE.json FILE.png`: from what `bench-fleet` measured, what larger fleets could do (`CAPACITY_CORES` of Postgres).
#![expect(clippy::print_stdout, reason = "a program whose output is its report")]

use anyhow::{Context, Result};
use fleet_tests::bench_fleet::Report;
use fleet_tests::capacity::{Demands, Machines, curves, plot};
use fleet_tests::setting;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let measured = arguments.next().context("first argument: the JSON that bench-fleet wrote")?;
    let picture = arguments.next().context("second argument: the PNG to write")?;
    let text = std::fs::read_to_string(&measured).with_context(|| format!("cannot read {measured}"))?;
    let report: Report = serde_json::from_str(&text).with_context(|| format!("{measured} is no report"))?;
    let machines = Machines { postgres_cores: setting("CAPACITY_CORES", 2)? as usize };
    let demands = Demands::of(&report);
    println!("{demands:#?}\n");
    let curves = curves(demands, machines);
    for curve in &curves {
        println!("{curve}\n");
    }
    let title = format!("One scheduler, one broker, one Postgres on {} cores", machines.postgres_cores);
    plot::draw(&title, &curves).save(&picture).with_context(|| format!("cannot write {picture}"))?;
    Ok(())
}
