//! What `darkroom serve` looks at before it starts: the cheap half of `darkroom doctor`.
//!
//! It refuses what breaks a promise by design: a broker or a Postgres that is too old. Settings that lose commits
//! in a crash are only told, since test machines have them off on purpose; `darkroom doctor` calls them dangerous. A broker
//! that does not answer is no reason not to start, because the loops wait for it.
use anyhow::{Result, bail};
use schema::PgCatalog;
use secrecy::SecretString;
use tracing::warn;

use crate::amqp;
use crate::doctor::postgres::MIN_VERSION;
use crate::doctor::{Finding, Verdict, broker, postgres};

/// Refuses to start on servers that break a promise, and tells what else is wrong with them.
///
/// # Errors
/// With what is wrong and what to change.
pub async fn check(catalog: &PgCatalog, amqp_url: &SecretString) -> Result<()> {
    let health = catalog.server_health().await?;
    let old = health.version_number < MIN_VERSION;
    for finding in postgres::judge(&health) {
        tell(&finding, old && finding.probe == "postgres version")?;
    }
    match amqp::broker_version(amqp_url).await {
        Ok(version) => {
            for finding in broker::judge_version(version, &broker::typical_queues()) {
                tell(&finding, true)?;
            }
        }
        Err(error) => warn!(error = error.to_string(), "The broker's version could not be asked"),
    }
    Ok(())
}

fn tell(finding: &Finding, refuse_danger: bool) -> Result<()> {
    let Finding { probe, verdict, found, hint } = finding;
    let hint = hint.as_deref().unwrap_or("run `darkroom doctor`");
    match verdict {
        Verdict::Ok => Ok(()),
        Verdict::Danger if refuse_danger => bail!("{found}\nhint: {hint}"),
        Verdict::Warning | Verdict::Danger => {
            warn!(probe, hint, "{found}");
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broker_that_is_too_old_is_refused_with_what_to_do() {
        let findings = broker::judge_version("3.9.29".parse().unwrap(), &broker::typical_queues());
        let refused = findings.iter().find_map(|finding| tell(finding, true).err()).unwrap();
        insta::assert_snapshot!(refused, @"
        RabbitMQ 3.9.29
        hint: upgrade to 3.10.0 or newer
        ");
        for finding in broker::judge_version("4.0.0".parse().unwrap(), &broker::typical_queues()) {
            tell(&finding, true).unwrap();
        }
    }
}
