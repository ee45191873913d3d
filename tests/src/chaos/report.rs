//! What came of a run.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Mutex;
use std::time::Duration;

use sqlx::PgPool;

use super::plan::Fault;
use crate::checker::{Account, Bucket, Violation};

/// How many subjects of each kind of violation are printed before it says how many more there are.
const PRINTED: usize = 3;

/// Faults injected, by kind.
#[derive(Debug, Default)]
pub struct Tally(Mutex<BTreeMap<&'static str, u64>>);

impl Tally {
    /// One more.
    pub fn count(&self, fault: &Fault) {
        *self.0.lock().expect("nothing panics under this lock").entry(fault.kind()).or_default() += 1;
    }

    /// So far.
    pub fn counts(&self) -> BTreeMap<&'static str, u64> {
        self.0.lock().expect("nothing panics under this lock").clone()
    }
}

/// Why jobs were given up, and how many for each reason.
///
/// # Errors
/// When Postgres fails.
pub async fn discarded(pool: &PgPool) -> Result<Vec<(String, i64)>, sqlx::Error> {
    let sql = "SELECT error_class::text || ': ' || left(error_message, 100), count(*)
               FROM jobs WHERE state = 'discarded' GROUP BY 1 ORDER BY 2 DESC";
    sqlx::query_as(sql).fetch_all(pool).await
}

/// Everything that is to be said at the end.
#[derive(Debug)]
pub struct Report {
    /// What the faults were drawn from.
    pub seed: u64,
    /// How long things broke.
    pub length: Duration,
    /// How long the fleet then took to end its work.
    pub recovery: Duration,
    /// The jobs.
    pub account: Account,
    /// The objects.
    pub bucket: Bucket,
    /// Why jobs were given up.
    pub discarded: Vec<(String, i64)>,
    /// Faults by kind.
    pub faults: BTreeMap<&'static str, u64>,
    /// Broken promises.
    pub violations: Vec<Violation>,
}

impl Report {
    /// Whether every promise was kept and the account is even.
    pub fn is_clean(&self) -> bool {
        self.violations.is_empty() && self.is_even() && self.lost() == 0 && self.doubled() == 0
    }

    fn is_even(&self) -> bool {
        let Account { jobs, completed, cancelled, discarded, .. } = self.account;
        jobs > 0 && jobs == completed + cancelled + discarded
    }

    /// Completed jobs without a result that is there.
    fn lost(&self) -> i64 {
        let missing = self.bucket.violations.len() as i64;
        (self.account.completed - self.account.images).max(0) + missing
    }

    /// The subjects of the violations, by promise and what is wrong: one cause breaks many jobs alike.
    fn violations_by_kind(&self) -> BTreeMap<(&str, &str), Vec<&str>> {
        let mut by_kind: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for Violation { promise, what, subject } in &self.violations {
            by_kind.entry((promise.as_str(), what.as_str())).or_default().push(subject.as_str());
        }
        by_kind
    }

    /// Results beyond one a completed job.
    fn doubled(&self) -> i64 {
        (self.account.images - self.account.completed).max(0)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let account = &self.account;
        let Account { jobs, completed, cancelled, discarded, .. } = account;
        let total: u64 = self.faults.values().sum();
        writeln!(f, "\n{total} faults in {} s, seed {}", self.length.as_secs(), self.seed)?;
        for (kind, count) in &self.faults {
            writeln!(f, "  {count:5}  {kind}")?;
        }
        let even = if self.is_even() { "=" } else { "IS NOT" };
        writeln!(
            f,
            "jobs attempted {jobs} {even} {completed} completed + {cancelled} cancelled + {discarded} discarded"
        )?;
        for (reason, count) in &self.discarded {
            writeln!(f, "  {count:5}  discarded for {reason}")?;
        }
        writeln!(f, "results lost {}, doubled {}", self.lost(), self.doubled())?;
        writeln!(f, "objects: {} named by rows, {} orphaned", self.bucket.named, self.bucket.orphans)?;
        let share = 100.0 * account.wasted_seconds / account.seconds.max(f64::MIN_POSITIVE);
        writeln!(
            f,
            "{} attempts; wasted {:.1} of {:.1} s of work ({share:.0} %)",
            account.attempts, account.wasted_seconds, account.seconds
        )?;
        writeln!(f, "all jobs final {:.1} s after everything was healed", self.recovery.as_secs_f64())?;
        for ((promise, what), subjects) in self.violations_by_kind() {
            writeln!(f, "VIOLATED {promise}, {} times: {what}", subjects.len())?;
            for subject in subjects.iter().take(PRINTED) {
                writeln!(f, "    {subject}")?;
            }
            if subjects.len() > PRINTED {
                writeln!(f, "    and {} more", subjects.len() - PRINTED)?;
            }
        }
        let verdict = if self.is_clean() { "every promise was kept" } else { "PROMISES WERE BROKEN" };
        write!(f, "{verdict}: P1, P2, P3, P4, P7")
    }
}
