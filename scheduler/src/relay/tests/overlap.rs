//! Chunks that are published while the one before is marked, and queues that take turns.
use std::collections::HashSet;

use super::*;

/// A relay that does not overlap waits for ever; nothing else here takes longer than a moment.
const FOR_EVER: Duration = Duration::from_secs(60);

async fn try_run(relay: &mut Relay, backlog: &FakeBacklog, queue: &FakeQueue) -> Result<RelayReport> {
    let run = tokio::time::timeout(FOR_EVER, relay.run_once(backlog, queue));
    run.await.expect("a mark waits for the next chunk, and that for the mark")
}

/// The sizes of the chunks that were published.
fn sizes(queue: &FakeQueue) -> Vec<usize> {
    queue.calls().iter().map(|(_, messages)| messages.len()).collect()
}

fn assert_nothing_was_published_twice(queue: &FakeQueue) {
    let calls = queue.calls();
    let bodies: Vec<_> = calls.iter().flat_map(|(_, messages)| messages).map(|one| &one.body).collect();
    assert_eq!(bodies.iter().collect::<HashSet<_>>().len(), bodies.len());
}

#[tokio::test]
async fn the_next_chunk_is_published_while_one_is_marked() {
    let queue = FakeQueue::default();
    let backlog = FakeBacklog::with_jobs(2_500).marked_beside(&queue, 3);
    let report = try_run(&mut Relay::new(Watermark::Fixed(10_000)), &backlog, &queue).await.unwrap();
    assert_eq!(report, RelayReport { published: 2_500, not_published: 0 });
    assert_eq!(sizes(&queue), [1_000, 1_000, 500]);
    assert_nothing_was_published_twice(&queue);
    assert_eq!(backlog.published(), 2_500);
}

#[tokio::test]
async fn the_watermark_holds_over_several_windows() {
    let queue = FakeQueue::default();
    let backlog = FakeBacklog::with_jobs(15_000);
    let report = try_run(&mut Relay::new(Watermark::Fixed(12_500)), &backlog, &queue).await.unwrap();
    assert_eq!(report, RelayReport { published: 12_500, not_published: 0 });
    let mut chunks = vec![CHUNK as usize; 12];
    chunks.push(500);
    assert_eq!((sizes(&queue), backlog.published()), (chunks, 12_500));
    assert_nothing_was_published_twice(&queue);
}

#[tokio::test]
async fn a_queue_that_lasts_until_the_next_run_is_looked_at_once() {
    // It lacks a fifth of what it should hold; then half of it, so that it may be empty before the next run; then more than
    // is asked for at once.
    for (watermark, held, looks) in [(10_000, 8_000, 1), (10_000, 5_000, 2), (20_000, 12_000, 2)] {
        let (backlog, queue) = (FakeBacklog::with_jobs(25_000), FakeQueue::default());
        backlog.mark_published(held);
        try_run(&mut Relay::new(Watermark::Fixed(watermark)), &backlog, &queue).await.unwrap();
        let now = (backlog.published(), backlog.looks(PriorityBand::Normal));
        assert_eq!(now, (watermark as usize, looks), "{held} of {watermark}");
    }
}

#[tokio::test]
async fn a_mark_that_fails_is_tried_once_more_and_told() {
    let queue = FakeQueue::default();
    let backlog = FakeBacklog::with_jobs(5_000).marked_beside(&queue, 2);
    backlog.fail_mark(0);
    let mut relay = Relay::new(Watermark::Fixed(10_000));
    let error = try_run(&mut relay, &backlog, &queue).await.unwrap_err();
    assert!(format!("{error:#}").contains("the test says so"), "{error:#}");
    assert_eq!(sizes(&queue), [1_000, 1_000], "the relay goes on although the catalog fails");
    assert_eq!(backlog.published(), 2_000);
}

#[tokio::test]
async fn what_could_not_be_marked_is_published_by_the_next_run() {
    let queue = FakeQueue::default();
    let backlog = FakeBacklog::with_jobs(3_000);
    (0..2).for_each(|place| backlog.fail_mark(place));
    let mut relay = Relay::new(Watermark::Fixed(10_000));
    try_run(&mut relay, &backlog, &queue).await.unwrap_err();
    assert_eq!(backlog.published(), 0);
    try_run(&mut relay, &backlog, &queue).await.unwrap();
    assert_eq!(backlog.published(), 3_000);
}

#[tokio::test]
async fn a_broker_that_goes_away_leaves_the_chunk_before_marked() {
    let queue = FakeQueue::default();
    let backlog = FakeBacklog::with_jobs(2_500).marked_beside(&queue, 3);
    queue.fail_call(1);
    let mut relay = Relay::new(Watermark::Fixed(10_000));
    let error = try_run(&mut relay, &backlog, &queue).await.unwrap_err();
    let known = error.chain().filter_map(|cause| cause.downcast_ref::<QueueError>());
    assert!(known.last().is_some_and(QueueError::is_known_outage), "{error:#}");
    assert_eq!((sizes(&queue), backlog.published()), (vec![1_000], 1_000));
    try_run(&mut relay, &backlog, &queue).await.unwrap();
    assert_eq!((sizes(&queue), backlog.published()), (vec![1_000, 1_000, 500], 2_500));
    assert_nothing_was_published_twice(&queue);
}

#[tokio::test]
async fn a_chunk_that_is_refused_in_part_is_the_last_and_its_rest_is_marked() {
    let queue = FakeQueue::default();
    let backlog = FakeBacklog::with_jobs(5_000).marked_beside(&queue, 1);
    queue.answer(7, PublishOutcome::Refused);
    let report = try_run(&mut Relay::new(Watermark::Fixed(10_000)), &backlog, &queue).await.unwrap();
    assert_eq!(report, RelayReport { published: 999, not_published: 1 });
    assert_eq!((sizes(&queue), backlog.published()), (vec![1_000], 999));
}

#[tokio::test]
async fn a_queue_that_is_emptied_as_fast_as_it_is_filled_keeps_no_other_waiting() {
    let (normal, low) = ("darkroom.jobs.demo.normal", "darkroom.jobs.demo.low");
    let count = 2 * WINDOW + 1;
    let backlog = || FakeBacklog::with_jobs_in(&[PriorityBand::Normal, PriorityBand::Low], count);
    let queue = FakeQueue::default();
    let report = try_run(&mut Relay::new(Watermark::Fixed(4 * WINDOW)), &backlog().claimed_at_once(), &queue)
        .await
        .unwrap();
    assert_eq!(report.published, 2 * u64::from(count));
    assert_nothing_was_published_twice(&queue);
    let names: Vec<String> = queue.calls().into_iter().map(|(name, _)| name).collect();
    let turns: Vec<(&str, usize)> =
        names.chunk_by(|one, next| one == next).map(|turn| (turn[0].as_str(), turn.len())).collect();
    let whole = (WINDOW / CHUNK) as usize;
    assert_eq!(turns, [(normal, whole), (low, whole), (normal, whole), (low, whole), (normal, 1), (low, 1)]);

    // A run that lasts too long ends after a round, and the next goes on.
    let (backlog, queue) = (backlog().claimed_at_once(), FakeQueue::default());
    let mut relay = Relay { run_limit: Duration::ZERO, ..Relay::new(Watermark::Fixed(4 * WINDOW)) };
    for rounds in 1..=2 {
        try_run(&mut relay, &backlog, &queue).await.unwrap();
        assert_eq!(queue.calls().len(), rounds * 2 * whole);
    }
}
