//! F9: processes whose clocks are wrong. Leases and schedules go by the database's clock, so nothing happens.

use std::path::PathBuf;
use std::time::Duration;

use fleet_tests::{Fleet, Servers};

const SOON: Duration = Duration::from_secs(180);
const SMALL: [&str; 6] = ["--num-inference-steps", "4", "--width", "64", "--height", "64"];

/// Debian's libfaketime, which `make deps` installs.
fn libfaketime() -> PathBuf {
    let folders = std::fs::read_dir("/usr/lib").unwrap().flatten();
    let mut libraries = folders.map(|folder| folder.path().join("faketime/libfaketime.so.1"));
    libraries.find(|library| library.exists()).expect("libfaketime: run `make deps`")
}

/// Runs a process with its wall clock off by `offset`; time passes as it should.
fn clock(offset: &str) -> [(&'static str, String); 3] {
    [
        ("LD_PRELOAD", libfaketime().to_str().expect("UTF-8").to_owned()),
        ("FAKETIME", offset.to_owned()),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
    ]
}

async fn a_batch_with_clocks_at(of_the_scheduler: &str, of_the_worker: &str) {
    let fleet = Fleet::new(Servers::shared()).await;
    let batch = fleet.submit(&"a prompt\n".repeat(6), &SMALL);
    let _serve = fleet.serve_with(&clock(of_the_scheduler), &["--republish-after", "30"]);
    let options = ["--max-microbatch", "2", "--lease-seconds", "3"];
    // A microbatch outlasts a lease, so leases have to be extended and not be taken for lapsed.
    let _worker = fleet.solid_color_worker_with(&clock(of_the_worker), 2000, &options);
    fleet.await_all_final(SOON).await;
    fleet.assert_nothing_lost_nothing_twice(&batch, 6, 0).await;
    assert_eq!(fleet.count("SELECT count(*) FROM attempts WHERE outcome <> 'ok'").await, 0);
    assert_eq!(fleet.count("SELECT count(*) FROM attempts").await, 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_scheduler_is_an_hour_ahead_and_the_worker_an_hour_behind() {
    a_batch_with_clocks_at("+1h", "-1h").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_scheduler_is_an_hour_behind_and_the_worker_an_hour_ahead() {
    a_batch_with_clocks_at("-1h", "+1h").await;
}
