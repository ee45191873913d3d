//! The discrete-event simulation: GPUs that draw one microbatch while the next is claimed, around servers with queues.
//!
//! A GPU is a worker as it is built: it asks for its next microbatch when it starts one, and draws on when that was claimed in
//! time. Claiming takes messages out of the broker's queue and a turn of Postgres; finishing takes another turn, in the
//! background. Messages come from the relay, which publishes in chunks while fewer than the watermark wait, out of a
//! backlog that never ends: it asks for some at once, publishes one while the one before is marked, and asks again when all are
//! marked. Service times vary exponentially around their means, as a busy machine's do; drawing does not.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use super::Demands;

/// Messages that the relay keeps in the queue for each GPU: ten microbatches.
const WATERMARK_MICROBATCHES: usize = 10;
/// Messages that the relay publishes at once.
const CHUNK: usize = 1_000;
/// Chunks that it asks for at once. All have to be marked before it asks again.
const WINDOW: usize = 5;
/// Of Postgres' work for a picture, the shares of publishing, claiming and completing it. How they are split matters little: all
/// of it has to be done at the same rate.
const PUBLISH_SHARE: f64 = 0.3;
const CLAIM_SHARE: f64 = 0.3;
const COMPLETE_SHARE: f64 = 0.4;

/// What each GPU does.
#[derive(Debug, Clone, Copy)]
pub struct Workload {
    /// How fast it draws.
    pub pictures_per_second: f64,
    /// How many at once.
    pub microbatch: usize,
}

/// What stands in the middle.
#[derive(Debug, Clone, Copy)]
pub struct Servers {
    /// What is asked of them.
    pub demands: Demands,
    /// Statements that Postgres works on at once.
    pub postgres_cores: usize,
}

/// What a run showed, after it had settled.
#[derive(Debug, Clone, Copy)]
pub struct Outcome {
    /// Pictures drawn a second, all GPUs together.
    pub rate: f64,
    /// Of the GPUs' time, how much they drew.
    pub gpu_share: f64,
    /// Of each server's time, how much it worked.
    pub postgres: f64,
    /// The broker's queue.
    pub broker: f64,
    /// The relay: from its question for a window of chunks until all are published and marked, waiting for broker and Postgres
    /// included.
    pub relay: f64,
}

impl Outcome {
    /// What is in use most of its time. The relay's time holds its waiting for the two others, so it is named only where neither
    /// of them is as busy.
    pub fn busiest(&self) -> &'static str {
        let (name, share) =
            if self.postgres >= self.broker { ("Postgres", self.postgres) } else { ("broker", self.broker) };
        if self.relay > share + 0.1 { "relay" } else { name }
    }
}

/// Something that a server works on.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Work {
    /// The relay prepares a chunk.
    Relay,
    /// Of these many messages, the broker's part of publishing.
    Publish(usize),
    /// Postgres marks them.
    Mark(usize),
    /// The broker delivers a GPU's next microbatch.
    Deliver(usize),
    /// Postgres claims it.
    Claim(usize),
    /// Postgres records one.
    Complete,
    /// Postgres looks after some workers' leases.
    Leases,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum What {
    Served(Place, Work),
    /// A GPU has drawn its microbatch.
    Drawn(usize),
    /// Some workers look after their leases.
    Look(f64),
    /// A second is over.
    Tick,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Place {
    Postgres,
    Broker,
    Relay,
}

/// A server with its line.
#[derive(Debug)]
struct Server {
    places: usize,
    working: usize,
    line: VecDeque<(Work, f64)>,
    worked: f64,
}

#[derive(Debug, Clone, Copy, Default)]
struct Gpu {
    draws: bool,
    next_is_claimed: bool,
    drawn_since: f64,
}

struct Simulation {
    servers: Servers,
    workload: Workload,
    now: f64,
    /// Counted from here.
    settled: f64,
    end: f64,
    events: BinaryHeap<Reverse<(Time, u64)>>,
    whats: Vec<What>,
    postgres: Server,
    broker: Server,
    relay: Server,
    /// When it began the window that it works on, if it does.
    relay_since: Option<f64>,
    /// Chunks of this window that it has yet to begin.
    window: usize,
    /// A chunk that is published and waits for the marks of the one before.
    published: Option<usize>,
    /// Messages of the chunk that is being marked.
    marking: Option<usize>,
    gpus: Vec<Gpu>,
    /// Messages that wait in the broker.
    ready: usize,
    /// GPUs that wait for messages.
    hungry: VecDeque<usize>,
    drawing: f64,
    pictures: usize,
    random: u64,
}

/// Seconds, ordered.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Time(f64);
impl Eq for Time {}
impl PartialOrd for Time {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Time {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

impl Server {
    fn new(places: usize) -> Self {
        Self { places, working: 0, line: VecDeque::new(), worked: 0.0 }
    }
}

/// Lets `gpus` draw for `seconds` around `servers`, the first quarter uncounted.
pub fn run(servers: Servers, workload: Workload, gpus: usize, seconds: f64) -> Outcome {
    let simulation = Simulation {
        servers,
        workload,
        now: 0.0,
        settled: seconds / 4.0,
        end: seconds,
        events: BinaryHeap::new(),
        whats: Vec::new(),
        postgres: Server::new(servers.postgres_cores),
        broker: Server::new(1),
        relay: Server::new(1),
        relay_since: None,
        window: 0,
        published: None,
        marking: None,
        gpus: vec![Gpu::default(); gpus],
        ready: 0,
        hungry: VecDeque::new(),
        drawing: 0.0,
        pictures: 0,
        random: 0x9E37_79B9_7F4A_7C15,
    };
    simulation.go()
}

impl Simulation {
    fn go(mut self) -> Outcome {
        self.at(0.0, What::Tick);
        for gpu in 0..self.gpus.len() {
            // Spread over a microbatch's time, as workers that started at different times are.
            self.ask(gpu);
        }
        while let Some(Reverse((Time(time), index))) = self.events.pop() {
            if time > self.end {
                break;
            }
            self.now = time;
            self.happen(self.whats[index as usize]);
        }
        let counted = self.end - self.settled;
        // What still draws at the end counts as far as it has come.
        let open: f64 =
            self.gpus.iter().filter(|gpu| gpu.draws).map(|gpu| self.counted(gpu.drawn_since, self.end)).sum();
        if let Some(since) = self.relay_since {
            self.relay.worked += self.counted(since, self.end);
        }
        let share = |server: &Server| (server.worked / (counted * server.places as f64)).min(1.0);
        Outcome {
            rate: self.pictures as f64 / counted,
            gpu_share: (self.drawing + open) / (counted * self.gpus.len() as f64),
            postgres: share(&self.postgres),
            broker: share(&self.broker),
            relay: share(&self.relay),
        }
    }

    fn happen(&mut self, what: What) {
        match what {
            What::Tick => {
                let leases = self.servers.demands.postgres_lease * self.gpus.len() as f64;
                // As so many statements of their own, not as one.
                // Spread over the second, as workers that know nothing of each other do.
                let looks = self.gpus.len().clamp(1, 64);
                for look in 0..looks {
                    let time = self.now + look as f64 / looks as f64;
                    self.at(time, What::Look(leases / looks as f64));
                }
                self.wake_relay();
                self.at(self.now + 1.0, What::Tick);
            }
            What::Look(cost) => self.send(Place::Postgres, Work::Leases, cost),
            What::Drawn(gpu) => {
                let counted = self.counted(self.gpus[gpu].drawn_since, self.now);
                self.drawing += counted;
                if self.now >= self.settled {
                    self.pictures += self.workload.microbatch;
                }
                self.gpus[gpu].draws = false;
                let cost = self.servers.demands.postgres * COMPLETE_SHARE * self.workload.microbatch as f64;
                self.send(Place::Postgres, Work::Complete, cost);
                self.draw_if_possible(gpu);
            }
            What::Served(place, work) => {
                self.served(work);
                self.free(place);
            }
        }
    }

    fn served(&mut self, work: Work) {
        let demands = self.servers.demands;
        match work {
            Work::Relay => {
                self.send(Place::Broker, Work::Publish(CHUNK), demands.broker / 2.0 * CHUNK as f64)
            }
            Work::Publish(messages) => {
                self.published = Some(messages);
                self.mark();
            }
            Work::Mark(messages) => {
                self.marking = None;
                self.ready += messages;
                while self.ready >= self.workload.microbatch
                    && let Some(gpu) = self.hungry.pop_front()
                {
                    self.deliver(gpu);
                }
                self.mark();
                self.wake_relay();
            }
            Work::Deliver(gpu) => {
                let cost = demands.postgres * CLAIM_SHARE * self.workload.microbatch as f64;
                self.send(Place::Postgres, Work::Claim(gpu), cost);
            }
            Work::Claim(gpu) => {
                self.gpus[gpu].next_is_claimed = true;
                self.draw_if_possible(gpu);
            }
            Work::Complete | Work::Leases => {}
        }
    }

    /// A GPU wants its next microbatch claimed.
    fn ask(&mut self, gpu: usize) {
        if self.ready >= self.workload.microbatch {
            self.deliver(gpu);
        } else {
            self.hungry.push_back(gpu);
            self.wake_relay();
        }
    }

    fn deliver(&mut self, gpu: usize) {
        self.ready -= self.workload.microbatch;
        let cost = self.servers.demands.broker / 2.0 * self.workload.microbatch as f64;
        self.send(Place::Broker, Work::Deliver(gpu), cost);
    }

    fn draw_if_possible(&mut self, gpu: usize) {
        if self.gpus[gpu].draws || !self.gpus[gpu].next_is_claimed {
            return;
        }
        self.gpus[gpu] = Gpu { draws: true, next_is_claimed: false, drawn_since: self.now };
        let duration = self.workload.microbatch as f64 / self.workload.pictures_per_second;
        self.at(self.now + duration, What::Drawn(gpu));
        self.ask(gpu);
    }

    /// Has the chunk that is published marked, once the one before is, and begins the next meanwhile.
    fn mark(&mut self) {
        if self.marking.is_none()
            && let Some(messages) = self.published.take()
        {
            self.marking = Some(messages);
            let cost = self.servers.demands.postgres * PUBLISH_SHARE * messages as f64;
            self.send(Place::Postgres, Work::Mark(messages), cost);
            self.relay.working = 0;
            self.wake_relay();
        }
    }

    /// The relay publishes one chunk at a time. It asks how much room there is when all that it has published is marked, and
    /// then publishes a window.
    fn wake_relay(&mut self) {
        if self.relay.working > 0 {
            return;
        }
        if self.window == 0 && self.marking.is_none() {
            if let Some(since) = self.relay_since.take() {
                self.relay.worked += self.counted(since, self.now);
            }
            let watermark = WATERMARK_MICROBATCHES * self.workload.microbatch * self.gpus.len();
            // The last chunk of a window may be a part of one; here it is whole.
            self.window = watermark.saturating_sub(self.ready).div_ceil(CHUNK).min(WINDOW);
            self.relay_since = (self.window > 0).then_some(self.now);
        }
        if self.window > 0 {
            self.window -= 1;
            self.relay.working = 1;
            let cost = self.servers.demands.relay * CHUNK as f64;
            let duration = self.vary(cost);
            self.at(self.now + duration, What::Served(Place::Relay, Work::Relay));
        }
    }

    fn send(&mut self, place: Place, work: Work, cost: f64) {
        self.server(place).line.push_back((work, cost));
        self.start(place);
    }

    fn free(&mut self, place: Place) {
        // The relay is free when its chunk's marks begin, not before.
        if place != Place::Relay {
            self.server(place).working -= 1;
            self.start(place);
        }
    }

    fn start(&mut self, place: Place) {
        let server = self.server(place);
        if server.working == server.places {
            return;
        }
        let Some((work, cost)) = server.line.pop_front() else { return };
        server.working += 1;
        let duration = self.vary(cost);
        let counted = self.counted(self.now, self.now + duration);
        self.server(place).worked += counted;
        self.at(self.now + duration, What::Served(place, work));
    }

    fn server(&mut self, place: Place) -> &mut Server {
        match place {
            Place::Postgres => &mut self.postgres,
            Place::Broker => &mut self.broker,
            Place::Relay => &mut self.relay,
        }
    }

    fn at(&mut self, time: f64, what: What) {
        self.events.push(Reverse((Time(time), self.whats.len() as u64)));
        self.whats.push(what);
    }

    /// Of a stretch of time, the part that is counted.
    fn counted(&self, from: f64, to: f64) -> f64 {
        (to.min(self.end) - from.max(self.settled)).max(0.0)
    }

    /// Exponential around `mean`, from a fixed seed (xorshift64*).
    fn vary(&mut self, mean: f64) -> f64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        let bits = self.random.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 11;
        let uniform = (bits as f64 + 0.5) / (1_u64 << 53) as f64;
        -uniform.ln() * mean
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLOW: Workload = Workload { pictures_per_second: 0.5, microbatch: 4 };

    fn servers(postgres: f64, broker: f64) -> Servers {
        let demands = Demands { postgres, postgres_lease: 0.0, broker, relay: 0.000_01 };
        Servers { demands, postgres_cores: 2 }
    }

    #[test]
    fn with_little_to_do_gpus_always_draw_and_servers_work_what_they_are_asked() {
        let outcome = run(servers(0.001, 0.000_1), SLOW, 100, 400.0);
        assert!(outcome.gpu_share > 0.99, "{outcome:?}");
        assert!((outcome.rate - 50.0).abs() < 1.5, "100 GPUs at 0.5 a second: {outcome:?}");
        // The law of utilization: 50 pictures a second at 1 ms each, over two cores.
        assert!((outcome.postgres - 0.025).abs() < 0.003, "{outcome:?}");
        assert_eq!(outcome.busiest(), "Postgres");
    }

    #[test]
    fn no_more_is_drawn_than_the_busiest_server_allows() {
        // Two cores at 10 ms a picture: 200 a second, which 400 GPUs would use up. A little less, because the relay's marks wait in
        // the same line, and while they do there is at times nothing to claim.
        let outcome = run(servers(0.01, 0.000_1), SLOW, 1_000, 400.0);
        assert!((165.0..204.0).contains(&outcome.rate), "{outcome:?}");
        assert!(outcome.postgres > 0.85 && (0.33..0.41).contains(&outcome.gpu_share), "{outcome:?}");
        assert_eq!(outcome.busiest(), "Postgres");
        // With a broker that takes 8 ms for each message it is 125 a second. It takes some seconds for a chunk, so chance needs
        // a long time to even out.
        let outcome = run(servers(0.001, 0.008), SLOW, 1_000, 4_000.0);
        assert!((outcome.rate - 125.0).abs() < 8.0, "{outcome:?}");
        assert_eq!(outcome.busiest(), "broker");
    }

    #[test]
    fn the_relay_publishes_while_it_marks() {
        // A chunk takes half a second to publish and half a second to mark, each exponential: 1,000 a second one after the
        // other. Side by side a chunk takes the longer of the two, three quarters of a second, and a window of five takes half a second
        // for the first to be published, four times that, and half a second for the last to be marked: 1,250 a second.
        let demands =
            Demands { postgres: 0.000_5 / PUBLISH_SHARE, postgres_lease: 0.0, broker: 0.0, relay: 0.000_5 };
        let servers = Servers { demands, postgres_cores: 1_000 };
        let workload = Workload { pictures_per_second: 20.0, microbatch: 16 };
        let outcome = run(servers, workload, 1_000, 2_000.0);
        assert!((outcome.rate - 1_250.0).abs() < 60.0, "{outcome:?}");
        assert!(outcome.relay > 0.99 && outcome.busiest() == "relay", "{outcome:?}");
    }

    #[test]
    fn leases_cost_what_they_cost_whatever_is_drawn() {
        let mut with_leases = servers(0.001, 0.000_1);
        with_leases.demands.postgres_lease = 0.004;
        let outcome = run(with_leases, SLOW, 100, 400.0);
        assert!((outcome.postgres - (0.025 + 0.2)).abs() < 0.02, "{outcome:?}");
    }
}
