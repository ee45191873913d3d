//! The relay against a backlog and a broker in memory.
mod overlap;

use super::fakes::{FakeBacklog, FakeQueue};
use super::*;

async fn run(relay: &mut Relay, backlog: &FakeBacklog, queue: &FakeQueue) -> RelayReport {
    relay.run_once(backlog, queue).await.unwrap()
}

#[tokio::test]
async fn the_queue_is_filled_to_the_watermark_and_no_further() {
    let (backlog, queue) = (FakeBacklog::with_jobs(25), FakeQueue::default());
    let mut relay = Relay::new(Watermark::Fixed(10));
    assert_eq!(run(&mut relay, &backlog, &queue).await, RelayReport { published: 10, not_published: 0 });
    assert_eq!(run(&mut relay, &backlog, &queue).await, RelayReport::default());
    let (name, messages) = queue.calls().remove(0);
    assert_eq!(name, "darkroom.jobs.demo.normal");
    assert_eq!(messages[0].traceparent.as_deref(), Some("00-trace"));
    assert_eq!(messages[1].traceparent, None);
}

#[tokio::test]
async fn a_large_watermark_is_filled_in_several_calls() {
    let (backlog, queue) = (FakeBacklog::with_jobs(2_500), FakeQueue::default());
    let report = run(&mut Relay::new(Watermark::Fixed(10_000)), &backlog, &queue).await;
    assert_eq!(report.published, 2_500);
    assert_eq!(
        queue.calls().iter().map(|(_, messages)| messages.len()).collect::<Vec<_>>(),
        [1_000, 1_000, 500]
    );
}

#[tokio::test]
async fn only_what_the_broker_holds_is_marked() {
    let (backlog, queue) = (FakeBacklog::with_jobs(5), FakeQueue::default());
    queue.answer(0, PublishOutcome::Returned);
    queue.answer(2, PublishOutcome::Refused);
    queue.answer(3, PublishOutcome::Unknown);
    let mut relay = Relay::new(Watermark::Fixed(10));
    assert_eq!(run(&mut relay, &backlog, &queue).await, RelayReport { published: 2, not_published: 3 });
    assert_eq!(backlog.published(), 2);

    queue.forget_answers();
    assert_eq!(run(&mut relay, &backlog, &queue).await, RelayReport { published: 3, not_published: 0 });
}

#[tokio::test]
async fn a_returned_message_makes_the_queue_anew() {
    let (backlog, queue) = (FakeBacklog::with_jobs(1), FakeQueue::default());
    let mut relay = Relay::new(Watermark::Fixed(10));
    queue.answer(0, PublishOutcome::Returned);
    run(&mut relay, &backlog, &queue).await;
    let declared_once = queue.declared().len();
    assert_eq!(declared_once, PriorityBand::ALL.len(), "every band's queue is there before anyone needs it");
    queue.forget_answers();
    run(&mut relay, &backlog, &queue).await;
    assert_eq!(queue.declared()[declared_once..], ["darkroom.jobs.demo.normal"]);
    assert_eq!(backlog.published(), 1);
}

#[tokio::test]
async fn a_broker_that_takes_nothing_is_not_asked_in_a_busy_loop() {
    let (backlog, queue) = (FakeBacklog::with_jobs(3), FakeQueue::default());
    for place in 0..3 {
        queue.answer(place, PublishOutcome::Refused);
    }
    run(&mut Relay::new(Watermark::Fixed(10)), &backlog, &queue).await;
    assert_eq!(queue.calls().len(), 1);
    assert_eq!(backlog.published(), 0);
}

fn impatient() -> Relay {
    Relay { silence_limit: Duration::ZERO, ..Relay::new(Watermark::Fixed(10)) }
}

/// Lets a relay find a queue that answers so, as often as it bears it, and sees the queue made anew.
async fn is_made_anew(answer: PublishOutcome) {
    let (backlog, queue) = (FakeBacklog::with_jobs(2), FakeQueue::default());
    queue.set_ready(Some(0));
    let mut relay = impatient();
    (0..2).for_each(|place| queue.answer(place, answer));
    run(&mut relay, &backlog, &queue).await;
    // One that answers in between is alive.
    queue.forget_answers();
    queue.answer(1, answer);
    run(&mut relay, &backlog, &queue).await;
    assert_eq!(backlog.published(), 1);
    queue.answer(0, answer);
    for _ in 0..SILENCES {
        run(&mut relay, &backlog, &queue).await;
        assert!(queue.deleted().is_empty(), "too early");
    }
    queue.forget_answers();
    let declared = queue.declared().len();
    run(&mut relay, &backlog, &queue).await;
    assert_eq!(queue.deleted(), ["darkroom.jobs.demo.normal"]);
    assert_eq!(queue.declared()[declared..], ["darkroom.jobs.demo.normal"]);
    assert_eq!(
        backlog.republished_after(),
        [Duration::ZERO],
        "what the broken queue held is published again"
    );
    assert_eq!(backlog.published(), 2);
}

#[tokio::test]
async fn a_queue_that_stays_silent_is_made_anew_and_filled() {
    is_made_anew(PublishOutcome::Silent).await;
}

#[tokio::test]
async fn a_queue_that_refuses_everything_although_it_is_empty_is_made_anew_and_filled() {
    is_made_anew(PublishOutcome::Refused).await;
}

#[tokio::test]
async fn a_full_queue_and_one_that_was_silent_for_a_moment_are_left_alone() {
    for (mut relay, ready, answer) in [
        (impatient(), 1_000_000, PublishOutcome::Refused),
        (Relay::new(Watermark::Fixed(10)), 0, PublishOutcome::Refused),
        (Relay::new(Watermark::Fixed(10)), 0, PublishOutcome::Silent),
        (impatient(), 0, PublishOutcome::Unknown),
    ] {
        let (backlog, queue) = (FakeBacklog::with_jobs(1), FakeQueue::default());
        queue.set_ready(Some(ready));
        queue.answer(0, answer);
        for _ in 0..2 * SILENCES {
            run(&mut relay, &backlog, &queue).await;
        }
        assert!(queue.deleted().is_empty(), "{answer:?}, {ready} ready");
    }
}

#[tokio::test]
async fn without_a_watermark_the_workers_that_are_there_decide() {
    let published = async |microbatch_capacity, watermark| {
        let backlog = FakeBacklog::with_jobs(5_000).with_workers_for(microbatch_capacity);
        let report = Relay::new(watermark).run_once(&backlog, &FakeQueue::default()).await.unwrap();
        report.published
    };
    // None, few and many: ten microbatches each.
    assert_eq!(published(0, Watermark::ForWorkers).await, 1_000);
    assert_eq!(published(4 * 16, Watermark::ForWorkers).await, 1_000);
    assert_eq!(published(20 * 16, Watermark::ForWorkers).await, 3_200);
    assert_eq!(published(20 * 16, Watermark::Fixed(50)).await, 50, "what a person says holds");
}
