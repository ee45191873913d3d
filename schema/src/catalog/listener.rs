//! Wake-ups from the catalog, so that loops need not wait for their timers.
//!
//! A notification is a hint: Postgres drops those that nobody listens to, and a lost connection loses some. Whoever
//! listens also looks by itself now and then.

use sqlx::postgres::PgListener;

use super::connection::PgCatalog;
use super::error::CatalogError;
use crate::id::{BatchId, JobId};

const JOBS: &str = "darkroom_jobs";
const CANCELLED: &str = "darkroom_cancelled";

/// Something happened in the catalog.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CatalogNotice {
    /// Some jobs became available.
    JobsAvailable,
    /// A batch was cancelled.
    BatchCancelled(BatchId),
    /// A job was cancelled.
    JobCancelled(JobId),
    /// The connection was lost and is back: notices may be missing, so look for yourself.
    Reconnected,
}

/// A connection that waits for notices.
#[derive(Debug)]
pub struct CatalogListener {
    listener: PgListener,
}

impl PgCatalog {
    /// Starts listening, on a connection of its own.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn listen(&self) -> Result<CatalogListener, CatalogError> {
        let mut listener = PgListener::connect_with(&self.pool).await?;
        listener.listen_all([JOBS, CANCELLED]).await?;
        Ok(CatalogListener { listener })
    }
}

impl CatalogListener {
    /// Waits for the next notice. Dropping the future loses none.
    ///
    /// # Errors
    /// When the connection is lost and cannot be made again; call again after a pause.
    pub async fn next(&mut self) -> Result<CatalogNotice, CatalogError> {
        loop {
            match self.listener.try_recv().await? {
                None => return Ok(CatalogNotice::Reconnected),
                Some(notification) => {
                    // A later build may send what this one does not know.
                    if let Some(notice) = parse(notification.channel(), notification.payload()) {
                        return Ok(notice);
                    }
                }
            }
        }
    }
}

fn parse(channel: &str, payload: &str) -> Option<CatalogNotice> {
    match (channel, payload.split_once(':')) {
        (JOBS, _) => Some(CatalogNotice::JobsAvailable),
        (CANCELLED, Some(("batch", id))) => id.parse().ok().map(CatalogNotice::BatchCancelled),
        (CANCELLED, Some(("job", id))) => id.parse().ok().map(CatalogNotice::JobCancelled),
        _ => None,
    }
}
