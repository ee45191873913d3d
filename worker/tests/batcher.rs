//! The batcher's promises, over random traffic: never over budget, never two keys, never loses or doubles an entry,
//! never holds a due entry back, and every band gets its share.
#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions; this is for their helpers")]

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;
use schema::{MicrobatchKey, PriorityBand};
use tokio::time::Instant;
use worker::batcher::{Batcher, Company, weight};

const MAX_WAIT: Duration = Duration::from_millis(100);

/// Any company for small sizes; the last size is that of suspects, two at most together, and the one before differs from the
/// first by its recipe alone.
const SUSPECTS: u32 = 3;
const WITH_RECIPE: u32 = 2;

fn key(size: u32) -> Company {
    let (width, recipe) = if size == WITH_RECIPE { (64, "/0-0.5/3") } else { (64 * (size + 1), "") };
    let key: MicrobatchKey = format!("{width}x512/50/pndm/cfg{recipe}").parse().expect("a well-formed key");
    Company { key, limit: (size == SUSPECTS).then_some(2) }
}

#[derive(Debug, Clone)]
enum Event {
    Push { size: u32, band: PriorityBand },
    Pass { millis: u64 },
    Take,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => (0..4u32, 0..3usize).prop_map(|(size, band)| Event::Push { size, band: PriorityBand::ALL[band] }),
        1 => (0..150u64).prop_map(|millis| Event::Pass { millis }),
        2 => Just(Event::Take),
    ]
}

proptest! {
    #[test]
    fn every_entry_leaves_once_in_a_microbatch_of_its_key(
        max_microbatch in 1..9usize,
        events in prop::collection::vec(event(), 0..200),
    ) {
        let mut batcher = Batcher::new(max_microbatch, MAX_WAIT);
        let mut now = Instant::now();
        let mut waiting: BTreeMap<usize, (Company, Instant)> = BTreeMap::new();
        for (number, event) in events.into_iter().enumerate() {
            match event {
                Event::Pass { millis } => now += Duration::from_millis(millis),
                Event::Push { size, band } => {
                    batcher.push(key(size), band, number, now);
                    waiting.insert(number, (key(size), now));
                }
                Event::Take => {
                    let due = batcher.due_at().is_some_and(|due| due <= now);
                    match batcher.next_microbatch(now) {
                        None => {
                            prop_assert!(!due);
                            // Nothing waits too long, and no group is full.
                            let mut counts = BTreeMap::new();
                            for (key, since) in waiting.values() {
                                prop_assert!(*since + MAX_WAIT > now);
                                *counts.entry(*key).or_insert(0) += 1;
                            }
                            let cap = |key: &Company| max_microbatch.min(key.limit.unwrap_or(u32::MAX) as usize);
                            prop_assert!(counts.iter().all(|(key, count)| *count < cap(key)));
                        }
                        Some((key, entries)) => {
                            prop_assert!(due);
                            prop_assert!(!entries.is_empty() && entries.len() <= max_microbatch);
                            prop_assert!(key.limit.is_none_or(|limit| entries.len() <= limit as usize));
                            for entry in entries {
                                let (pushed_key, _) = waiting.remove(&entry).expect("an entry left twice");
                                prop_assert_eq!(pushed_key, key);
                            }
                        }
                    }
                }
            }
            prop_assert_eq!(batcher.len(), waiting.len());
            prop_assert_eq!(batcher.is_empty(), waiting.is_empty());
        }
        let mut left = batcher.drain();
        left.sort_unstable();
        prop_assert_eq!(left, waiting.into_keys().collect::<Vec<_>>());
    }

    #[test]
    fn no_band_starves_whatever_the_others_do(keys in prop::collection::vec(0..4u32, 3)) {
        let mut batcher = Batcher::new(4, MAX_WAIT);
        let now = Instant::now();
        for (band, size) in PriorityBand::ALL.iter().zip(&keys) {
            for _ in 0..400 {
                batcher.push(key(*size), *band, *band, now);
            }
        }
        let round: i64 = PriorityBand::ALL.iter().map(|band| weight(*band)).sum();
        for _ in 0..5 {
            let mut leads: BTreeMap<PriorityBand, i64> = BTreeMap::new();
            for _ in 0..round {
                let (_, entries) = batcher.next_microbatch(now).expect("plenty is due");
                // The leader is the first entry.
                *leads.entry(entries[0]).or_default() += 1;
            }
            for band in PriorityBand::ALL {
                prop_assert_eq!(leads[band], weight(*band));
            }
        }
    }
}

#[test]
fn a_full_group_goes_at_once_and_a_part_group_after_its_wait() {
    let mut batcher = Batcher::new(2, MAX_WAIT);
    let start = Instant::now();
    batcher.push(key(0), PriorityBand::Normal, 'a', start);
    assert_eq!(batcher.next_microbatch(start), None);
    assert_eq!(batcher.due_at(), Some(start + MAX_WAIT));
    batcher.push(key(0), PriorityBand::Low, 'b', start);
    assert_eq!(batcher.next_microbatch(start), Some((key(0), vec!['a', 'b'])));
    batcher.push(key(1), PriorityBand::Normal, 'c', start);
    assert_eq!(batcher.next_microbatch(start + MAX_WAIT), Some((key(1), vec!['c'])));
    assert_eq!(batcher.due_at(), None);
}

#[test]
fn jobs_of_different_recipes_do_not_share_a_microbatch() {
    let mut batcher = Batcher::new(2, MAX_WAIT);
    let start = Instant::now();
    batcher.push(key(0), PriorityBand::Normal, "exact", start);
    batcher.push(key(WITH_RECIPE), PriorityBand::Normal, "cached", start);
    assert_eq!(batcher.next_microbatch(start), None, "two jobs, but not two of a kind");
    batcher.push(key(WITH_RECIPE), PriorityBand::Normal, "cached too", start);
    assert_eq!(batcher.next_microbatch(start), Some((key(WITH_RECIPE), vec!["cached", "cached too"])));
    assert_eq!(batcher.next_microbatch(start + MAX_WAIT), Some((key(0), vec!["exact"])));
}

#[test]
fn an_urgent_entry_of_the_same_key_fills_up_before_a_patient_one() {
    let mut batcher = Batcher::new(2, MAX_WAIT);
    let start = Instant::now();
    batcher.push(key(0), PriorityBand::Low, "low", start);
    batcher.push(key(0), PriorityBand::Normal, "normal", start);
    batcher.push(key(0), PriorityBand::High, "high", start);
    assert_eq!(batcher.next_microbatch(start), Some((key(0), vec!["high", "normal"])));
}
