//! The fleet's processes, each with links of its own, killed and replaced while the run lasts.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::sync::{Mutex, MutexGuard};

use super::plan::{Member, SCHEDULERS, WORKERS};
use crate::fleet::Fleet;
use crate::link::{Link, Wall};
use crate::process::Process;
use crate::s3_front::S3Front;
use crate::servers::Servers;

/// How long a process that was asked to stop may take; its grace period is 3 seconds.
const STOP_LIMIT: Duration = Duration::from_secs(60);
/// Notices a dead peer sooner than the default, so that a run of a minute sees it.
const HEARTBEAT: &str = "heartbeat=4";

/// The processes and what stands between them and their servers.
pub struct Crew {
    /// What they work for.
    pub fleet: Arc<Fleet>,
    /// The object store as all workers see it.
    pub front: S3Front,
    workers: Vec<Post>,
    schedulers: Vec<Post>,
    /// No process is started any more.
    stopping: AtomicBool,
    /// One server fault at a time: there is nothing to break about a server that is starting.
    servers: Mutex<()>,
}

/// The servers, for one fault at a time.
pub struct Exclusive<'a> {
    fleet: &'a Fleet,
    _turn: MutexGuard<'a, ()>,
}

impl Deref for Exclusive<'_> {
    type Target = Servers;

    fn deref(&self) -> &Servers {
        self.fleet.servers()
    }
}

/// One process's place: its links stay when it is replaced.
struct Post {
    member: Member,
    links: Vec<(Wall, Link)>,
    process: Mutex<Process>,
}

impl Crew {
    /// Starts everyone.
    pub async fn start(fleet: Arc<Fleet>) -> Crew {
        let front = S3Front::start(&fleet.servers().addresses().aws_endpoint_url).await;
        let (mut workers, mut schedulers) = (Vec::new(), Vec::new());
        for number in 0..WORKERS {
            workers.push(Post::fill(&fleet, &front, Member::Worker(number)).await);
        }
        for number in 0..SCHEDULERS {
            schedulers.push(Post::fill(&fleet, &front, Member::Scheduler(number)).await);
        }
        Crew {
            fleet,
            front,
            workers,
            schedulers,
            stopping: AtomicBool::new(false),
            servers: Mutex::default(),
        }
    }

    /// Waits for the turn to break a server.
    pub async fn servers(&self) -> Exclusive<'_> {
        Exclusive { fleet: &self.fleet, _turn: self.servers.lock().await }
    }

    fn post(&self, member: Member) -> &Post {
        match member {
            Member::Worker(number) => &self.workers[number],
            Member::Scheduler(number) => &self.schedulers[number],
        }
    }

    fn posts(&self) -> impl Iterator<Item = &Post> {
        self.workers.iter().chain(&self.schedulers)
    }

    /// The way from a process to a server; none if it has none.
    pub fn link(&self, member: Member, wall: Wall) -> Option<&Link> {
        self.post(member).links.iter().find(|(to, _)| *to == wall).map(|(_, link)| link)
    }

    /// `kill -9`, and another in its place after `pause`.
    pub async fn kill(&self, member: Member, pause: Duration) {
        // Held over the pause, so that nobody else fills the place.
        let mut process = self.post(member).process.lock().await;
        process.kill();
        tokio::time::sleep(pause).await;
        *process = self.post(member).spawn(&self.fleet);
    }

    /// SIGTERM, and another in its place when it has ended.
    pub async fn replace(&self, member: Member) {
        let mut process = self.post(member).process.lock().await;
        stop(&mut process).await;
        *process = self.post(member).spawn(&self.fleet);
    }

    /// SIGSTOP for `pause`.
    pub async fn freeze(&self, member: Member, pause: Duration) {
        let mut process = self.post(member).process.lock().await;
        if process.runs() {
            process.freeze().await;
            tokio::time::sleep(pause).await;
            process.thaw();
        }
    }

    /// Starts those again that have ended by themselves.
    pub async fn restart_ended(&self) {
        for post in self.posts() {
            // Somebody who holds the lock is about to see to it.
            if let Ok(mut process) = post.process.try_lock()
                && !self.stopping.load(Ordering::Relaxed)
                && !process.runs()
            {
                *process = post.spawn(&self.fleet);
            }
        }
    }

    /// Mends every link and the object store.
    pub async fn heal(&self) {
        self.front.heal();
        for (_, link) in self.posts().flat_map(|post| &post.links) {
            link.heal();
        }
    }

    /// Everyone's name and log.
    pub async fn last_words(&self) -> Vec<(String, String)> {
        let mut words = Vec::new();
        for post in self.posts() {
            let process = post.process.lock().await;
            words.push((format!("{:?}, process {}", post.member, process.id()), process.log()));
        }
        words
    }

    /// Ends everyone in order.
    pub async fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        for post in self.posts() {
            stop(&mut *post.process.lock().await).await;
        }
    }
}

async fn stop(process: &mut Process) {
    if process.runs() {
        process.signal(Signal::SIGTERM);
        let ending = async {
            while process.runs() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        if tokio::time::timeout(STOP_LIMIT, ending).await.is_err() {
            process.kill();
        }
    }
}

impl Post {
    async fn fill(fleet: &Fleet, front: &S3Front, member: Member) -> Post {
        let mut links = vec![
            (Wall::Postgres, Link::to(fleet, Wall::Postgres).await),
            (Wall::Broker, Link::to(fleet, Wall::Broker).await.with_query(HEARTBEAT)),
        ];
        if let Member::Worker(_) = member {
            links.push((Wall::S3, Link::through(Wall::S3, &front.url()).await));
        }
        let process = Mutex::new(spawn(fleet, member, &links));
        Post { member, links, process }
    }

    fn spawn(&self, fleet: &Fleet) -> Process {
        spawn(fleet, self.member, &self.links)
    }
}

fn spawn(fleet: &Fleet, member: Member, links: &[(Wall, Link)]) -> Process {
    let env: Vec<_> = links.iter().map(|(_, link)| link.env()).collect();
    match member {
        Member::Worker(_) => {
            let options = ["--max-microbatch", "4", "--lease-seconds", "4", "--grace-seconds", "3"];
            fleet.solid_color_worker_with(&env, 60, &options)
        }
        Member::Scheduler(_) => fleet.serve_with(&env, &["--watermark", "60", "--republish-after", "6"]),
    }
}
