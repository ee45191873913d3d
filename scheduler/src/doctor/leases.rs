//! Leases: do microbatches take longer than what the fleet is set up for?
//!
//! A worker extends its leases while it draws, so a lease may be shorter than a microbatch. Then an outage of the catalog
//! that is as long as the lease costs the whole microbatch, and a worker that stalls as long draws for nothing.
use std::time::Duration;

use schema::MicrobatchTimes;

use super::Finding;
use super::broker::CONSUMER_TIMEOUT;

/// How far back to look.
pub const WINDOW: Duration = Duration::from_secs(24 * 3600);
/// `darkroom-worker run --lease-seconds` by default. The catalog does not know what a worker was started with.
const DEFAULT_LEASE_SECONDS: f64 = 60.0;
/// Messages that a worker holds, in microbatches: two in each of three bands.
const HELD_MICROBATCHES: f64 = 6.0;

/// What the times mean for us.
pub fn judge(times: &MicrobatchTimes) -> Vec<Finding> {
    let Some(longest) = times.longest_seconds else {
        return vec![Finding::ok(
            "leases",
            "nothing was drawn within the last day, so there is nothing to compare",
        )];
    };
    let (lease, source) = match times.furthest_lease_seconds {
        // What is left of a lease is never more than the lease.
        Some(left) if left > DEFAULT_LEASE_SECONDS => (left, "the longest that a running job has left"),
        _ => (DEFAULT_LEASE_SECONDS, "the workers' default, since the catalog does not record theirs"),
    };
    let found = format!(
        "the longest of {} attempts of the last day took {longest:.1} s; the lease is {lease:.0} s ({source})",
        times.attempt_count
    );
    let mut findings = vec![if times.lost_by_the_living > 0 {
        Finding::warning(
            "leases",
            format!("{found}; {} attempts were lost by workers that lived on", times.lost_by_the_living),
            "raise --lease-seconds, or look for stalled workers and outages of the catalog",
        )
    } else if longest > lease {
        Finding::warning(
            "leases",
            found,
            "leases are extended while a worker draws, so this works; with --lease-seconds above that, an outage of the \
             catalog costs no microbatch",
        )
    } else {
        Finding::ok("leases", found)
    }];
    let held = longest * HELD_MICROBATCHES;
    let found = format!("a worker holds up to six microbatches, {held:.0} s of work at that pace");
    findings.push(if held > CONSUMER_TIMEOUT.as_secs_f64() / 2.0 {
        let hint = "lower --max-microbatch, or raise the broker's consumer_timeout (30 minutes by default) well above that";
        Finding::warning("leases against the broker", found, hint)
    } else {
        Finding::ok("leases against the broker", found)
    });
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::{Verdict, worst};

    fn times(longest: f64) -> MicrobatchTimes {
        MicrobatchTimes {
            attempt_count: 7,
            longest_seconds: Some(longest),
            lost_by_the_living: 0,
            furthest_lease_seconds: None,
        }
    }

    #[test]
    fn long_microbatches_are_held_against_lease_and_broker() {
        assert_eq!(worst(&judge(&times(20.0))), Verdict::Ok);
        let verdicts = |times| judge(&times).iter().map(|finding| finding.verdict).collect::<Vec<_>>();
        assert_eq!(verdicts(times(90.0)), [Verdict::Warning, Verdict::Ok]);
        let known = MicrobatchTimes { furthest_lease_seconds: Some(250.0), ..times(90.0) };
        assert_eq!(verdicts(known), [Verdict::Ok, Verdict::Ok], "a running job shows a longer lease");
        assert_eq!(verdicts(times(200.0)), [Verdict::Warning, Verdict::Warning]);
        let lost = MicrobatchTimes { lost_by_the_living: 1, ..times(20.0) };
        assert_eq!(verdicts(lost), [Verdict::Warning, Verdict::Ok]);
        let idle = MicrobatchTimes { longest_seconds: None, ..times(0.0) };
        assert_eq!(verdicts(idle), [Verdict::Ok]);
    }
}
