//! The names and settings of queues and exchanges, as data, so that every process declares them identically.
//!
//! RabbitMQ refuses a second declaration that differs from the first, and silently ignores arguments it does not
//! know, so the arguments below are those that RabbitMQ 3.10 and later understand the same way.

use crate::model_name::ModelName;
use crate::state::PriorityBand;

/// The exchange that unreadable messages go through.
pub const DEAD_LETTER_EXCHANGE: &str = "darkroom.dead";
/// The queue that unreadable messages end in.
pub const DEAD_LETTER_QUEUE: &str = "darkroom.dead";
/// The AMQP header that carries the W3C trace context.
pub const TRACEPARENT_HEADER: &str = "traceparent";

/// How often the broker may deliver one message before it drops it among the dead letters.
///
/// A backstop against a message that nobody ever settles, not a retry count: that is kept in Postgres. Far above what
/// crashes and restarts cause, since a dying worker charges every message it holds. Never negative: RabbitMQ 3.10
/// accepts -1 and then drops a message at its first return.
pub const DELIVERY_LIMIT: i64 = 1000;

/// The longest a job queue may grow before it refuses more; far above any watermark, so only a runaway relay meets it.
pub const JOB_QUEUE_MAX_LENGTH: i64 = 1_000_000;

/// Pictures that may be drawn and not yet acknowledged, at least.
const MIN_FINISHING: u16 = 8;

/// Messages of one band that a worker with microbatches of up to `max_microbatch` holds: one microbatch that runs, one that
/// waits or fills up, and what is on its way to the bucket and not yet acknowledged. That is one more; or eight pictures,
/// where microbatches are so small that storing one takes longer than drawing the next.
pub const fn prefetch(max_microbatch: u16) -> u16 {
    let finishing = if max_microbatch > MIN_FINISHING { max_microbatch } else { MIN_FINISHING };
    max_microbatch.saturating_mul(2).saturating_add(finishing)
}

/// The value of a declaration's argument.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum QueueArgument {
    /// AMQP long string.
    Text(&'static str),
    /// AMQP long long integer.
    Integer(i64),
}

/// A durable, shared queue to declare.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueDeclaration {
    /// The queue's name.
    pub name: String,
    /// Its `x-` arguments.
    pub arguments: Vec<(&'static str, QueueArgument)>,
}

/// A durable fanout exchange to declare, and the queue to bind to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExchangeDeclaration {
    /// The exchange's name.
    pub name: &'static str,
    /// The one queue bound to it, with an empty routing key.
    pub bound_queue: &'static str,
}

/// The queue of `model`'s jobs in `band`. Messages reach it through the default exchange, by its name.
///
/// Its dead letters travel at most once. At-least-once dead-lettering hangs every such queue of a node on one supervisor,
/// which gives up when queues come and go in a hurry; then no queue of the node finds a leader any more, until the node
/// is restarted (rabbitmq-server issue 16652, seen here on 3.10.8). What is dead-lettered is unreadable, and the job that
/// it may have told of is a row that is published again: losing one costs a line in `dead_letters`.
pub fn job_queue(model: &ModelName, band: PriorityBand) -> QueueDeclaration {
    QueueDeclaration {
        name: format!("darkroom.jobs.{model}.{band}"),
        arguments: vec![
            ("x-queue-type", QueueArgument::Text("quorum")),
            ("x-dead-letter-exchange", QueueArgument::Text(DEAD_LETTER_EXCHANGE)),
            // An overflowing queue may not drop its oldest message: whoever publishes keeps what is refused.
            ("x-overflow", QueueArgument::Text("reject-publish")),
            ("x-delivery-limit", QueueArgument::Integer(DELIVERY_LIMIT)),
            ("x-max-length", QueueArgument::Integer(JOB_QUEUE_MAX_LENGTH)),
        ],
    }
}

/// The exchange for unreadable messages. Declare [`dead_letter_queue`] and bind it before any job queue.
pub fn dead_letter_exchange() -> ExchangeDeclaration {
    ExchangeDeclaration { name: DEAD_LETTER_EXCHANGE, bound_queue: DEAD_LETTER_QUEUE }
}

/// The queue for unreadable messages.
pub fn dead_letter_queue() -> QueueDeclaration {
    QueueDeclaration {
        name: DEAD_LETTER_QUEUE.to_owned(),
        arguments: vec![("x-queue-type", QueueArgument::Text("quorum"))],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_are_named_by_model_and_band() {
        let model: ModelName = "stable-diffusion-v1-5".parse().unwrap();
        let names: Vec<String> = PriorityBand::ALL.iter().map(|&band| job_queue(&model, band).name).collect();
        insta::assert_snapshot!(names.join("\n"), @r"
        darkroom.jobs.stable-diffusion-v1-5.high
        darkroom.jobs.stable-diffusion-v1-5.normal
        darkroom.jobs.stable-diffusion-v1-5.low
        ");
        let longest: ModelName = "a".repeat(63).parse().unwrap();
        assert!(job_queue(&longest, PriorityBand::Normal).name.len() <= 255);
    }

    #[test]
    fn a_worker_holds_three_microbatches_of_a_band_or_what_is_stored_beside_two() {
        assert_eq!([1, 4, 8, 16, u16::MAX].map(prefetch), [10, 16, 24, 48, u16::MAX]);
    }

    #[test]
    fn a_job_queue_is_declared_so() {
        let arguments = |queue: QueueDeclaration| {
            let lines = queue.arguments.into_iter().map(|(key, value)| format!("{key}: {value:?}"));
            lines.collect::<Vec<_>>().join("\n")
        };
        insta::assert_snapshot!(arguments(job_queue(&"demo".parse().unwrap(), PriorityBand::Low)), @r#"
        x-queue-type: Text("quorum")
        x-dead-letter-exchange: Text("darkroom.dead")
        x-overflow: Text("reject-publish")
        x-delivery-limit: Integer(1000)
        x-max-length: Integer(1000000)
        "#);
    }
}
