//! Messages that nobody could read, kept where people can ask for them.

use super::connection::PgCatalog;
use super::error::CatalogError;
use crate::sha256::Sha256Digest;

/// What is kept of a body; ours have some hundred bytes.
const KEPT_BYTES: usize = 64 * 1024;

/// A message out of the dead-letter queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadLetter {
    /// The queue that it was given up in.
    pub queue: String,
    /// Why, in the broker's word.
    pub reason: String,
    /// The whole body.
    pub body: Vec<u8>,
}

impl PgCatalog {
    /// Records `letters`. Equal messages from one queue are one row with a count, so a repetition after an unknown
    /// outcome adds no row.
    ///
    /// # Errors
    /// When Postgres fails; then none is recorded.
    pub async fn record_dead_letters(&self, letters: &[DeadLetter]) -> Result<(), CatalogError> {
        // Grouped first, because one statement may not meet the same row twice; ordered, so that two schedulers wait
        // for each other in one direction only.
        let sql = "
            INSERT INTO dead_letters (queue, reason, body_sha256, size_bytes, body, seen_count)
            SELECT queue, reason, body_sha256, max(size_bytes), (array_agg(body))[1], count(*)
            FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::bytea[])
                AS given (queue, reason, body_sha256, size_bytes, body)
            GROUP BY queue, reason, body_sha256
            ORDER BY queue, reason, body_sha256
            ON CONFLICT (queue, reason, body_sha256) DO UPDATE
            SET seen_count = dead_letters.seen_count + excluded.seen_count, last_seen_at = now()";
        // Text in Postgres holds no zero bytes, and a queue's name may.
        let text = |text: &str| text.replace('\0', "\u{fffd}");
        let queues: Vec<String> = letters.iter().map(|letter| text(&letter.queue)).collect();
        let reasons: Vec<String> = letters.iter().map(|letter| text(&letter.reason)).collect();
        let digests: Vec<String> =
            letters.iter().map(|letter| Sha256Digest::of(&letter.body).to_string()).collect();
        let sizes: Vec<i64> =
            letters.iter().map(|letter| i64::try_from(letter.body.len()).unwrap_or(i64::MAX)).collect();
        let bodies: Vec<&[u8]> =
            letters.iter().map(|letter| &letter.body[..letter.body.len().min(KEPT_BYTES)]).collect();
        sqlx::query(sql)
            .bind(queues)
            .bind(reasons)
            .bind(digests)
            .bind(sizes)
            .bind(bodies)
            .execute(&self.pool)
            .await?;
        Ok(())
    }
}
