//! What RabbitMQ makes of our queues' arguments, by its version.
//!
//! A declaration that succeeds proves nothing: RabbitMQ accepts arguments that it does not know and ignores them, and
//! some it reads differently from one version to the next. So the programs ask for the version and look here.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

use crate::topology::{QueueArgument, QueueDeclaration};

/// The oldest RabbitMQ that these programs are tested on.
pub const MIN_BROKER_VERSION: BrokerVersion = BrokerVersion { major: 3, minor: 10, patch: 0 };
/// The first with a delivery limit on queues that ask for none.
const DEFAULT_DELIVERY_LIMIT: BrokerVersion = BrokerVersion { major: 4, minor: 0, patch: 0 };

/// A version of RabbitMQ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct BrokerVersion {
    /// `3` of 3.10.8.
    pub major: u16,
    /// `10` of 3.10.8.
    pub minor: u16,
    /// `8` of 3.10.8.
    pub patch: u16,
}

/// Text that is not a version.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a broker's version looks like `3.10.8`, but this is `{text}`")]
pub struct BrokerVersionError {
    /// What was read, cut to 80 characters.
    pub text: String,
}

impl fmt::Display for BrokerVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

impl FromStr for BrokerVersion {
    type Err = BrokerVersionError;

    /// Reads `3.10.8`, `4.3`, and `4.0.0-rc.1` as 4.0.0.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let released = text.split(['-', '+']).next().unwrap_or_default();
        let mut numbers = released.split('.').map(str::parse::<u16>);
        match (numbers.next(), numbers.next(), numbers.next(), numbers.next()) {
            (Some(Ok(major)), Some(Ok(minor)), None, None) => Ok(Self { major, minor, patch: 0 }),
            (Some(Ok(major)), Some(Ok(minor)), Some(Ok(patch)), None) => Ok(Self { major, minor, patch }),
            _ => Err(BrokerVersionError { text: text.chars().take(80).collect() }),
        }
    }
}

/// What is wrong with a queue on a certain broker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BrokerConcern {
    /// Whether it breaks a promise, so that no program should start.
    pub breaks_a_promise: bool,
    /// What is so.
    pub what: String,
    /// What to change.
    pub hint: String,
}

/// What `version` would do to the messages of `queue` that we do not want. Empty when all is well.
pub fn concerns(version: BrokerVersion, queue: &QueueDeclaration) -> Vec<BrokerConcern> {
    let argument = |name: &str| {
        queue.arguments.iter().find(|(known, _)| *known == name).map(|(_, argument)| argument.clone())
    };
    let mut concerns = Vec::new();
    let mut concern = |breaks_a_promise, what: String, hint: &str| {
        concerns.push(BrokerConcern { breaks_a_promise, what, hint: hint.to_owned() });
    };
    if version < MIN_BROKER_VERSION {
        concern(
            true,
            format!("RabbitMQ {version} is older than any that {} was tried on", queue.name),
            "upgrade RabbitMQ to 3.10 or newer",
        );
    }
    if argument("x-dead-letter-strategy") == Some(QueueArgument::Text("at-least-once")) {
        concern(
            true,
            format!(
                "RabbitMQ {version} loses {} and all queues like it for good when its dead-letter supervisor gives up",
                queue.name
            ),
            "leave x-dead-letter-strategy out (rabbitmq-server issue 16652)",
        );
    }
    match argument("x-delivery-limit") {
        Some(QueueArgument::Integer(limit)) if limit < 0 && version < DEFAULT_DELIVERY_LIMIT => concern(
            true,
            format!(
                "RabbitMQ {version} accepts x-delivery-limit {limit} on {} and drops a message at its first return",
                queue.name
            ),
            "give it a high, positive limit",
        ),
        None if version >= DEFAULT_DELIVERY_LIMIT => concern(
            false,
            format!(
                "RabbitMQ {version} drops a message of {} after 20 returns, because the queue sets no limit",
                queue.name
            ),
            "set a policy with a high delivery-limit for this queue",
        ),
        _ => {}
    }
    concerns
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::PriorityBand;
    use crate::topology::{dead_letter_queue, job_queue};

    fn version(text: &str) -> BrokerVersion {
        text.parse().unwrap()
    }

    #[test]
    fn versions_are_read_and_ordered_by_number() {
        assert_eq!(version("3.10.8"), BrokerVersion { major: 3, minor: 10, patch: 8 });
        assert_eq!(version("4.0.0-rc.1+5.gabc").to_string(), "4.0.0");
        assert!(version("3.9.29") < version("3.10.0") && version("3.13.7") < version("4.0"));
        for bad in ["", "3", "3.x.1", "3.10.8.1", "three", "3.99999.0"] {
            assert!(bad.parse::<BrokerVersion>().is_err(), "{bad}");
        }
    }

    #[test]
    fn our_job_queues_are_sound_from_3_10_on() {
        let queue = job_queue(&"demo".parse().unwrap(), PriorityBand::Normal);
        for good in ["3.10.0", "3.13.7", "4.0.0", "4.3.1"] {
            assert_eq!(concerns(version(good), &queue), [], "{good}");
        }
        let old = concerns(version("3.9.29"), &queue);
        assert!(old.len() == 1 && old[0].breaks_a_promise, "{old:?}");
    }

    #[test]
    fn dead_letters_at_least_once_can_cost_every_queue_of_a_node() {
        let mut queue = job_queue(&"demo".parse().unwrap(), PriorityBand::Normal);
        queue.arguments.push(("x-dead-letter-strategy", QueueArgument::Text("at-least-once")));
        for any in ["3.10.8", "4.2.0"] {
            assert!(concerns(version(any), &queue)[0].breaks_a_promise, "{any}");
        }
    }

    #[test]
    fn a_negative_delivery_limit_drops_messages_before_4_0() {
        let mut queue = job_queue(&"demo".parse().unwrap(), PriorityBand::Normal);
        for (name, value) in &mut queue.arguments {
            if *name == "x-delivery-limit" {
                *value = QueueArgument::Integer(-1);
            }
        }
        assert!(concerns(version("3.10.8"), &queue)[0].breaks_a_promise);
        assert_eq!(concerns(version("4.0.0"), &queue), []);
    }

    #[test]
    fn from_4_0_on_the_dead_letter_queue_has_a_limit_it_did_not_ask_for() {
        assert_eq!(concerns(version("3.13.7"), &dead_letter_queue()), []);
        let new = concerns(version("4.2.0"), &dead_letter_queue());
        assert!(new.len() == 1 && !new[0].breaks_a_promise, "{new:?}");
    }
}
