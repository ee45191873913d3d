//! Waiting between tries: doubling, capped, with full jitter, so that a fleet that lost the same server does not come
//! back to it in one wave.

use std::future::Future;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tracing::warn;

/// The delays of one series of tries.
#[derive(Debug, Clone)]
pub struct Backoff {
    next: Duration,
    cap: Duration,
}

impl Backoff {
    /// A series whose first delay is at most `first` and whose later ones are at most `cap`.
    pub fn new(first: Duration, cap: Duration) -> Self {
        Self { next: first, cap }
    }

    /// For servers that are restarted or fail over: 200 ms, doubling up to 10 s.
    pub fn for_server() -> Self {
        Self::new(Duration::from_millis(200), Duration::from_secs(10))
    }

    /// The next delay: between half and all of the current ceiling (never near zero, so that a refused connection
    /// does not become a busy loop), and the ceiling doubles.
    pub fn next_delay(&mut self) -> Duration {
        let ceiling = self.next;
        self.next = (self.next * 2).min(self.cap);
        ceiling.mul_f64(rand::random_range(0.5..=1.0))
    }
}

/// How long a call to a server that is away is tried again.
#[derive(Debug, Clone)]
pub struct Patience {
    /// No try begins later than this after the first.
    pub limit: Duration,
    /// Ends the waiting at once.
    pub give_up: CancellationToken,
}

impl Patience {
    /// Calls until it succeeds, fails in a way that waiting cannot cure, or the patience is over; then the last error
    /// is the answer. There is always a first try.
    pub async fn insist<T, E, F>(
        &self,
        what: &str,
        can_waiting_help: impl Fn(&E) -> bool,
        mut call: impl FnMut() -> F,
    ) -> Result<T, E>
    where
        F: Future<Output = Result<T, E>>,
        E: std::error::Error,
    {
        let deadline = Instant::now() + self.limit;
        let mut backoff = Backoff::for_server();
        loop {
            let error = match call().await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            let delay = backoff.next_delay();
            if !can_waiting_help(&error) || Instant::now() + delay > deadline || self.give_up.is_cancelled() {
                return Err(error);
            }
            warn!(error = %Chain(&error), "Cannot {what} now, trying again in {delay:?}");
            tokio::select! {
                () = sleep(delay) => {}
                () = self.give_up.cancelled() => return Err(error),
            }
        }
    }
}

/// Shows an error with all its causes, `: ` between them.
pub struct Chain<'a>(pub &'a dyn std::error::Error);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(cause) = source {
            write!(f, ": {cause}")?;
            source = cause.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_up_to_the_cap_and_are_never_tiny() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_millis(450));
        for ceiling in [100, 200, 400, 450, 450] {
            let delay = backoff.next_delay();
            assert!(delay <= Duration::from_millis(ceiling), "{delay:?} is above {ceiling} ms");
            assert!(delay >= Duration::from_millis(ceiling / 2), "{delay:?} is below half of {ceiling} ms");
        }
    }
}
