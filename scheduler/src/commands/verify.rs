//! `darkroom verify`
use anyhow::Result;

use super::{Outcome, batch, connect};
use crate::cli::VerifyArgs;
use crate::config::Settings;
use crate::object_inspector::Depth;
use crate::object_store::S3ObjectStore;
use crate::terminal::{Terminal, printable, table};
use crate::verification::{Verification, verify};

/// Lines of each kind to show people; `--json` has all.
const SHOWN: usize = 20;

pub(super) async fn run(arguments: &VerifyArgs, settings: &Settings, terminal: Terminal) -> Result<Outcome> {
    let catalog = connect(settings).await?;
    let batch = batch(&catalog, &arguments.batch).await?;
    let s3 = settings.s3()?;
    let store = S3ObjectStore::new(&s3).await;
    let depth = if arguments.deep { Depth::Download } else { Depth::Head };
    let verification = verify(&catalog, &store, &s3.bucket, batch.batch_id, depth).await?;
    terminal.show(&verification, || describe(&batch.name, &verification))?;
    Ok(if verification.is_sound() { Outcome::Done } else { Outcome::Incomplete })
}

fn describe(name: &str, verification: &Verification) -> String {
    let account = &verification.account;
    let rows = [
        ("jobs enqueued", account.enqueued),
        ("= completed", account.completed),
        ("+ cancelled", account.cancelled),
        ("+ discarded", account.discarded),
        ("+ unfinished", account.unfinished),
        ("+ lost", verification.lost),
        ("images recorded", account.images),
        ("  of these withheld", account.withheld),
        ("  doubled", verification.doubled),
        ("  missing", count(verification.missing)),
        ("  corrupt", count(verification.corrupt)),
        ("objects orphaned", count(verification.orphaned.len() as u64)),
        ("attempts", account.attempts),
    ];
    let rows = rows.map(|(what, count)| [what.to_owned(), count.to_string()]);
    let mut text = format!("batch {} ({})\n", printable(name), verification.batch_id);
    text.push_str(&table(["what", "count"], rows));
    let mut list = |lines: Vec<String>| {
        let more = lines.len().saturating_sub(SHOWN);
        text.extend(lines.iter().take(SHOWN).map(|line| format!("{}\n", printable(line))));
        if more > 0 {
            text.push_str(&format!("... and {more} more\n"));
        }
    };
    list(verification.unfinished.iter().map(|(job, state)| format!("job {job} is {state}")).collect());
    list(verification.orphaned.iter().map(|key| format!("no row names {key}")).collect());
    list(verification.objects.faults.iter().map(|fault| format!("BROKEN P3: {}", fault.found)).collect());
    let broken = verification.broken_promises.iter().map(|broken| match broken.job_id {
        Some(job_id) => format!("BROKEN {}: job {job_id}: {}", broken.promise, broken.what),
        None => format!("BROKEN {}: {}", broken.promise, broken.what),
    });
    list(broken.collect());
    if verification.objects.digest_unknown > 0 {
        text.push_str(&format!(
            "{} objects were compared by size alone: the store does not tell their SHA-256\nhint: use --deep\n",
            verification.objects.digest_unknown
        ));
    }
    text.push_str(match (verification.is_sound(), account.unfinished) {
        (true, 0) => "every promise was kept\n",
        (true, _) => "every promise was kept so far\n",
        (false, _) => "PROMISES ARE BROKEN\n",
    });
    text
}

fn count(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use schema::{
        BatchAccount, BatchId, BrokenPromise, ImageId, JobId, JobState, ObjectFault, ObjectFaultKind,
    };

    use super::*;
    use crate::object_inspector::InspectorReport;

    #[test]
    fn an_account_adds_up_and_names_what_is_broken() {
        let batch_id: BatchId = "0190f5fe-7c00-7a00-8000-000000000001".parse().unwrap();
        let account = BatchAccount {
            enqueued: 10,
            completed: 4,
            withheld: 1,
            cancelled: 3,
            discarded: 1,
            unfinished: 1,
            attempts: 7,
            images: 5,
        };
        let fault = ObjectFault {
            image_id: ImageId::generate(),
            kind: ObjectFaultKind::Missing,
            found: "v1/x/00000000-0.png is not in the bucket b".into(),
        };
        let broken = BrokenPromise {
            promise: "P2".into(),
            batch_id,
            job_id: Some(JobId::of(batch_id, 0)),
            what: "it has 2 image rows".into(),
        };
        let verification = Verification {
            batch_id,
            lost: account.lost(),
            doubled: 1,
            missing: 1,
            corrupt: 0,
            orphaned: vec!["v1/x/00000007-0.png".into()],
            unfinished: vec![(9, JobState::Running)],
            objects: InspectorReport { inspected: 3, digest_unknown: 0, faults: vec![fault] },
            broken_promises: vec![broken],
            account,
        };
        insta::assert_snapshot!(describe("harbour", &verification), @r"
        batch harbour (0190f5fe-7c00-7a00-8000-000000000001)
        WHAT                 COUNT
        jobs enqueued        10
        = completed          4
        + cancelled          3
        + discarded          1
        + unfinished         1
        + lost               1
        images recorded      5
          of these withheld  1
          doubled            1
          missing            1
          corrupt            0
        objects orphaned     1
        attempts             7
        job 9 is running
        no row names v1/x/00000007-0.png
        BROKEN P3: v1/x/00000000-0.png is not in the bucket b
        BROKEN P2: job 18e2d600-1338-5e33-8ec4-383ff772c9ab: it has 2 image rows
        PROMISES ARE BROKEN
        ");
        let sound = Verification {
            account: BatchAccount { completed: 5, ..account },
            lost: 0,
            doubled: 0,
            objects: InspectorReport::default(),
            broken_promises: Vec::new(),
            ..verification
        };
        assert!(sound.is_sound(), "orphans and unfinished jobs break no promise");
        assert!(!Verification { lost: 1, ..sound.clone() }.is_sound());
        assert!(!Verification { doubled: 1, ..sound }.is_sound());
    }
}
