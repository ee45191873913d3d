//! Groups jobs that can share a forward pass, across batches and bands.
//!
//! A plain data structure: time is handed in, nothing here waits or awaits. A group (one [`Company`]) is *due* when
//! it fills a microbatch or when its oldest entry has waited `max_wait`. Of the due groups, the bands take turns
//! in leading a microbatch, by [`weight`]: with all three bands always waiting, of ten microbatches six are led by `high`,
//! three by `normal` and one by `low`, so `low` never starves. The leader is its band's oldest due entry; the rest of
//! the microbatch is filled from the leader's group, its own band first, then by urgency, oldest first.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use schema::{MicrobatchKey, PriorityBand};
use tokio::time::Instant;

/// The bands, most urgent first.
const BANDS: [PriorityBand; 3] = [PriorityBand::High, PriorityBand::Normal, PriorityBand::Low];

/// How many microbatches in a round a band leads while all bands have work.
pub const fn weight(band: PriorityBand) -> i64 {
    match band {
        PriorityBand::High => 6,
        PriorityBand::Normal => 3,
        PriorityBand::Low => 1,
    }
}

/// What entries have to agree on to share a microbatch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Company {
    /// One forward pass suits them all.
    pub key: MicrobatchKey,
    /// The most of them in one microbatch, where they were lost with a worker before. Those with a limit keep to
    /// themselves, so that jobs above suspicion are not lost with them.
    pub limit: Option<u32>,
}

impl Company {
    /// Whether its one entry may run only on a worker that holds nothing else.
    pub fn is_alone(&self) -> bool {
        self.limit == Some(1)
    }

    fn cap(&self, max_microbatch: usize) -> usize {
        self.limit.map_or(max_microbatch, |limit| max_microbatch.min(limit as usize)).max(1)
    }
}

/// Entries waiting to become microbatches. `T` is whatever has to ride along with a job.
#[derive(Debug)]
pub struct Batcher<T> {
    max_microbatch: usize,
    max_wait: Duration,
    groups: BTreeMap<Company, Group<T>>,
    /// What each band is owed, by smooth weighted round-robin; indexed like `BANDS`.
    credit: [i64; BANDS.len()],
}

#[derive(Debug)]
struct Group<T> {
    /// One line for each band, oldest first; indexed like `BANDS`.
    lines: [VecDeque<Waiting<T>>; BANDS.len()],
}

#[derive(Debug)]
struct Waiting<T> {
    entry: T,
    since: Instant,
}

impl<T> Group<T> {
    fn new() -> Self {
        Self { lines: std::array::from_fn(|_| VecDeque::new()) }
    }

    fn len(&self) -> usize {
        self.lines.iter().map(VecDeque::len).sum()
    }

    fn oldest(&self) -> Option<Instant> {
        self.lines.iter().filter_map(|line| Some(line.front()?.since)).min()
    }
}

impl<T> Batcher<T> {
    /// An empty batcher for microbatches of at most `max_microbatch` entries (at least 1).
    pub fn new(max_microbatch: usize, max_wait: Duration) -> Self {
        Self {
            max_microbatch: max_microbatch.max(1),
            max_wait,
            groups: BTreeMap::new(),
            credit: [0; BANDS.len()],
        }
    }

    /// Takes an entry in.
    pub fn push(&mut self, company: Company, band: PriorityBand, entry: T, now: Instant) {
        let group = self.groups.entry(company).or_insert_with(Group::new);
        group.lines[index(band)].push_back(Waiting { entry, since: now });
    }

    /// Entries waiting.
    pub fn len(&self) -> usize {
        self.groups.values().map(Group::len).sum()
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// When the next microbatch is due: in the past or now if one is; `None` if nothing waits.
    pub fn due_at(&self) -> Option<Instant> {
        self.groups.iter().filter_map(|(company, group)| self.group_due_at(company, group)).min()
    }

    /// The next microbatch that is due, as what its entries agree on and those entries: at least one, at most
    /// `max_microbatch` and their own limit.
    pub fn next_microbatch(&mut self, now: Instant) -> Option<(Company, Vec<T>)> {
        let leaders = BANDS.map(|band| self.leader(band, now));
        let band = self.take_turn(&leaders)?;
        let company = leaders[index(band)]?;
        let cap = company.cap(self.max_microbatch);
        let group = self.groups.get_mut(&company)?;
        let mut entries = Vec::with_capacity(cap.min(group.len()));
        let by_urgency = BANDS.iter().copied().filter(|other| *other != band);
        for band in std::iter::once(band).chain(by_urgency) {
            let room = cap - entries.len();
            let line = &mut group.lines[index(band)];
            entries.extend(line.drain(..line.len().min(room)).map(|waiting| waiting.entry));
        }
        if group.len() == 0 {
            self.groups.remove(&company);
        }
        Some((company, entries))
    }

    /// Gives all entries back, whether due or not.
    pub fn drain(&mut self) -> Vec<T> {
        let groups = std::mem::take(&mut self.groups);
        groups.into_values().flat_map(|group| group.lines).flatten().map(|waiting| waiting.entry).collect()
    }

    fn group_due_at(&self, company: &Company, group: &Group<T>) -> Option<Instant> {
        let oldest = group.oldest()?;
        let is_full = group.len() >= company.cap(self.max_microbatch);
        Some(if is_full { oldest } else { oldest + self.max_wait })
    }

    /// The group of the band's oldest entry among those that are due.
    fn leader(&self, band: PriorityBand, now: Instant) -> Option<Company> {
        let is_due = |company, group| self.group_due_at(company, group).is_some_and(|due| due <= now);
        let due = self.groups.iter().filter(|(company, group)| is_due(company, group));
        due.filter_map(|(company, group)| Some((group.lines[index(band)].front()?.since, *company)))
            .min()
            .map(|(_, company)| company)
    }

    /// Smooth weighted round-robin among the bands that have a leader.
    fn take_turn(&mut self, leaders: &[Option<Company>; BANDS.len()]) -> Option<PriorityBand> {
        let waiting = || BANDS.iter().copied().filter(|band| leaders[index(*band)].is_some());
        let round: i64 = waiting().map(weight).sum();
        for band in waiting() {
            self.credit[index(band)] += weight(band);
        }
        // The earlier band wins a tie: `max_by_key` keeps the last of equals, so the order is reversed.
        let band =
            waiting().collect::<Vec<_>>().into_iter().rev().max_by_key(|band| self.credit[index(*band)])?;
        self.credit[index(band)] -= round;
        Some(band)
    }
}

/// A band's place in `BANDS`.
const fn index(band: PriorityBand) -> usize {
    match band {
        PriorityBand::High => 0,
        PriorityBand::Normal => 1,
        PriorityBand::Low => 2,
    }
}
