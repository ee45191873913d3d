//! The rules at the door: licence, input, idempotency.

use std::process::Command;
use std::time::Duration;

use fleet_tests::{Fleet, Servers, fleet};

#[tokio::test(flavor = "multi_thread")]
async fn no_job_without_an_accepted_licence_and_the_error_says_how() {
    let fleet = Fleet::without_acceptance(Servers::shared()).await;
    let refused = fleet.try_submit("a prompt\n", &[]);
    assert!(!refused.stderr().is_empty());
    assert_ne!(refused.code(), Some(0));
    let how =
        format!("darkroom licence accept {} --principal {}", fleet.model(), fleet_tests::fleet::PRINCIPAL);
    assert!(refused.stderr().contains(&how), "{}", refused.stderr());
    assert_eq!(fleet.count("SELECT count(*) FROM jobs").await, 0);
    fleet.accept_licence("somebody-else");
    assert_ne!(fleet.try_submit("a prompt\n", &[]).code(), Some(0), "another's acceptance is not mine");
    fleet.accept_licence(fleet_tests::fleet::PRINCIPAL);
    fleet.submit("a prompt\n", &[]);
    assert_eq!(fleet.count("SELECT count(*) FROM jobs").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_idempotency_key_is_one_batch() {
    let fleet = Fleet::new(Servers::shared()).await;
    let key = ["--idempotency-key", "monday", "--seed", "5"];
    let first = fleet.submit("one\ntwo\n", &key);
    assert_eq!(fleet.submit("one\ntwo\n", &key), first);
    assert_eq!(fleet.count("SELECT count(*) FROM jobs").await, 2);
    let other = fleet.try_submit("one\nthree\n", &key);
    assert_ne!(other.code(), Some(0), "another body under the same key is a mistake, not a batch");
    assert_eq!(fleet.count("SELECT count(*) FROM jobs").await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_fault_of_a_file_is_reported_at_once_and_nothing_is_written() {
    let fleet = Fleet::new(Servers::shared()).await;
    let file = fleet.write(
        "bad.csv",
        "prompt,width,seed,num_inference_steps\nfine,512,1,50\nwide,500,1,50\nlate,512,-4,0\n",
    );
    let arguments = ["submit", file.to_str().unwrap(), "--model", fleet.model(), "--principal", "tester"];
    let refused = fleet.darkroom(&arguments);
    assert_eq!(refused.code(), Some(2), "{}", refused.stderr());
    let text = refused.stderr();
    for (line, field, value) in [(3, "width", "500"), (4, "seed", "-4"), (4, "num_inference_steps", "0")] {
        let named = text.lines().any(|fault| {
            fault.contains(&format!("bad.csv:{line}")) && fault.contains(field) && fault.contains(value)
        });
        assert!(named, "line {line}, {field}, {value}: {text}");
    }
    assert_eq!(fleet.count("SELECT count(*) FROM batches").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_with_other_weights_than_the_registered_ones_draws_nothing() {
    let fleet = Fleet::new(Servers::shared()).await;
    let _scheduler = fleet.serve();
    fleet.submit("a prompt\n", &["--width", "64", "--height", "64", "--num-inference-steps", "1"]);
    let folder = fleet.folder().join("checkpoint");
    let copied = Command::new("cp").arg("-r").arg(fleet::checkpoint()).arg(&folder).status().unwrap();
    assert!(copied.success());
    let file = "unet/diffusion_pytorch_model.safetensors";
    let mut weights = std::fs::read(folder.join(file)).unwrap();
    // One bit of the last weight: the file loads as before and draws almost the same.
    *weights.last_mut().unwrap() ^= 1;
    std::fs::write(folder.join(file), weights).unwrap();

    let mut worker = fleet.worker(&["--model-dir", folder.to_str().unwrap()]);
    let status = worker.exit(Duration::from_secs(120)).await;
    assert!(!status.success());
    let log = worker.log();
    assert!(log.contains(&format!("{file} is not the registered one")), "{log}");
    let told = "SELECT count(*) FROM workers WHERE stop_reason LIKE '%is not the registered one%'";
    assert_eq!(fleet.count(told).await, 1);
    assert_eq!(fleet.count("SELECT count(*) FROM attempts").await, 0);
    assert_eq!(fleet.jobs_in("available").await, 1);
}
