//! Leases: do microbatches take longer than what their workers were started with?
//!
//! A worker extends its leases while it draws, so a lease may be shorter than a microbatch. Then an outage of the catalog
//! that is as long as the lease costs the whole microbatch, and a worker that stalls as long draws for nothing.
use std::time::Duration;

use schema::{MicrobatchTimes, PriorityBand, prefetch};

use super::Finding;
use super::broker::CONSUMER_TIMEOUT;

/// How far back to look.
pub const WINDOW: Duration = Duration::from_secs(24 * 3600);
/// `darkroom-worker run --lease-seconds` by default: what a worker has whose build did not record it.
const DEFAULT_LEASE_SECONDS: f64 = 60.0;
/// The longest that `--lease-seconds` may be.
const MAX_LEASE_SECONDS: f64 = 3600.0;
/// What a worker holds whose build did not record its microbatches: two in each of three bands.
const HELD_MICROBATCHES: f64 = 6.0;

/// What the times mean for us, for each model and each set of its workers' settings.
pub fn judge(times: &[MicrobatchTimes]) -> Vec<Finding> {
    let judged: Vec<Finding> = times.iter().flat_map(judge_settings).collect();
    if judged.is_empty() {
        let found = "nothing was drawn within the last day, so there is nothing to compare";
        return vec![Finding::ok("leases", found)];
    }
    judged
}

/// The workers of one model that were started alike.
fn judge_settings(times: &MicrobatchTimes) -> Vec<Finding> {
    let lease = times.lease_seconds.map_or(DEFAULT_LEASE_SECONDS, f64::from);
    let source = if times.lease_seconds.is_some() { "" } else { ", the default, since they did not say" };
    let workers = match times.worker_count {
        1 => format!("model {}, worker {}", times.model, times.slowest_worker),
        count => format!("model {}, {count} workers, the slowest {}", times.model, times.slowest_worker),
    };
    let lost = (times.lost_by_the_living > 0).then(|| {
        format!("{} attempts of the last day were lost by workers that lived on", times.lost_by_the_living)
    });
    let Some(longest) = times.longest_seconds else {
        let hint = "look for stalled workers and outages of the catalog, and raise --lease-seconds";
        return lost
            .map(|lost| {
                Finding::warning(
                    "leases",
                    format!("{workers}: {lost}; the lease is {lease:.0} s{source}"),
                    hint,
                )
            })
            .into_iter()
            .collect();
    };
    let found = format!(
        "{workers}: the longest of {} attempts of the last day took {longest:.1} s; the lease is {lease:.0} s{source}",
        times.attempt_count
    );
    let mut findings = vec![match lost {
        Some(lost) => {
            let hint = format!(
                "{}, and look for stalled workers and outages of the catalog",
                change(times, longest, lease)
            );
            Finding::warning("leases", format!("{found}; {lost}"), hint)
        }
        None if longest > lease => {
            let hint = format!(
                "{}. Leases are extended while a worker draws, so this works; but an outage of the catalog as long as the \
                 lease costs the microbatch",
                change(times, longest, lease)
            );
            Finding::warning("leases", found, hint)
        }
        None => Finding::ok("leases", found),
    }];
    let microbatches = held_microbatches(times);
    let held = longest * microbatches;
    let found =
        format!("{workers}: it holds up to {microbatches:.0} microbatches, {held:.0} s of work at that pace");
    findings.push(if held > CONSUMER_TIMEOUT.as_secs_f64() / 2.0 {
        let lower = lower_max_microbatch(times);
        let hint = format!(
            "{lower}, or raise the broker's consumer_timeout (30 minutes by default) well above that"
        );
        Finding::warning("leases against the broker", found, hint)
    } else {
        Finding::ok("leases against the broker", found)
    });
    findings
}

/// The messages that a worker holds of all bands, in microbatches.
fn held_microbatches(times: &MicrobatchTimes) -> f64 {
    let most = times.max_microbatch.and_then(|most| u16::try_from(most).ok()).filter(|most| *most > 0);
    most.map_or(HELD_MICROBATCHES, |most| {
        f64::from(prefetch(most)) / f64::from(most) * PriorityBand::ALL.len() as f64
    })
}

/// How to start the workers so that their leases are twice what their longest microbatch took, and no shorter than now.
fn change(times: &MicrobatchTimes, longest: f64, lease: f64) -> String {
    let wanted = (longest.max(lease) * 2.0 / 10.0).ceil() * 10.0;
    if wanted > MAX_LEASE_SECONDS {
        return lower_max_microbatch(times);
    }
    format!("start them with --lease-seconds {wanted:.0}, or {}", lower_max_microbatch(times))
}

fn lower_max_microbatch(times: &MicrobatchTimes) -> String {
    match times.max_microbatch {
        Some(1) => "give them smaller jobs: --max-microbatch is 1 already".to_owned(),
        Some(most) => format!("lower --max-microbatch (it is {most})"),
        None => "lower --max-microbatch".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::{Verdict, worst};

    fn times(longest: f64) -> MicrobatchTimes {
        MicrobatchTimes {
            model: "demo".parse().unwrap(),
            lease_seconds: Some(60),
            max_microbatch: Some(8),
            worker_count: 3,
            slowest_worker: "gpu-2".to_owned(),
            attempt_count: 7,
            longest_seconds: Some(longest),
            lost_by_the_living: 0,
        }
    }

    fn verdicts(times: MicrobatchTimes) -> Vec<Verdict> {
        judge(&[times]).iter().map(|finding| finding.verdict).collect()
    }

    #[test]
    fn long_microbatches_are_held_against_their_workers_lease_and_the_broker() {
        assert_eq!(worst(&judge(&[times(20.0)])), Verdict::Ok);
        assert_eq!(verdicts(times(90.0)), [Verdict::Warning, Verdict::Ok]);
        let longer = MicrobatchTimes { lease_seconds: Some(91), ..times(90.0) };
        assert_eq!(verdicts(longer), [Verdict::Ok, Verdict::Ok], "its own lease counts");
        let shorter = MicrobatchTimes { lease_seconds: Some(19), ..times(20.0) };
        assert_eq!(verdicts(shorter), [Verdict::Warning, Verdict::Ok], "its own lease counts");
        let unknown = MicrobatchTimes { lease_seconds: None, max_microbatch: None, ..times(61.0) };
        assert_eq!(verdicts(unknown), [Verdict::Warning, Verdict::Ok]);
        assert_eq!(verdicts(times(200.0)), [Verdict::Warning, Verdict::Warning]);
        let small = |longest| MicrobatchTimes { max_microbatch: Some(1), ..times(longest) };
        assert_eq!(verdicts(small(29.0)), [Verdict::Ok, Verdict::Ok], "ten of one picture in each band");
        assert_eq!(verdicts(small(31.0)), [Verdict::Ok, Verdict::Warning], "ten of one picture in each band");
        let lost = MicrobatchTimes { lost_by_the_living: 1, ..times(20.0) };
        assert_eq!(verdicts(lost), [Verdict::Warning, Verdict::Ok]);
        let only_lost = MicrobatchTimes { lost_by_the_living: 1, longest_seconds: None, ..times(0.0) };
        assert_eq!(verdicts(only_lost), [Verdict::Warning]);
        let failing = MicrobatchTimes { longest_seconds: None, ..times(0.0) };
        assert_eq!(verdicts(failing), [Verdict::Ok], "nothing to compare");
        assert_eq!(judge(&[]).len(), 1);
    }

    #[test]
    fn each_set_of_settings_is_told_what_to_change() {
        let patient = MicrobatchTimes { lease_seconds: Some(300), worker_count: 1, ..times(90.0) };
        let findings = judge(&[times(90.0), patient]);
        assert_eq!(findings.len(), 4);
        insta::assert_snapshot!(findings[0].found, @"model demo, 3 workers, the slowest gpu-2: the longest of 7 attempts of the last day took 90.0 s; the lease is 60 s");
        insta::assert_snapshot!(findings[0].hint.as_deref().unwrap(), @"start them with --lease-seconds 180, or lower --max-microbatch (it is 8). Leases are extended while a worker draws, so this works; but an outage of the catalog as long as the lease costs the microbatch");
        insta::assert_snapshot!(findings[2].found, @"model demo, worker gpu-2: the longest of 7 attempts of the last day took 90.0 s; the lease is 300 s");
    }

    #[test]
    fn no_lease_is_advised_that_a_worker_would_refuse() {
        let hint = |times| judge(&[times])[0].hint.clone().unwrap();
        let endless = MicrobatchTimes { max_microbatch: Some(1), ..times(2000.0) };
        assert!(!hint(endless.clone()).contains("--lease-seconds"), "{}", hint(endless));
        assert!(hint(times(1800.0)).contains("--lease-seconds 3600"));
    }
}
