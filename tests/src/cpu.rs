//! How much processor time a process and all below it have used, as Linux counts it.

use std::collections::HashMap;
use std::fs;
use std::ops::Range;

use crate::process::stat;

/// Clock ticks in a second, as Linux reports them to programs on every architecture it runs servers on.
const TICKS: f64 = 100.0;

/// Fields of [`stat`].
const PARENT: usize = 1;
const TIMES: Range<usize> = 11..15;
/// Of [`TIMES`], those of children that were waited for.
const CHILDRENS_TIMES: Range<usize> = 13..15;

/// Every process's parent and its used seconds, those of children it has waited for included.
fn processes() -> HashMap<u32, (u32, f64)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let process = |entry: fs::DirEntry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        Some((pid, read(pid)?))
    };
    entries.filter_map(process).collect()
}

fn read(pid: u32) -> Option<(u32, f64)> {
    let fields = stat(pid)?;
    Some((fields.get(PARENT)?.parse().ok()?, seconds(fields.get(TIMES)?)))
}

/// The sum of times in ticks.
fn seconds(fields: &[String]) -> f64 {
    fields.iter().filter_map(|field| field.parse::<f64>().ok()).sum::<f64>() / TICKS
}

/// Seconds that `pid` alone has used, with children that have ended.
pub fn own_seconds(pid: u32) -> f64 {
    read(pid).map_or(0.0, |(_, seconds)| seconds)
}

/// Seconds that the children of this process have used which have ended and were waited for.
pub fn own_children_seconds() -> f64 {
    stat(std::process::id()).as_ref().and_then(|fields| fields.get(CHILDRENS_TIMES)).map_or(0.0, seconds)
}

/// Seconds that `pid` and everything below it have used.
pub fn tree_seconds(pid: u32) -> f64 {
    let processes = processes();
    let below = |mut of: u32| loop {
        if of == pid {
            return true;
        }
        match processes.get(&of) {
            Some((parent, _)) if *parent != 0 => of = *parent,
            _ => return false,
        }
    };
    processes.iter().filter(|(process, _)| below(**process)).map(|(_, (_, seconds))| seconds).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_childs_work_is_the_trees() {
        let own = std::process::id();
        let before = tree_seconds(own);
        // Until the kernel has counted it: a fifth of a second of work, however long the machine takes for that.
        let mut child = Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
        while own_seconds(child.id()) < 0.2 {
            std::thread::yield_now();
        }
        assert!(tree_seconds(own) - before >= 0.2, "a running child's time is missing");
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(tree_seconds(own) - before >= 0.2, "an ended child's time is missing");
    }
}
