//! The rows of a batch's jobs, streamed by COPY: a hundred thousand of them take seconds.

use sqlx::PgConnection;

use super::{NewBatch, NewJob, max_attempts};
use crate::catalog::copy::BinaryRows;
use crate::id::{BatchId, JobId, ModelId};

/// Bytes of rows sent at a time: large enough to make the sends few, small enough to keep memory flat.
const COPY_CHUNK: usize = 256 * 1024;

/// The columns that are sent, in the order in which they are sent.
const JOB_COLUMNS: &str = "job_id, batch_id, model_id, ordinal, source_line, client_ref, band, prompt, \
    negative_prompt, seed, num_inference_steps, guidance_scale, width, height, noise_scheduler, guidance_start, \
    guidance_stop, cache_interval, max_attempts, traceparent";
const JOB_COLUMN_COUNT: i16 = 20;

/// Writes `jobs` as the jobs of batch `batch_id`, by one COPY.
pub(super) async fn copy_jobs(
    connection: &mut PgConnection,
    new: &NewBatch,
    model_id: ModelId,
    batch_id: BatchId,
    jobs: &[NewJob],
) -> Result<(), sqlx::Error> {
    let signed = |number: u32| i32::try_from(number).expect("limits::MAX_* and line numbers fit 31 bits");
    let statement = format!("COPY jobs ({JOB_COLUMNS}) FROM STDIN WITH (FORMAT binary)");
    let mut copy = connection.copy_in_raw(&statement).await?;
    let mut rows = BinaryRows::new();
    for (ordinal, job) in (0_u32..).zip(jobs) {
        let spec = &job.spec;
        rows.begin_row(JOB_COLUMN_COUNT);
        rows.uuid(JobId::of(batch_id, ordinal).as_uuid());
        rows.uuid(batch_id.as_uuid());
        rows.uuid(model_id.as_uuid());
        rows.integer(signed(ordinal));
        rows.optional_integer(job.source_line.map(|line| i32::try_from(line).unwrap_or(i32::MAX)));
        rows.optional_text(spec.client_ref());
        rows.text(new.band.as_str());
        rows.text(spec.prompt());
        rows.text(spec.negative_prompt());
        rows.bigint(i64::from(spec.seed()));
        rows.integer(signed(spec.num_inference_steps()));
        rows.real(spec.guidance_scale());
        rows.integer(signed(spec.width()));
        rows.integer(signed(spec.height()));
        rows.text(spec.noise_scheduler().as_str());
        let recipe = spec.recipe();
        rows.double(recipe.guidance_start);
        rows.double(recipe.guidance_stop);
        rows.integer(signed(recipe.cache_interval));
        rows.smallint(max_attempts(new));
        rows.optional_text(new.traceparent.as_deref());
        if rows.len() >= COPY_CHUNK {
            copy.send(rows.take()).await?;
        }
    }
    rows.finish();
    copy.send(rows.take()).await?;
    copy.finish().await?;
    Ok(())
}
