//! `darkroom fetch`
use std::path::Path;

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use schema::{BatchProgress, PgCatalog};
use serde_json::json;

use super::{Outcome, batch, connect, counted, unsigned};
use crate::cli::FetchArgs;
use crate::config::Settings;
use crate::contact_sheet::{self, MAX_TILES, Tile};
use crate::fetch::{FetchReport, fetch};
use crate::object_store::S3ObjectStore;
use crate::terminal::{Terminal, printable};

/// Rows in one question, which may hold a prompt of 10,000 letters each.
const PAGE: u32 = 500;
/// Failures to tell of; most likely they are all the same.
const TOLD_FAILURES: usize = 10;

pub(super) async fn run(arguments: FetchArgs, settings: &Settings, terminal: Terminal) -> Result<Outcome> {
    let catalog = connect(settings).await?;
    let progress = batch(&catalog, &arguments.batch).await?;
    let store = S3ObjectStore::new(&settings.s3()?).await;
    let output = &arguments.output;
    std::fs::create_dir_all(output)
        .with_context(|| format!("cannot create the folder {}", output.display()))?;

    let (report, tiles) = fetch_all(&catalog, &store, &progress, output).await?;
    let shown = tiles.len();
    if let Some(path) = &arguments.contact_sheet {
        let title = title(&progress, shown);
        let path = path.clone();
        tokio::task::spawn_blocking(move || write_sheet(&path, &title, &tiles)).await??;
    }
    let data = json!({
        "batch_id": progress.batch_id, "output": output, "contact_sheet": arguments.contact_sheet, "report": report,
    });
    terminal.show(&data, || describe(&report, &arguments, unsigned(progress.job_count), shown))?;
    for failure in report.failures.iter().take(TOLD_FAILURES) {
        terminal.tell(&printable(failure));
    }
    Ok(if report.failures.is_empty() { Outcome::Done } else { Outcome::Incomplete })
}

async fn fetch_all(
    catalog: &PgCatalog,
    store: &S3ObjectStore,
    progress: &BatchProgress,
    output: &Path,
) -> Result<(FetchReport, Vec<Tile>)> {
    let bar = ProgressBar::new(unsigned(progress.job_count)).with_style(
        ProgressStyle::with_template("fetching {bar:30} {pos}/{len}, {eta} left")?.progress_chars("=> "),
    );
    let mut report = FetchReport::default();
    let mut tiles: Vec<Tile> = Vec::new();
    let mut after = None;
    loop {
        let page = catalog.batch_results(progress.batch_id, after, PAGE).await?;
        let Some(last) = page.last() else { break };
        after = Some(last.ordinal);
        let fetched = fetch(store, &page, output, &mut report, || bar.inc(1)).await;
        // More would never be shown, and a batch may have a million.
        tiles.extend(fetched.into_iter().take(MAX_TILES.saturating_sub(tiles.len())));
    }
    bar.finish_and_clear();
    Ok((report, tiles))
}

fn write_sheet(path: &Path, title: &str, tiles: &[Tile]) -> Result<()> {
    let sheet = contact_sheet::draw(title, tiles)?;
    let context = || format!("cannot write the contact sheet {}", path.display());
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).with_context(context)?;
    }
    sheet.save_with_format(path, image::ImageFormat::Png).with_context(context)
}

fn title(progress: &BatchProgress, shown: usize) -> String {
    let jobs = unsigned(progress.job_count);
    let mut title = format!("{}   model {}   {}", progress.name, progress.model, counted(jobs, "job"));
    if progress.flagged > 0 {
        title.push_str(&format!(", {} withheld", progress.flagged));
    }
    if (shown as u64) < jobs {
        title.push_str(&format!(", the first {shown}"));
    }
    title
}

fn describe(report: &FetchReport, arguments: &FetchArgs, jobs: u64, shown: usize) -> String {
    let mut lines = vec![format!(
        "{} in {}: {} fetched, {} there already",
        counted(report.downloaded + report.kept, "picture"),
        arguments.output.display(),
        report.downloaded,
        report.kept
    )];
    for (count, what) in [
        (report.withheld, "withheld by the safety checker"),
        (report.without_picture, "cancelled or discarded"),
        (report.not_final, "not drawn yet; fetch again later"),
        (report.failures.len() as u64, "FAILED, see below"),
    ] {
        if count > 0 {
            lines.push(format!("  {count} {what}"));
        }
    }
    if let Some(sheet) = &arguments.contact_sheet {
        let part =
            if (shown as u64) < jobs { format!(" (the first {shown} of {jobs})") } else { String::new() };
        lines.push(format!("contact sheet: {}{part}", sheet.display()));
    }
    lines.join("\n")
}
