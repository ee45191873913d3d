//! The republisher: notices messages that the broker has lost, and lets the relay publish their jobs again.
//!
//! Postgres knows which jobs were published and never claimed. If that was long ago and the queue is empty, then
//! the messages are gone, or a worker holds them in its prefetch. It cannot tell the two apart and need not: a second
//! message for the same job is harmless, and it makes the queue non-empty, so there is no third.
use std::time::Duration;

use anyhow::{Context, Result};
use schema::{Model, PriorityBand, job_queue};
use serde::Serialize;
use tracing::warn;

use crate::queue::Queue;
use crate::relay::Backlog;

/// What one run did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RepublisherReport {
    /// Jobs whose messages were given up, to be published again.
    pub unpublished: u64,
}

/// Looks at every queue once. Messages count as lost if the queue is empty `older_than` after they were published, or
/// at once if there is no such queue.
///
/// # Errors
/// If the catalog or the broker cannot be asked.
pub async fn run_once(
    backlog: &impl Backlog,
    queue: &impl Queue,
    older_than: Duration,
) -> Result<RepublisherReport> {
    let mut report = RepublisherReport::default();
    let mut failed = None;
    for model in backlog.models().await? {
        for &band in PriorityBand::ALL {
            // One queue that fails does not keep the others waiting.
            match look_at(backlog, queue, &model, band, older_than).await {
                Ok(lost) => report.unpublished += lost,
                Err(error) => {
                    failed.get_or_insert(error);
                }
            }
        }
    }
    failed.map_or(Ok(report), Err)
}

/// Gives up the messages of one queue if they are lost; how many those were.
async fn look_at(
    backlog: &impl Backlog,
    queue: &impl Queue,
    model: &Model,
    band: PriorityBand,
    older_than: Duration,
) -> Result<u64> {
    // The cheap question first: most queues have nothing on the way.
    if backlog.published_unclaimed_count(model.model_id, band).await? == 0 {
        return Ok(0);
    }
    let name = job_queue(&model.name, band).name;
    let ready = queue.ready_count(&name).await.with_context(|| format!("cannot count the queue {name}"))?;
    let older_than = match ready {
        Some(0) => older_than,
        None => Duration::ZERO,
        Some(_) => return Ok(0),
    };
    let lost = backlog.republish_if_unclaimed_for(model.model_id, band, older_than).await?;
    if lost > 0 {
        warn!(queue.name = name, lost, "The broker lost {lost} messages of {name}; publishing them again");
    }
    Ok(lost)
}

/// How many published jobs nobody has claimed although their queue is empty or gone: what [`run_once`] would look at,
/// however long ago they were published.
///
/// # Errors
/// If the catalog or the broker cannot be asked.
pub async fn suspected(backlog: &impl Backlog, queue: &impl Queue) -> Result<u64> {
    let mut suspected = 0;
    for model in backlog.models().await? {
        for &band in PriorityBand::ALL {
            let unclaimed = backlog.published_unclaimed_count(model.model_id, band).await?;
            let name = job_queue(&model.name, band).name;
            if unclaimed > 0 && matches!(queue.ready_count(&name).await?, None | Some(0)) {
                suspected += unclaimed;
            }
        }
    }
    Ok(suspected)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::relay::fakes::{FakeBacklog, FakeQueue};

    const LONG: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn only_an_empty_queue_has_lost_its_messages() {
        let backlog = FakeBacklog::with_jobs(4);
        backlog.mark_all_published();
        let queue = FakeQueue::default();
        queue.set_ready(Some(1));
        run_once(&backlog, &queue, LONG).await.unwrap();
        assert!(backlog.republished_after().is_empty());
        assert_eq!(suspected(&backlog, &queue).await.unwrap(), 0);

        queue.set_ready(Some(0));
        assert_eq!(suspected(&backlog, &queue).await.unwrap(), 4);
        let report = run_once(&backlog, &queue, LONG).await.unwrap();
        assert_eq!(report, RepublisherReport { unpublished: 4 });
        assert_eq!(backlog.republished_after(), [LONG]);
    }

    #[tokio::test]
    async fn a_queue_that_is_gone_took_everything_with_it() {
        let backlog = FakeBacklog::with_jobs(2);
        backlog.mark_all_published();
        let queue = FakeQueue::default();
        queue.set_ready(None);
        run_once(&backlog, &queue, LONG).await.unwrap();
        assert_eq!(backlog.republished_after(), [Duration::ZERO]);
    }

    #[tokio::test]
    async fn nothing_on_the_way_asks_the_broker_nothing() {
        let queue = FakeQueue::default();
        run_once(&FakeBacklog::with_jobs(2), &queue, LONG).await.unwrap();
        assert_eq!(queue.questions(), 0);
    }
}
