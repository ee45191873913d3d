//! Clocks: leases go by the database's clock alone, but a request to S3 is signed with the time of the machine.
use chrono::{DateTime, TimeDelta, Utc};

use super::Finding;

/// More is worth a look.
const WARNING: TimeDelta = TimeDelta::seconds(60);
/// S3 refuses requests whose signature is older or newer than that.
const SIGNATURE_LIMIT: TimeDelta = TimeDelta::minutes(15);

/// Another machine's clock, asked between two looks at ours.
#[derive(Clone, Copy, Debug)]
pub struct Comparison {
    /// Our clock before the question.
    pub asked: DateTime<Utc>,
    /// The other clock.
    pub other: DateTime<Utc>,
    /// Our clock after the answer.
    pub answered: DateTime<Utc>,
}

impl Comparison {
    /// By how much our clock is ahead of the other, as exactly as the journey allows.
    fn ahead(self) -> TimeDelta {
        self.asked + (self.answered - self.asked) / 2 - self.other
    }
}

/// Our clock against the database's.
pub fn judge_database(comparison: Comparison) -> Finding {
    let offset = offset(comparison.ahead());
    let found = format!("{offset} the database's clock; leases go by the database's clock alone");
    judge("clock against the database", found, comparison.ahead())
}

/// Our clock against the object store's.
pub fn judge_store(comparison: Option<Comparison>) -> Finding {
    const PROBE: &str = "clock against the bucket";
    let Some(comparison) = comparison else {
        return Finding::ok(PROBE, "the store does not tell its time");
    };
    let found =
        format!("{} the store's clock, which signatures have to agree with", offset(comparison.ahead()));
    judge(PROBE, found, comparison.ahead())
}

fn judge(probe: &'static str, found: String, ahead: TimeDelta) -> Finding {
    let hint = "run an NTP client on both machines; S3 refuses signatures that are 15 minutes off";
    if ahead.abs() >= SIGNATURE_LIMIT {
        Finding::danger(probe, found, hint)
    } else if ahead.abs() > WARNING {
        Finding::warning(probe, found, hint)
    } else {
        Finding::ok(probe, found)
    }
}

fn offset(ahead: TimeDelta) -> String {
    let seconds = ahead.abs().as_seconds_f64();
    format!("{seconds:.1} s {}", if ahead < TimeDelta::zero() { "behind" } else { "ahead of" })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Verdict;

    fn comparison(ahead_seconds: i64) -> Comparison {
        let other = DateTime::UNIX_EPOCH;
        let ours = other + TimeDelta::seconds(ahead_seconds);
        Comparison { asked: ours - TimeDelta::seconds(2), other, answered: ours + TimeDelta::seconds(2) }
    }

    #[test]
    fn an_offset_is_judged_by_what_it_breaks() {
        for (ahead, verdict) in [
            (0, Verdict::Ok),
            (-60, Verdict::Ok),
            (61, Verdict::Warning),
            (-899, Verdict::Warning),
            (900, Verdict::Danger),
            (-3600, Verdict::Danger),
        ] {
            assert_eq!(judge_database(comparison(ahead)).verdict, verdict, "{ahead}");
            assert_eq!(judge_store(Some(comparison(ahead))).verdict, verdict, "{ahead}");
        }
        assert_eq!(judge_store(None).verdict, Verdict::Ok);
    }

    #[test]
    fn the_direction_is_told() {
        insta::assert_snapshot!(judge_database(comparison(-90)).found, @"90.0 s behind the database's clock; leases go by the database's clock alone");
        insta::assert_snapshot!(judge_database(comparison(90)).found, @"90.0 s ahead of the database's clock; leases go by the database's clock alone");
    }
}
