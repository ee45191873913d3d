//! Whether this worker is fit to draw: one that meets the same fault with job after job has a fault of its own.
//!
//! A bad card or a full disk fails every job that it is given, quickly, and would burn a whole queue's attempts. So the
//! completer reports how each picture ended; a row of equal faults of the machine, each with another job and with nothing
//! finished in between, makes the worker hand back what it holds, say that it is unfit, and exit.

use std::collections::HashSet;
use std::sync::Mutex;

use schema::{ErrorClass, Failure, JobId};
use tokio::sync::watch;

/// Watches for a row of equal faults.
#[derive(Debug)]
pub struct Fitness {
    limit: usize,
    /// Written and read by the completer alone; a mutex because it works on several pictures at once.
    row: Mutex<Option<Row>>,
    /// Set once, by the completer; read by the supervisor in `run.rs`.
    verdict: watch::Sender<Option<String>>,
}

#[derive(Debug)]
struct Row {
    class: ErrorClass,
    message: String,
    job_ids: HashSet<JobId>,
}

impl Fitness {
    /// Unfit after `limit` jobs in a row failed alike (at least 2: one job proves nothing).
    pub fn new(limit: usize) -> Self {
        Self { limit: limit.max(2), row: Mutex::new(None), verdict: watch::Sender::new(None) }
    }

    /// A picture was drawn and stored.
    pub fn succeeded(&self) {
        *self.row() = None;
    }

    /// An attempt at `job_id` failed. True if this makes the worker unfit: then the job is not to be charged.
    pub fn failed(&self, job_id: JobId, failure: &Failure) -> bool {
        if !is_of_the_machine(failure.class) {
            return self.is_unfit();
        }
        let mut row = self.row();
        match &mut *row {
            Some(row) if row.class == failure.class && row.message == failure.message => {
                row.job_ids.insert(job_id);
                if row.job_ids.len() >= self.limit {
                    let reason = format!("{} jobs in a row failed alike: {}", row.job_ids.len(), row.message);
                    self.verdict.send_if_modified(|verdict| {
                        let is_first = verdict.is_none();
                        verdict.get_or_insert(reason);
                        is_first
                    });
                }
            }
            _ => {
                let (class, message) = (failure.class, failure.message.clone());
                *row = Some(Row { class, message, job_ids: HashSet::from([job_id]) });
            }
        }
        self.is_unfit()
    }

    /// Whether the worker was found unfit.
    pub fn is_unfit(&self) -> bool {
        self.verdict.borrow().is_some()
    }

    /// Waits until the worker is found unfit, and says why.
    pub async fn unfit(&self) -> String {
        let mut verdict = self.verdict.subscribe();
        let reason = verdict.wait_for(Option::is_some).await.ok().and_then(|reason| reason.clone());
        match reason {
            Some(reason) => reason,
            // The sender is ours, so it is not gone.
            None => std::future::pending().await,
        }
    }

    fn row(&self) -> std::sync::MutexGuard<'_, Option<Row>> {
        self.row.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Faults that tell of the machine as much as of the job.
fn is_of_the_machine(class: ErrorClass) -> bool {
    match class {
        ErrorClass::Infra | ErrorClass::OutOfMemory | ErrorClass::NonFinite | ErrorClass::Bug => true,
        ErrorClass::Input | ErrorClass::Safety => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use schema::BatchId;

    fn failure(class: ErrorClass, message: &str) -> Failure {
        Failure { class, message: message.to_owned(), can_retry_help: true }
    }

    #[test]
    fn only_equal_faults_of_different_jobs_in_a_row_count() {
        let batch_id = BatchId::generate();
        let job = |ordinal| JobId::of(batch_id, ordinal);
        let (full, nan) = (failure(ErrorClass::OutOfMemory, "full"), failure(ErrorClass::NonFinite, "nan"));
        let fitness = Fitness::new(3);
        assert!(!fitness.failed(job(0), &full));
        assert!(!fitness.failed(job(0), &full), "one job again is one job");
        assert!(!fitness.failed(job(1), &full));
        fitness.succeeded();
        assert!(!fitness.failed(job(2), &full), "a picture in between ends the row");
        assert!(!fitness.failed(job(3), &full));
        assert!(!fitness.failed(job(4), &nan), "another fault begins another row");
        assert!(!fitness.failed(job(5), &full));
        assert!(!fitness.failed(job(6), &failure(ErrorClass::Input, "full")), "that is the job's own fault");
        assert!(!fitness.failed(job(7), &full));
        assert!(fitness.failed(job(8), &full));
        assert!(fitness.failed(job(9), &nan), "once unfit, unfit");
    }

    #[tokio::test]
    async fn the_reason_is_told() {
        let (fitness, batch_id) = (Fitness::new(2), BatchId::generate());
        for ordinal in 0..2 {
            fitness.failed(JobId::of(batch_id, ordinal), &failure(ErrorClass::Infra, "the device failed"));
        }
        assert_eq!(fitness.unfit().await, "2 jobs in a row failed alike: the device failed");
    }
}
