//! `darkroom watch`
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressState, ProgressStyle};
use schema::{BatchProgress, CatalogError, JobState, PgCatalog};
use tokio::time;

use super::{Outcome, batch, connect, counted, duration, unsigned};
use crate::cli::WatchArgs;
use crate::config::Settings;
use crate::terminal::{Terminal, printable};

/// Between two looks.
const INTERVAL: Duration = Duration::from_millis(500);
/// Without a terminal there is no bar; a line is printed this often at most.
const LINE_INTERVAL: Duration = Duration::from_secs(5);
/// A database that is away for longer is an error.
const PATIENCE: Duration = Duration::from_secs(120);
/// Discarded jobs to tell the reasons of.
const TOLD_REASONS: usize = 5;

pub(super) async fn run(arguments: &WatchArgs, settings: &Settings, terminal: Terminal) -> Result<Outcome> {
    let catalog = connect(settings).await?;
    let first = batch(&catalog, &arguments.batch).await?;
    let last = follow(&catalog, first, terminal).await?;
    terminal.show(&last, || summary(&last))?;
    if last.discarded == 0 {
        return Ok(Outcome::Done);
    }
    for reason in reasons(&catalog, &last).await? {
        terminal.tell(&reason);
    }
    Ok(Outcome::Incomplete)
}

/// Shows a bar, or lines, until every job is final.
async fn follow(catalog: &PgCatalog, first: BatchProgress, terminal: Terminal) -> Result<BatchProgress> {
    let bar = bar(&first)?;
    let draws = std::io::stderr().is_terminal();
    let (started, already) = (Instant::now(), first.final_count());
    let mut progress = first;
    let mut told: Option<(Instant, i64)> = None;
    let mut reached = Instant::now();
    let mut ticks = time::interval(INTERVAL);
    loop {
        bar.set_position(unsigned(progress.final_count()));
        bar.set_message(message(&progress));
        if progress.is_finished() {
            bar.finish_and_clear();
            return Ok(progress);
        }
        let is_news = told
            .is_none_or(|(when, count)| when.elapsed() >= LINE_INTERVAL && count != progress.final_count());
        if !draws && is_news {
            told = Some((Instant::now(), progress.final_count()));
            if terminal.json {
                terminal.show(&progress, String::new)?;
            } else {
                terminal.tell(&line(&progress, already, started.elapsed()));
            }
        }
        ticks.tick().await;
        match catalog.batch_progress(progress.batch_id).await {
            Ok(Some(now)) => (progress, reached) = (now, Instant::now()),
            Ok(None) => bail!("batch {} is gone", progress.batch_id),
            // A restart of the database is no reason to lose sight of the batch.
            Err(error) if error.is_transient() && reached.elapsed() < PATIENCE => {
                bar.set_message("waiting for the database");
            }
            Err(error) => return Err(lost(error)),
        }
    }
}

fn lost(error: CatalogError) -> anyhow::Error {
    anyhow::Error::from(error).context("lost sight of the batch; it goes on without us")
}

fn bar(progress: &BatchProgress) -> Result<ProgressBar> {
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len}  {rate}{msg}")
        .context("the bar's template is wrong")?
        .with_key("rate", |state: &ProgressState, output: &mut dyn std::fmt::Write| {
            // Before the first picture there is nothing to reckon with. A line that does not fit is no reason to stop.
            let rate = state.per_sec();
            if rate > 0.0 {
                let _ =
                    write!(output, "{rate:.2} pictures/s  {} left  ", duration(state.eta().as_secs_f64()));
            }
        })
        .progress_chars("=> ");
    let bar = ProgressBar::new(unsigned(progress.job_count)).with_style(style);
    // What was final before does not count for the rate.
    bar.set_position(unsigned(progress.final_count()));
    bar.reset_eta();
    Ok(bar)
}

fn message(progress: &BatchProgress) -> String {
    let counts = [
        (progress.running, "running"),
        (progress.flagged, "withheld"),
        (progress.retryable, "to be tried again"),
        (progress.discarded, "discarded"),
        (progress.cancelled, "cancelled"),
    ];
    let told = counts.iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}"));
    told.collect::<Vec<_>>().join(", ")
}

/// One line of progress, for those who look without a terminal.
fn line(progress: &BatchProgress, already: i64, elapsed: Duration) -> String {
    let mut line = format!("{}/{} pictures", progress.final_count(), progress.job_count);
    let rate = unsigned(progress.final_count() - already) as f64 / elapsed.as_secs_f64().max(0.001);
    if progress.final_count() > already {
        let left = unsigned(progress.job_count - progress.final_count()) as f64 / rate;
        line.push_str(&format!(", {rate:.2} pictures/s, {} left", duration(left)));
    }
    let message = message(progress);
    if !message.is_empty() {
        line.push_str(&format!(" ({message})"));
    }
    line
}

fn summary(progress: &BatchProgress) -> String {
    let drawn = unsigned(progress.completed - progress.flagged);
    let mut text = format!("batch {}: {} drawn", printable(&progress.name), counted(drawn, "picture"));
    for (count, what) in
        [(progress.flagged, "withheld"), (progress.discarded, "discarded"), (progress.cancelled, "cancelled")]
    {
        if count > 0 {
            text.push_str(&format!(", {count} {what}"));
        }
    }
    let (from, to) = (progress.first_started_at, progress.last_finalized_at);
    if let Some((from, to)) = from.zip(to).filter(|_| progress.completed > 0) {
        let seconds = (to - from).num_milliseconds() as f64 / 1000.0;
        let rate = unsigned(progress.completed) as f64 / seconds.max(0.001);
        text.push_str(&format!(", in {} ({rate:.2} pictures/s)", duration(seconds)));
    }
    text
}

/// Why the first discarded jobs were discarded.
async fn reasons(catalog: &PgCatalog, progress: &BatchProgress) -> Result<Vec<String>> {
    let mut reasons = Vec::new();
    let mut after = None;
    while reasons.len() < TOLD_REASONS {
        let page = catalog.batch_results(progress.batch_id, after, 500).await?;
        let Some(last) = page.last() else { break };
        after = Some(last.ordinal);
        for result in page.iter().filter(|result| result.state == JobState::Discarded) {
            let class = result.error_class.map_or("error", schema::ErrorClass::as_str);
            let message = printable(result.error_message.as_deref().unwrap_or("no message"));
            reasons.push(format!("job {} was discarded ({class}): {message}", result.ordinal));
        }
    }
    reasons.truncate(TOLD_REASONS);
    Ok(reasons)
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, TimeDelta};
    use schema::{BatchId, PriorityBand};

    use super::*;

    fn progress() -> BatchProgress {
        let start = DateTime::UNIX_EPOCH;
        BatchProgress {
            batch_id: BatchId::generate(),
            name: "demo".to_owned(),
            principal: "ann".to_owned(),
            model: "demo".parse().unwrap(),
            band: PriorityBand::Normal,
            job_count: 24,
            available: 2,
            running: 2,
            retryable: 0,
            completed: 19,
            cancelled: 0,
            discarded: 1,
            flagged: 3,
            created_at: start,
            cancelled_at: None,
            first_started_at: Some(start),
            first_finalized_at: Some(start),
            last_finalized_at: Some(start + TimeDelta::seconds(95)),
        }
    }

    #[test]
    fn progress_is_told_in_one_line() {
        let told = line(&progress(), 10, Duration::from_secs(20));
        insta::assert_snapshot!(told, @"20/24 pictures, 0.50 pictures/s, 8.0 s left (2 running, 3 withheld, 1 discarded)");
        let nothing_yet = line(&progress(), 20, Duration::from_secs(20));
        insta::assert_snapshot!(nothing_yet, @"20/24 pictures (2 running, 3 withheld, 1 discarded)");
    }

    #[test]
    fn the_summary_has_counts_time_and_rate() {
        insta::assert_snapshot!(summary(&progress()), @"batch demo: 16 pictures drawn, 3 withheld, 1 discarded, in 1 m 35 s (0.20 pictures/s)");
        let cancelled = BatchProgress { completed: 0, flagged: 0, discarded: 0, cancelled: 24, ..progress() };
        insta::assert_snapshot!(summary(&cancelled), @"batch demo: 0 pictures drawn, 24 cancelled");
    }
}
