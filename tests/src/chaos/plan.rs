//! What breaks, and when: drawn from a seed alone, so that a run can be repeated.

use std::fmt;
use std::time::Duration;

use crate::link::Wall;
use crate::proxy::Mode;
use crate::s3_front::S3Fault;

/// Workers of the crew.
pub const WORKERS: usize = 3;
/// Schedulers of the crew.
pub const SCHEDULERS: usize = 2;
/// Milliseconds from one fault to the next.
const GAP: std::ops::Range<u64> = 1_000..4_000;
/// The local stack gives up when servers end too often; a real one would page somebody.
const BETWEEN_RESTARTS: Duration = Duration::from_secs(20);
/// Longer than a lease of the crew's workers, so that it lapses.
pub const PAST_LEASE: std::ops::Range<u64> = 6..12;

/// One process of the crew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Member {
    /// A worker, from 0.
    Worker(usize),
    /// A scheduler, from 0.
    Scheduler(usize),
}

/// Something that breaks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fault {
    /// SIGKILL; another takes its place after a while.
    Kill(Member, Duration),
    /// SIGTERM; another takes its place when it has ended.
    Stop(Member),
    /// SIGSTOP, and SIGCONT so much later.
    Freeze(Member, Duration),
    /// One link, for so long.
    Link(Member, Wall, Mode, Duration),
    /// Every connection of one link is reset.
    Cut(Member, Wall),
    /// The object store, for so long.
    Store(S3Fault, u64, Duration),
    /// The broker crashes and starts again.
    RestartBroker,
    /// The broker loses its queues and all messages.
    WipeBroker,
    /// Postgres crashes and recovers.
    RestartPostgres,
}

impl Fault {
    /// Its kind, for counting.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Kill(Member::Worker(_), _) => "worker killed",
            Self::Kill(Member::Scheduler(_), _) => "scheduler killed",
            Self::Stop(_) => "worker asked to stop",
            Self::Freeze(Member::Worker(_), _) => "worker frozen past its lease",
            Self::Freeze(Member::Scheduler(_), _) => "scheduler frozen",
            Self::Link(_, Wall::Postgres, ..) => "link to Postgres broken",
            Self::Link(_, Wall::Broker, ..) => "link to the broker broken",
            Self::Link(_, Wall::S3, ..) => "link to S3 broken",
            Self::Cut(..) => "connections reset",
            Self::Store(..) => "object store misbehaving",
            Self::RestartBroker => "broker crashed",
            Self::WipeBroker => "broker wiped",
            Self::RestartPostgres => "Postgres crashed",
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {self:?}", self.kind())
    }
}

/// A fault at its time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Strike {
    /// From the beginning of the run.
    pub at: Duration,
    /// What breaks.
    pub fault: Fault,
}

/// A small generator of numbers (SplitMix64), the same on every machine and in every version.
#[derive(Debug, Clone)]
pub struct Seeded(u64);

impl Seeded {
    /// The generator of `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number of `range`.
    pub fn within(&mut self, range: std::ops::Range<u64>) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        range.start + mixed % (range.end - range.start)
    }

    /// One of `choices`.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.index(choices.len())]
    }

    fn index(&mut self, length: usize) -> usize {
        usize::try_from(self.within(0..length as u64)).unwrap_or_default()
    }
}

/// One card of the deck that faults are drawn from, so that none of them waits long for its turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Card {
    KillWorker,
    KillScheduler,
    StopWorker,
    FreezeWorker,
    FreezeScheduler,
    LinkOfWorker(Wall),
    LinkOfScheduler(Wall),
    Cut,
    Store,
    RestartBroker,
    WipeBroker,
    RestartPostgres,
}

const DECK: [Card; 15] = [
    Card::KillWorker,
    Card::KillWorker,
    Card::KillScheduler,
    Card::StopWorker,
    Card::FreezeWorker,
    Card::FreezeScheduler,
    Card::LinkOfWorker(Wall::Postgres),
    Card::LinkOfWorker(Wall::Broker),
    Card::LinkOfWorker(Wall::S3),
    Card::LinkOfScheduler(Wall::Postgres),
    Card::LinkOfScheduler(Wall::Broker),
    Card::Cut,
    Card::Store,
    Card::WipeBroker,
    // One of the two servers; they take turns by chance.
    Card::RestartBroker,
];

/// The faults of a run of this `length`, in their order.
pub fn draw(seed: u64, length: Duration) -> Vec<Strike> {
    let mut random = Seeded::new(seed);
    let mut deck: Vec<Card> = Vec::new();
    let mut strikes = Vec::new();
    let mut at = Duration::from_secs(3);
    let mut last_restart: Option<Duration> = None;
    while at < length {
        if deck.is_empty() {
            deck = DECK.to_vec();
        }
        let mut card = deck.swap_remove(random.index(deck.len()));
        if card == Card::RestartBroker {
            if last_restart.is_some_and(|last| at - last < BETWEEN_RESTARTS) {
                card = Card::KillWorker;
            } else {
                card = random.pick(&[Card::RestartBroker, Card::RestartPostgres]);
                last_restart = Some(at);
            }
        }
        strikes.push(Strike { at, fault: fault(card, &mut random) });
        at += Duration::from_millis(random.within(GAP));
    }
    strikes
}

fn fault(card: Card, random: &mut Seeded) -> Fault {
    let worker = Member::Worker(random.index(WORKERS));
    let scheduler = Member::Scheduler(random.index(SCHEDULERS));
    let past_lease = Duration::from_secs(random.within(PAST_LEASE));
    let short = Duration::from_millis(random.within(100..3_000));
    let mode =
        random.pick(&[Mode::Stall, Mode::Refuse, Mode::HoldAnswers, Mode::Slow(Duration::from_millis(150))]);
    match card {
        Card::KillWorker => Fault::Kill(worker, short),
        Card::KillScheduler => Fault::Kill(scheduler, short),
        Card::StopWorker => Fault::Stop(worker),
        Card::FreezeWorker => Fault::Freeze(worker, past_lease),
        Card::FreezeScheduler => Fault::Freeze(scheduler, past_lease),
        Card::LinkOfWorker(wall) => Fault::Link(worker, wall, mode, past_lease),
        Card::LinkOfScheduler(wall) => Fault::Link(scheduler, wall, mode, past_lease),
        Card::Cut => {
            Fault::Cut(random.pick(&[worker, scheduler]), random.pick(&[Wall::Postgres, Wall::Broker]))
        }
        Card::Store => {
            let store = random.pick(&[
                S3Fault::Status(500),
                S3Fault::Status(503),
                S3Fault::Status(409),
                S3Fault::Status(412),
                S3Fault::Delay(Duration::from_secs(2)),
                S3Fault::Truncate,
                S3Fault::Corrupt,
                S3Fault::LoseAnswer,
            ]);
            Fault::Store(store, random.pick(&[20, 50, 100]), past_lease)
        }
        Card::RestartBroker => Fault::RestartBroker,
        Card::WipeBroker => Fault::WipeBroker,
        Card::RestartPostgres => Fault::RestartPostgres,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_seed_is_a_plan_and_a_long_one_holds_every_kind() {
        let ten_minutes = Duration::from_secs(600);
        let plan = draw(42, ten_minutes);
        assert_eq!(plan, draw(42, ten_minutes));
        assert_ne!(plan, draw(43, ten_minutes));
        assert!(plan.is_sorted_by_key(|strike| strike.at));
        let kinds: BTreeSet<_> = plan.iter().map(|strike| strike.fault.kind()).collect();
        assert_eq!(kinds.len(), 13, "{kinds:?}");
    }

    #[test]
    fn servers_are_not_restarted_more_often_than_the_stack_bears() {
        for seed in 0..50 {
            let restart =
                |strike: &&Strike| matches!(strike.fault, Fault::RestartBroker | Fault::RestartPostgres);
            let plan = draw(seed, Duration::from_secs(600));
            let times: Vec<_> = plan.iter().filter(restart).map(|strike| strike.at).collect();
            assert!(times.windows(2).all(|pair| pair[1] - pair[0] >= BETWEEN_RESTARTS), "seed {seed}");
        }
    }
}
