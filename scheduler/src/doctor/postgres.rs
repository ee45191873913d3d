//! Postgres: is a commit there after a crash, are the tables ours, is there room?
use schema::{CatalogError, PgCatalog, ServerHealth};

use super::Finding;

/// PostgreSQL 15, as the server numbers it.
pub const MIN_VERSION: i32 = 150_000;
/// A scheduler has 8 connections and a worker 5; less than this is room for one of each.
const SPARE_CONNECTIONS: i32 = 15;

/// Asks Postgres everything.
///
/// # Errors
/// If it cannot be asked.
pub async fn examine(catalog: &PgCatalog) -> Result<Vec<Finding>, CatalogError> {
    let mut findings = judge(&catalog.server_health().await?);
    let status = catalog.migration_status().await?;
    let (applied, pending, unknown) = (status.applied.len(), status.pending.len(), status.unknown.len());
    findings.push(if pending > 0 {
        let found = format!("{pending} of {} migrations are not applied", applied + pending);
        Finding::danger("postgres migrations", found, "run `darkroom migrate`")
    } else if unknown > 0 {
        let found = format!("all of ours, and {unknown} of a later build");
        Finding::warning("postgres migrations", found, "upgrade this program soon")
    } else {
        Finding::ok("postgres migrations", format!("all {applied} are applied"))
    });
    Ok(findings)
}

/// What these settings mean for us.
pub fn judge(health: &ServerHealth) -> Vec<Finding> {
    let mut findings = Vec::new();
    let found = format!("PostgreSQL {}", health.version);
    findings.push(if health.version_number < MIN_VERSION {
        Finding::danger("postgres version", found, "upgrade to PostgreSQL 15 or newer")
    } else if health.in_recovery {
        Finding::danger(
            "postgres version",
            format!("{found}, a standby"),
            "point DATABASE_URL at the primary",
        )
    } else {
        Finding::ok("postgres version", found)
    });
    findings.push(durability(health));
    let spare = health.connection_limit - health.connection_count;
    let found = format!("{} of {} connections are open", health.connection_count, health.connection_limit);
    findings.push(if spare < SPARE_CONNECTIONS {
        let hint =
            "raise max_connections, or put a pooler between; a scheduler takes up to 8 and a worker up to 5";
        Finding::warning("postgres connections", found, hint)
    } else {
        Finding::ok("postgres connections", found)
    });
    findings
}

fn durability(health: &ServerHealth) -> Finding {
    const PROBE: &str = "postgres durability";
    let lost = "a batch whose submission was confirmed may be gone after a crash";
    if !health.fsync {
        return Finding::danger(PROBE, format!("fsync is off: {lost}"), "set fsync = on");
    }
    let standbys = !health.synchronous_standby_names.is_empty();
    match health.synchronous_commit.as_str() {
        "off" => Finding::danger(
            PROBE,
            format!("synchronous_commit is off: {lost}"),
            "set synchronous_commit = on, at least for our role",
        ),
        "local" | "remote_write" if standbys => Finding::warning(
            PROBE,
            format!(
                "synchronous_commit is {}: a commit may be gone after a failover",
                health.synchronous_commit
            ),
            "set synchronous_commit = on, at least for our role",
        ),
        _ if !health.full_page_writes => Finding::warning(
            PROBE,
            "full_page_writes is off: a crash in the middle of a page destroys it, unless the file system prevents that",
            "set full_page_writes = on",
        ),
        setting => Finding::ok(PROBE, format!("fsync is on, synchronous_commit is {setting}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::{Verdict, worst};

    fn sound() -> ServerHealth {
        ServerHealth {
            version_number: 150_006,
            version: "15.6".into(),
            fsync: true,
            synchronous_commit: "on".into(),
            synchronous_standby_names: String::new(),
            full_page_writes: true,
            connection_limit: 97,
            connection_count: 12,
            in_recovery: false,
        }
    }

    #[test]
    fn each_setting_that_loses_a_commit_is_found() {
        assert_eq!(worst(&judge(&sound())), Verdict::Ok);
        let verdict = |change: fn(&mut ServerHealth)| {
            let mut health = sound();
            change(&mut health);
            worst(&judge(&health))
        };
        assert_eq!(verdict(|health| health.fsync = false), Verdict::Danger);
        assert_eq!(verdict(|health| health.synchronous_commit = "off".into()), Verdict::Danger);
        assert_eq!(verdict(|health| health.version_number = 140_011), Verdict::Danger);
        assert_eq!(verdict(|health| health.in_recovery = true), Verdict::Danger);
        assert_eq!(verdict(|health| health.full_page_writes = false), Verdict::Warning);
        assert_eq!(verdict(|health| health.connection_count = 90), Verdict::Warning);
        assert_eq!(verdict(|health| health.synchronous_commit = "local".into()), Verdict::Ok);
        let with_standby = |health: &mut ServerHealth| {
            health.synchronous_commit = "local".into();
            health.synchronous_standby_names = "standby1".into();
        };
        assert_eq!(verdict(with_standby), Verdict::Warning);
    }
}
