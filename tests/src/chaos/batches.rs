//! The people of the run: they submit batches, repeat what was not answered, and change their minds.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use super::plan::Seeded;
use super::{ask, open_jobs};
use crate::fleet::{Fleet, PRINCIPAL};

/// Nobody submits while so many jobs wait.
const BACKLOG: i64 = 150;
/// After everything is healed, a repetition has so long to succeed.
const REPEAT_LIMIT: Duration = Duration::from_secs(180);

/// What was submitted and acknowledged: idempotency key, batch and number of jobs.
pub type Acknowledged = (String, String, i64);

/// The submissions of a run.
pub struct Submissions {
    fleet: Arc<Fleet>,
    random: Mutex<Seeded>,
    acknowledged: Mutex<Vec<Acknowledged>>,
}

impl Submissions {
    /// None yet.
    pub fn new(fleet: Arc<Fleet>, random: Seeded) -> Submissions {
        Submissions { fleet, random: Mutex::new(random), acknowledged: Mutex::default() }
    }

    /// Everything that `submit` said yes to.
    pub fn acknowledged(&self) -> Vec<Acknowledged> {
        self.acknowledged.lock().expect("nothing panics under this lock").clone()
    }

    fn within(&self, range: std::ops::Range<u64>) -> u64 {
        self.random.lock().expect("nothing panics under this lock").within(range)
    }

    /// Submits and cancels until `until`; then waits until every submission is answered.
    pub async fn run(self: Arc<Self>, until: Instant) {
        let mut cancelling = JoinSet::new();
        let mut number = 0;
        while Instant::now() < until {
            if ask(|| open_jobs(self.fleet.pool())).await >= BACKLOG {
                tokio::time::sleep(Duration::from_millis(200)).await;
                continue;
            }
            number += 1;
            let batch = self.submit(number).await;
            if self.within(0..4) == 0 {
                let pause = Duration::from_millis(self.within(0..4_000));
                cancelling.spawn(cancel(self.fleet.clone(), batch, pause));
            }
        }
        while let Some(cancelled) = cancelling.join_next().await {
            cancelled.expect("cancelling does not panic");
        }
    }

    /// Submits one batch under one key until it is acknowledged; sometimes the first process is killed half-way.
    async fn submit(&self, number: u64) -> String {
        let jobs = self.within(1..40);
        let band =
            ["high", "normal", "normal", "low"][usize::try_from(self.within(0..4)).unwrap_or_default()];
        let steps = ["4", "6"][usize::try_from(self.within(0..2)).unwrap_or_default()];
        let prompts: String = (0..jobs).map(|line| format!("prompt {line} of batch {number}\n")).collect();
        let file = self.fleet.write(&format!("chaos-{number}.txt"), &prompts);
        let key = format!("chaos-{number}");
        let file = file.to_str().expect("UTF-8");
        let arguments = [
            &["submit", file, "--model", self.fleet.model(), "--principal", PRINCIPAL, "--json"][..],
            &["--idempotency-key", &key, "--priority", band, "--num-inference-steps", steps],
            &["--width", "64", "--height", "64", "--seed", "1"],
        ]
        .concat();
        if self.within(0..5) == 0 {
            let mut command = self.fleet.command("darkroom");
            command.args(&arguments);
            let mut killed = self.fleet.spawn("darkroom submit", command);
            tokio::time::sleep(Duration::from_millis(self.within(0..400))).await;
            killed.kill();
        }
        let answer = insist(&self.fleet, &arguments).await;
        let answer: serde_json::Value = serde_json::from_slice(&answer).expect("`submit --json` prints JSON");
        let batch = answer["batch_id"].as_str().expect("a batch's id").to_owned();
        let jobs = i64::try_from(jobs).expect("a few");
        self.acknowledged.lock().expect("nothing panics under this lock").push((key, batch.clone(), jobs));
        batch
    }
}

async fn cancel(fleet: Arc<Fleet>, batch: String, pause: Duration) {
    tokio::time::sleep(pause).await;
    insist(&fleet, &["cancel", &batch]).await;
}

/// Runs `darkroom ARGUMENTS` until it succeeds; its output.
async fn insist(fleet: &Fleet, arguments: &[&str]) -> Vec<u8> {
    let started = Instant::now();
    loop {
        let mut command = fleet.command("darkroom");
        command.args(arguments);
        let output = tokio::task::spawn_blocking(move || command.output());
        let output = output.await.expect("waiting does not panic").expect("`darkroom` can be run");
        if output.status.success() {
            return output.stdout;
        }
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(started.elapsed() < REPEAT_LIMIT, "`darkroom {}`: {error}", arguments.join(" "));
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}
