//! `darkroom doctor`
use anyhow::Result;
use chrono::Utc;
use schema::{Model, PgCatalog};
use serde_json::json;

use super::{Outcome, connect};
use crate::config::Settings;
use crate::doctor::clocks::Comparison;
use crate::doctor::{Finding, Verdict, broker, bucket, clocks, leases, postgres, worst};
use crate::object_store::S3ObjectStore;
use crate::terminal::{Terminal, describe_error, printable};

pub(super) async fn run(settings: &Settings, terminal: Terminal) -> Result<Outcome> {
    let mut findings = Vec::new();
    let mut models = Vec::new();
    match connect(settings).await {
        Ok(catalog) => match examine_catalog(&catalog, &mut findings).await {
            Ok(registered) => models = registered,
            Err(error) => findings.push(failed("postgres", &error)),
        },
        Err(error) => findings.push(failed("postgres", &error)),
    }
    match settings.amqp_url() {
        Ok(url) => findings.extend(broker::examine(&url, &models).await),
        Err(error) => findings.push(failed("broker", &error)),
    }
    match settings.s3() {
        Ok(s3) => {
            let store = S3ObjectStore::new(&s3).await;
            findings.extend(bucket::examine(&store, &s3.bucket).await);
            let asked = Utc::now();
            let other = store.clock(&s3.bucket).await;
            let comparison = other.map(|other| Comparison { asked, other, answered: Utc::now() });
            findings.push(clocks::judge_store(comparison));
        }
        Err(error) => findings.push(failed("bucket", &error)),
    }
    let verdict = worst(&findings);
    terminal.show(&json!({ "verdict": verdict, "findings": findings }), || describe(&findings))?;
    Ok(if verdict == Verdict::Danger { Outcome::Incomplete } else { Outcome::Done })
}

/// Asks the catalog everything, adds to `findings`, and returns the registered models.
async fn examine_catalog(catalog: &PgCatalog, findings: &mut Vec<Finding>) -> Result<Vec<Model>> {
    findings.extend(postgres::examine(catalog).await?);
    let asked = Utc::now();
    let other = catalog.clock().await?;
    findings.push(clocks::judge_database(Comparison { asked, other, answered: Utc::now() }));
    if !catalog.migration_status().await?.is_current() {
        return Ok(Vec::new());
    }
    findings.extend(leases::judge(&catalog.microbatch_times(leases::WINDOW).await?));
    Ok(catalog.models().await?)
}

/// A server that cannot be asked, with the error's own hint.
fn failed(probe: &'static str, error: &anyhow::Error) -> Finding {
    let text = describe_error(error);
    let (hints, lines): (Vec<&str>, Vec<&str>) = text.lines().partition(|line| line.starts_with("hint: "));
    let found = lines.join(" ").trim_start_matches("error: ").to_owned();
    let hint = hints.first().map_or("check that it runs", |hint| hint.trim_start_matches("hint: "));
    Finding::danger(probe, found, hint)
}

fn describe(findings: &[Finding]) -> String {
    let mut text = String::new();
    for Finding { probe, verdict, found, hint } in findings {
        text.push_str(&format!("{:<8} {probe}: {}\n", verdict.as_str(), printable(found)));
        if let Some(hint) = hint {
            text.push_str(&format!("         change: {hint}\n"));
        }
    }
    let count = |wanted| findings.iter().filter(|finding| finding.verdict == wanted).count();
    let (dangers, warnings) = (count(Verdict::Danger), count(Verdict::Warning));
    text.push_str(&match (dangers, warnings) {
        (0, 0) => "all is well\n".to_owned(),
        (0, _) => format!("no dangers, warnings: {warnings}\n"),
        _ => format!("DANGERS: {dangers}, warnings: {warnings}\n"),
    });
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_is_told_with_what_to_change() {
        let findings = [
            Finding::ok("broker version", "RabbitMQ 3.10.8"),
            Finding::danger("postgres durability", "fsync is off", "set fsync = on"),
        ];
        insta::assert_snapshot!(describe(&findings), @"
        ok       broker version: RabbitMQ 3.10.8
        DANGER   postgres durability: fsync is off
                 change: set fsync = on
        DANGERS: 1, warnings: 0
        ");
    }

    #[test]
    fn a_server_that_is_away_keeps_its_own_hint() {
        let finding = failed("bucket", &anyhow::anyhow!("S3_BUCKET is not set\nhint: set S3_BUCKET"));
        assert_eq!(finding, Finding::danger("bucket", "S3_BUCKET is not set", "set S3_BUCKET"));
    }
}
