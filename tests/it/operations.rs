//! The commands of who runs a fleet: what they find on real servers, and that they change only what they say.

use std::time::Duration;

use fleet_tests::fleet::Finished;
use fleet_tests::{Fleet, Servers, eventually};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(120);

/// Runs `darkroom ARGUMENTS --json` to its end, whatever that is, and reads what it printed.
fn data(fleet: &Fleet, arguments: &[&str]) -> (Option<i32>, Value) {
    let finished: Finished = fleet.darkroom(&[arguments, &["--json"]].concat());
    assert!(!finished.stdout().is_empty(), "{arguments:?}: {}", finished.stderr());
    (finished.code(), finished.json())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_is_verified_and_what_lies_about_is_reconciled() {
    let fleet = Fleet::new(Servers::shared()).await;
    let batch = fleet.submit(&"a prompt\n".repeat(6), &["--num-inference-steps", "2"]);
    let (code, verified) = data(&fleet, &["verify", &batch]);
    assert_eq!(
        (code, &verified["account"]["unfinished"]),
        (Some(0), &6.into()),
        "not finished is not broken"
    );
    let _serve = fleet.serve();
    let _worker = fleet.solid_color_worker(20, &[]);
    fleet.await_all_final(SOON).await;
    for arguments in [&["verify", &batch][..], &["verify", &batch, "--deep"]] {
        let (code, verified) = data(&fleet, arguments);
        assert_eq!(code, Some(0), "{verified}");
        let account = &verified["account"];
        assert_eq!((&account["completed"], &account["images"]), (&6.into(), &6.into()), "{verified}");
        let objects = &verified["objects"];
        assert_eq!((&objects["inspected"], &objects["digest_unknown"]), (&6.into(), &0.into()), "{verified}");
        assert_eq!(verified["orphaned"], Value::Array(Vec::new()));
    }

    // An orphan of a killed attempt, and an object of a fleet that this one does not know.
    let orphan = format!("v1/{batch}/00000000-0123456789abcdef.png");
    let foreign = format!("v1/{}/00000000-0123456789abcdef.png", uuid::Uuid::now_v7());
    for key in [&orphan, &foreign] {
        fleet.put_object(key, b"left behind").await;
    }
    let (code, verified) = data(&fleet, &["verify", &batch]);
    assert_eq!((code, &verified["orphaned"][0]), (Some(0), &orphan.as_str().into()), "{verified}");
    let (code, _) = data(&fleet, &["reconcile"]);
    assert_eq!(code, Some(0));
    assert!(fleet.objects(&orphan).await.len() == 1, "it is not a day old");
    // The store tells its time in whole seconds, so an object of this second may seem to come from the future.
    let dry_run = ["reconcile", "--dry-run", "--orphans-older-than", "0"];
    let found = || async { data(&fleet, &dry_run).1["orphans"]["keys"][0].clone() };
    eventually("the orphan to be found", SOON, found, |key| *key == orphan.as_str()).await;
    assert!(fleet.objects(&orphan).await.len() == 1, "a dry run changes nothing");
    let (code, reconciled) = data(&fleet, &["reconcile", "--orphans-older-than", "0"]);
    assert_eq!((code, &reconciled["orphans"]["deleted"]), (Some(0), &1.into()), "{reconciled}");
    assert!(fleet.objects(&orphan).await.is_empty());
    assert!(fleet.objects(&foreign).await.len() == 1, "what another fleet owns is left alone");
    fleet.assert_nothing_lost_nothing_twice(&batch, 6, 0).await;

    // One object is gone, and in another's place lie other bytes of the same size.
    let images = fleet.images(&batch).await;
    let key = |index: usize| images[index].object_key.clone().unwrap();
    let size = usize::try_from(images[1].size_bytes.unwrap()).unwrap();
    fleet.delete_object(&key(0)).await;
    let (code, verified) = data(&fleet, &["verify", &batch]);
    assert_eq!(
        (code, &verified["missing"], &verified["corrupt"]),
        (Some(1), &1.into(), &0.into()),
        "{verified}"
    );
    fleet.put_object(&key(1), &vec![0; size]).await;
    let (code, verified) = data(&fleet, &["verify", &batch, "--deep"]);
    assert_eq!(
        (code, &verified["missing"], &verified["corrupt"]),
        (Some(1), &1.into(), &1.into()),
        "{verified}"
    );
    let (code, reconciled) = data(&fleet, &["reconcile", "--deep"]);
    assert_eq!((code, reconciled["objects"]["faults"].as_array().map(Vec::len)), (Some(1), Some(2)));
    let faults = "SELECT count(*) FROM object_faults WHERE cleared_at IS NULL AND kind = ";
    assert_eq!(fleet.count(&format!("{faults} 'missing'")).await, 1);
    assert_eq!(fleet.count(&format!("{faults} 'wrong_digest'")).await, 1);
    assert_eq!(fleet.count("SELECT count(*) FROM images").await, 6, "image rows are never changed");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_doctor_finds_a_sound_fleet_sound_and_a_commit_that_may_be_lost() {
    let fleet = Fleet::new(Servers::shared()).await;
    let _serve = fleet.serve();
    let batch = fleet.submit("a prompt\n", &["--num-inference-steps", "2"]);
    let worker = fleet.solid_color_worker(20, &[]);
    fleet.await_all_final(SOON).await;
    let (code, report) = data(&fleet, &["doctor"]);
    assert_eq!(code, Some(0), "{report:#}");
    let verdict = |report: &Value, probe: &str| {
        let findings = report["findings"].as_array().unwrap().clone();
        let found = findings.into_iter().find(|finding| finding["probe"] == probe);
        found.unwrap_or_else(|| panic!("{probe}: {report:#}"))["verdict"].as_str().unwrap().to_owned()
    };
    for probe in [
        "postgres version",
        "postgres durability",
        "postgres migrations",
        "clock against the database",
        "leases",
        "broker version",
        "broker queues",
        "broker declared queues",
        "bucket condition",
        "bucket checksum",
        "bucket metadata",
        "bucket consistency",
        "clock against the bucket",
    ] {
        assert_eq!(verdict(&report, probe), "ok", "{probe}: {report:#}");
    }
    assert!(fleet.objects("darkroom-doctor/").await.is_empty(), "the doctor cleans up");
    fleet.assert_nothing_lost_nothing_twice(&batch, 1, 0).await;

    let separator = if fleet.database_url().contains('?') { '&' } else { '?' };
    let careless = format!("{}{separator}options[synchronous_commit]=off", fleet.database_url());
    let output = fleet.command("darkroom").env("DATABASE_URL", careless).args(["doctor", "--json"]).output();
    let output = output.unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{report:#}");
    assert_eq!(verdict(&report, "postgres durability"), "danger");
    assert_eq!(verdict(&report, "broker queues"), "ok", "one danger does not hide the rest");

    // Nothing answers on port 1.
    let output =
        fleet.command("darkroom").env("AMQP_URL", "amqp://a:b@127.0.0.1:1/%2f").args(["doctor"]).output();
    let output = output.unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("DANGER   broker") && text.contains("change: check AMQP_URL"), "{text}");

    // A worker whose microbatches take longer than its own lease lasts.
    drop(worker);
    let hasty = ["--name", "hasty", "--lease-seconds", "3", "--max-microbatch", "1"];
    let _hasty = fleet.solid_color_worker(4000, &hasty);
    fleet.submit("a long one\n", &["--num-inference-steps", "2"]);
    fleet.await_all_final(SOON).await;
    let (code, report) = data(&fleet, &["doctor"]);
    assert_eq!(code, Some(0), "it works, so it is no danger: {report:#}");
    let findings = report["findings"].as_array().unwrap();
    let of_hasty = |finding: &&Value| {
        let found = finding["found"].as_str().unwrap();
        finding["probe"] == "leases" && found.contains("worker hasty") && found.contains("the lease is 3 s")
    };
    let finding = findings.iter().find(of_hasty).unwrap_or_else(|| panic!("{report:#}"));
    assert_eq!(finding["verdict"], "warning", "{finding:#}");
    assert!(finding["hint"].as_str().unwrap().contains("--lease-seconds"), "{finding:#}");
}
