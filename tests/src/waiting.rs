//! Waiting for a condition, with a deadline whose message says what was last seen.

use std::fmt::Debug;
use std::future::Future;
use std::time::{Duration, Instant};

/// How often a condition that nobody announces is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Calls `observe` until `holds` accepts what it saw, and returns that.
///
/// # Panics
/// After `deadline`, with `what` and the last observation.
pub async fn eventually<T, F>(
    what: &str,
    deadline: Duration,
    mut observe: impl FnMut() -> F,
    holds: impl Fn(&T) -> bool,
) -> T
where
    T: Debug,
    F: Future<Output = T>,
{
    let started = Instant::now();
    let mut ticks = tokio::time::interval(LOOK_EVERY);
    loop {
        ticks.tick().await;
        let seen = observe().await;
        if holds(&seen) {
            return seen;
        }
        assert!(started.elapsed() < deadline, "waited {deadline:?} for {what}; last seen: {seen:?}");
    }
}
