//! Kill points: named places between two steps at which a test can end the process, as a crash there would.
//!
//! Without the feature `failpoints`, which nothing that ships has, all of this is empty. With it, a process reads
//! `FAILPOINTS` once, in crate `fail`'s syntax: `completer::after_store=return` ends it with SIGABRT the first time it
//! gets there, `completer::after_store=2*off->return` the third time, and `…=sleep(1000)` holds it there for a second.
//! It lies in this crate because every process has such places, and the one before a commit is in here.

/// Reads `FAILPOINTS`. To be called once, at the start.
pub fn arm() {
    // Dropping the scenario would disarm all points again.
    #[cfg(feature = "failpoints")]
    std::mem::forget(fail::FailScenario::setup());
}

/// Ends the process here if a test says so.
pub fn reached(name: &'static str) {
    #[cfg(feature = "failpoints")]
    fail::fail_point!(name, |_| std::process::abort());
    #[cfg(not(feature = "failpoints"))]
    let _ = name;
}
