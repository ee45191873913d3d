//! The broker: does it keep a message that it confirmed, and give back one that nobody acknowledged?
use std::time::Duration;

use schema::{
    BrokerVersion, MIN_BROKER_VERSION, Model, PriorityBand, QueueDeclaration, concerns, dead_letter_queue,
    job_queue,
};
use secrecy::SecretString;
use tokio::time;

use super::Finding;
use crate::amqp::{self, AmqpQueue, DeclaredQueue};
use crate::queue::{PublishOutcome, Queue, QueueError};

/// For logging in, after the broker has shown that it is there.
const LOGIN_LIMIT: Duration = Duration::from_secs(20);
/// The broker's default: so long a consumer may hold a message.
pub const CONSUMER_TIMEOUT: Duration = Duration::from_secs(30 * 60);

/// Asks the broker at `url` everything; `models` tell which queues there should be.
pub async fn examine(url: &SecretString, models: &[Model]) -> Vec<Finding> {
    let version = match amqp::broker_version(url).await {
        Ok(version) => version,
        Err(error) => return vec![unreachable(&error)],
    };
    let mut findings = judge_version(version, &typical_queues());
    if let Err(error) = amqp::log_in(url).await {
        let hint = "check user, password and virtual host in AMQP_URL";
        findings.push(Finding::danger("broker login", error.to_string(), hint));
        return findings;
    }
    let queue = match AmqpQueue::start(url) {
        Ok(queue) => queue,
        Err(error) => {
            findings.push(unreachable(&error));
            return findings;
        }
    };
    if time::timeout(LOGIN_LIMIT, queue.connected()).await.is_ok() {
        findings.push(try_out(&queue).await);
        findings.extend(compare(&queue, models).await);
        findings.push(dead_letters(&queue).await);
    }
    queue.close().await;
    findings
}

fn unreachable(error: &QueueError) -> Finding {
    Finding::danger("broker", error.to_string(), "check AMQP_URL, and that RabbitMQ runs")
}

/// The dead-letter queue, and a job queue for all of them: only their names differ.
pub fn typical_queues() -> Vec<QueueDeclaration> {
    let any = "any".parse().expect("lower-case letters are a model's name");
    vec![dead_letter_queue(), job_queue(&any, PriorityBand::Normal)]
}

/// What `version` makes of queues declared so.
pub fn judge_version(version: BrokerVersion, queues: &[QueueDeclaration]) -> Vec<Finding> {
    let mut findings = Vec::new();
    let found = format!("RabbitMQ {version}");
    // What is wrong with a whole version is said once, and not again for each queue.
    let queues = if version < MIN_BROKER_VERSION {
        let hint = format!("upgrade to {MIN_BROKER_VERSION} or newer");
        findings.push(Finding::danger("broker version", found, hint));
        &[]
    } else {
        findings.push(Finding::ok("broker version", found));
        queues
    };
    for concern in queues.iter().flat_map(|queue| concerns(version, queue)) {
        let finding = if concern.breaks_a_promise { Finding::danger } else { Finding::warning };
        findings.push(finding("broker arguments", concern.what, concern.hint));
    }
    let minutes = CONSUMER_TIMEOUT.as_secs() / 60;
    let newer = |major, minor| version >= BrokerVersion { major, minor, patch: 0 };
    let timeout = if newer(4, 3) {
        "by default the broker cancels a consumer of a quorum queue"
    } else {
        "by default the broker closes a channel"
    };
    let scope = if newer(3, 12) {
        "consumer_timeout, a policy or a queue argument changes it"
    } else {
        "consumer_timeout in rabbitmq.conf changes it for all queues; x-consumer-timeout is ignored"
    };
    findings.push(Finding::ok(
        "broker consumer timeout",
        format!("{timeout} that holds a message for more than {minutes} minutes ({scope})"),
    ));
    findings
}

async fn try_out(queue: &AmqpQueue) -> Finding {
    const PROBE: &str = "broker queues";
    let hint = "no message is safe on this broker; check its cluster, alarms, permissions and policies";
    let probe = match queue.probe().await {
        Ok(probe) => probe,
        Err(error) => return Finding::danger(PROBE, error.to_string(), hint),
    };
    if probe.published != PublishOutcome::Confirmed {
        return Finding::danger(
            PROBE,
            format!("a message to a quorum queue was {:?}", probe.published),
            hint,
        );
    }
    if !probe.comes_again {
        return Finding::danger(PROBE, "a message that was given back did not come again", hint);
    }
    if probe.to_a_missing_queue != PublishOutcome::Returned {
        let found = format!("a message to a queue that is not there was {:?}", probe.to_a_missing_queue);
        return Finding::danger(
            PROBE,
            found,
            "such messages would be lost in silence; check what is between us",
        );
    }
    Finding::ok(
        PROBE,
        "a quorum queue takes messages and hands a returned one out again; a message without a queue comes back",
    )
}

async fn compare(queue: &AmqpQueue, models: &[Model]) -> Vec<Finding> {
    const PROBE: &str = "broker declared queues";
    let (mut same, mut absent, mut findings) = (0, 0, Vec::new());
    let mut declarations = vec![dead_letter_queue()];
    for model in models {
        declarations.extend(PriorityBand::ALL.iter().map(|&band| job_queue(&model.name, band)));
    }
    for declaration in &declarations {
        match queue.compare(declaration).await {
            Ok(DeclaredQueue::Same) => same += 1,
            Ok(DeclaredQueue::Absent) => absent += 1,
            Ok(DeclaredQueue::Differs(reason)) => findings.push(Finding::danger(
                PROBE,
                format!("{} was declared otherwise: {reason}", declaration.name),
                "delete the queue when it is empty; `darkroom serve` makes it again and publishes what was in it",
            )),
            Err(error) => findings.push(Finding::danger(PROBE, error.to_string(), "try again")),
        }
    }
    if findings.is_empty() {
        let found = format!("{same} are as we declare them, {absent} are not there yet");
        findings.push(Finding::ok(PROBE, found));
    }
    findings
}

async fn dead_letters(queue: &AmqpQueue) -> Finding {
    const PROBE: &str = "broker dead letters";
    match queue.ready_count(&dead_letter_queue().name).await {
        Ok(None | Some(0)) => Finding::ok(PROBE, "none are waiting"),
        Ok(Some(count)) => Finding::warning(
            PROBE,
            format!("{count} unreadable messages are waiting"),
            "`darkroom serve` or `darkroom reconcile` moves them into the table dead_letters",
        ),
        Err(error) => Finding::warning(PROBE, error.to_string(), "try again"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::{Verdict, worst};

    fn judged(version: &str) -> Vec<Finding> {
        judge_version(version.parse().unwrap(), &typical_queues())
    }

    #[test]
    fn versions_that_keep_our_promises_are_told_from_those_that_do_not() {
        assert_eq!(worst(&judged("3.9.29")), Verdict::Danger);
        assert_eq!(worst(&judged("3.10.8")), Verdict::Ok);
        // The dead-letter queue gets a delivery limit of 20 that it did not ask for.
        assert_eq!(worst(&judged("4.0.5")), Verdict::Warning);
    }

    #[test]
    fn what_a_consumer_timeout_does_depends_on_the_version() {
        let told = |version| judged(version).pop().unwrap().found;
        assert!(told("3.10.8").contains("closes a channel") && told("3.10.8").contains("is ignored"));
        assert!(told("3.13.0").contains("closes a channel") && told("3.13.0").contains("a policy"));
        assert!(told("4.3.0").contains("cancels a consumer"));
    }
}
