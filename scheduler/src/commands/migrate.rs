//! `darkroom migrate`
use anyhow::Result;

use super::{connect, counted};
use crate::cli::MigrateArgs;
use crate::config::Settings;
use crate::terminal::Terminal;

pub(super) async fn run(arguments: &MigrateArgs, settings: &Settings, terminal: Terminal) -> Result<()> {
    let catalog = connect(settings).await?;
    let status =
        if arguments.dry_run { catalog.migration_status().await? } else { catalog.migrate().await? };
    terminal.show(&status, || {
        let verb = if arguments.dry_run { "pending" } else { "applied" };
        let mut text: String =
            status.pending.iter().map(|(version, what)| format!("{verb} {version:04} {what}\n")).collect();
        if status.pending.is_empty() {
            text = format!(
                "the tables are up to date ({})\n",
                counted(status.applied.len() as u64, "migration")
            );
        }
        if !status.unknown.is_empty() {
            text.push_str("the database was migrated by a later build, which this one can work with\n");
        }
        text
    })
}
