//! The order that the promises rest on, and what is done once and only once.

use std::time::Duration;

use schema::{JobMessage, JobSpec, JobState, PriorityBand, Recipe};
use worker::run::StopReason;

use crate::pipelines::{ScriptedPipeline, draw, picture};
use crate::worker_under_test::{self, Event, Setup, WorkerUnderTest};

#[tokio::test]
async fn each_job_is_stored_then_completed_then_acked() {
    let mut worker = WorkerUnderTest::new(Setup::default());
    let mut jobs = Vec::new();
    for ordinal in 0..30 {
        let band = PriorityBand::ALL[ordinal as usize % 3];
        jobs.push(worker.submit_sized(ordinal, band, if ordinal % 2 == 0 { 64 } else { 128 }));
    }
    worker.start_solid_color(Duration::ZERO).await;
    worker.wait_for_acks(30).await;
    assert_eq!(worker.drain().await.expect("a good end"), StopReason::Asked);
    for (ordinal, job_id) in (0..).zip(jobs) {
        let stored = worker.log.position(&Event::Stored(ordinal));
        let completed = worker
            .log
            .events()
            .iter()
            .position(|event| matches!(event, Event::Completed(ordinals) if ordinals.contains(&ordinal)));
        let acked = worker.log.position(&Event::Acked(Some(job_id)));
        assert!(stored < completed.expect("a row") && completed < Some(acked), "job {ordinal}");
        let row = worker.row(job_id);
        assert_eq!((row.state, row.attempt), (JobState::Completed, 1));
        // P3: the row names an object that is there, with this size and digest.
        let object = row.image.expect("an image").object.expect("an object");
        let objects = worker.store.objects.lock().unwrap();
        let bytes = &objects[&object.object_key];
        assert_eq!(object.size_bytes, bytes.len() as u64);
        assert_eq!(object.sha256, schema::Sha256Digest::of(bytes));
    }
    assert_eq!(worker.store.objects.lock().unwrap().len(), 30);
    for event in worker.log.events() {
        if let Event::Claimed(ordinals) = event {
            assert!(ordinals.len() <= 4, "over budget: {ordinals:?}");
            assert!(ordinals.iter().all(|ordinal| ordinal % 2 == ordinals[0] % 2), "two keys: {ordinals:?}");
        }
    }
}

#[tokio::test]
async fn one_transaction_completes_a_microbatch() {
    let mut worker = WorkerUnderTest::new(Setup::full_microbatches(4));
    worker.submit_many(0..4);
    worker.start_solid_color(Duration::ZERO).await;
    worker.wait_for_acks(4).await;
    worker.drain().await.expect("a good end");
    assert_eq!(worker.log.count(|event| matches!(event, Event::Completed(_))), 1);
}

#[tokio::test]
async fn a_doubled_message_makes_no_second_picture() {
    let mut worker = WorkerUnderTest::new(Setup::default());
    let job_id = worker.submit(0, PriorityBand::Normal);
    worker.publish(job_id, PriorityBand::Normal);
    worker.publish(job_id, PriorityBand::Low);
    worker.start_solid_color(Duration::ZERO).await;
    worker.wait_for_acks(3).await;
    worker.publish(job_id, PriorityBand::High);
    worker.wait_for_acks(4).await;
    worker.drain().await.expect("a good end");
    assert_eq!(worker.log.count(|event| matches!(event, Event::Stored(_))), 1);
    assert_eq!(worker.row(job_id).lease_generation, 1, "a late message changes nothing");
    assert_eq!(worker.metrics.not_claimed.get(), 3);
}

/// A relay of a build that knows no recipes says that all are exact; the rows say otherwise, and they decide.
#[tokio::test]
async fn jobs_of_different_recipes_are_drawn_in_calls_of_their_own_whatever_their_messages_say() {
    let mut worker = WorkerUnderTest::new(Setup::full_microbatches(3));
    let mut jobs = Vec::new();
    for (ordinal, cache_interval) in [(0, None), (1, Some(3)), (2, Some(2))] {
        let spec = JobSpec { seed: Some(ordinal.into()), cache_interval, ..worker_under_test::spec() };
        jobs.push(worker.insert(ordinal, spec));
    }
    let microbatch_key = worker.row(jobs[0]).spec.microbatch_key();
    for &job_id in &jobs {
        let message = JobMessage { job_id, microbatch_key, microbatch_limit: None };
        worker.queue.publish(PriorityBand::Normal, message.encode());
    }
    worker.start_scripted(|log| ScriptedPipeline::new(log, |specs, _| Ok(draw(specs)))).await;
    worker.wait_for_acks(3).await;
    worker.drain().await.expect("a good end");
    for ordinal in 0..3 {
        worker.log.position(&Event::Called(vec![ordinal]));
    }
    let recipes = jobs.iter().map(|job_id| worker.row(*job_id).image.expect("an image").recipe);
    let cached = |cache_interval| Recipe { cache_interval, ..Recipe::EXACT };
    assert_eq!(recipes.collect::<Vec<_>>(), [1, 3, 2].map(cached));
}

#[tokio::test]
async fn an_unreadable_message_is_dead_lettered_and_stops_nothing() {
    let mut worker = WorkerUnderTest::new(Setup::default());
    worker.queue.publish(PriorityBand::Normal, b"not a message".to_vec());
    let job_id = worker.submit(0, PriorityBand::Normal);
    worker.start_solid_color(Duration::ZERO).await;
    worker.wait_for_acks(1).await;
    worker.drain().await.expect("a good end");
    assert_eq!(worker.log.count(|event| *event == Event::DeadLettered), 1);
    assert_eq!(worker.state(job_id), JobState::Completed);
}

#[tokio::test]
async fn a_flagged_picture_is_recorded_and_not_published() {
    let mut worker = WorkerUnderTest::new(Setup::default());
    let job_id = worker.submit(0, PriorityBand::Normal);
    let flag = |specs: &[&schema::ValidJobSpec]| {
        let mut image = picture(specs[0]);
        (image.has_nsfw_concept, image.concept_scores) = (Some(true), vec![0.125]);
        Ok(vec![worker::pipeline::PictureOutcome::Finished(image)])
    };
    worker.start_scripted(move |log| ScriptedPipeline::new(log, move |specs, _| flag(specs))).await;
    worker.wait_for_acks(1).await;
    worker.drain().await.expect("a good end");
    assert!(worker.store.objects.lock().unwrap().is_empty());
    let image = worker.row(job_id).image.expect("a row");
    let safety = image.safety.expect("a verdict");
    assert!(image.object.is_none() && safety.has_nsfw_concept);
    assert_eq!(safety.concept_scores, [0.125]);
}

#[tokio::test]
async fn a_job_that_runs_twice_finds_its_object_there() {
    let mut worker = WorkerUnderTest::new(Setup::default());
    let job_id = worker.submit(0, PriorityBand::Normal);
    worker.start_solid_color(Duration::ZERO).await;
    worker.wait_for_acks(1).await;
    // As after a crash between storing and completing.
    worker.catalog.update(job_id, |row| {
        row.state = JobState::Available;
        row.image = None;
    });
    worker.publish(job_id, PriorityBand::Normal);
    worker.wait_for_acks(2).await;
    worker.drain().await.expect("a good end");
    assert_eq!(worker.store.objects.lock().unwrap().len(), 1);
    assert_eq!(worker.metrics.already_there.get(), 1);
    assert_eq!(worker.state(job_id), JobState::Completed);
}

#[tokio::test]
async fn a_lost_broker_connection_costs_acks_and_nothing_else() {
    let mut worker = WorkerUnderTest::new(Setup::default());
    let jobs = worker.submit_many(0..2);
    worker.disconnect();
    worker.start_scripted(|log| ScriptedPipeline::new(log, |specs, _| Ok(draw(specs)))).await;
    worker.wait_for_acks(2).await;
    // The broker hands both out again.
    for job_id in &jobs {
        worker.publish(*job_id, PriorityBand::Normal);
    }
    worker.wait_for_acks(4).await;
    worker.drain().await.expect("a good end");
    assert_eq!(worker.metrics.settled_ineffective.get(), 4);
    assert_eq!(worker.log.count(|event| matches!(event, Event::Stored(_))), 2);
    assert!(jobs.iter().all(|job_id| worker.row(*job_id).released_as.is_none()));
}

#[tokio::test]
async fn an_idle_worker_ends_by_itself() {
    let setup = Setup { exit_when_idle: Some(Duration::from_secs(2)), ..Setup::default() };
    let mut worker = WorkerUnderTest::new(setup);
    let jobs = worker.submit_many(0..5);
    worker.start_solid_color(Duration::from_millis(5)).await;
    assert_eq!(worker.ended().await.expect("a good end"), StopReason::Idle);
    assert!(jobs.iter().all(|job_id| worker.state(*job_id) == JobState::Completed));
}
