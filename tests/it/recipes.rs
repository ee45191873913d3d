//! Recipes through the whole fleet: the picture is the one that `generate` makes with the same flags, the row says which it
//! was, and a job that asks for none gets the exact picture.

use std::path::Path;
use std::time::Duration;

use fleet_tests::{Fleet, Servers};

/// The options of the batch, and of `generate`.
const STEPS: [&str; 2] = ["--num-inference-steps", "6"];
const PROMPT: &str = "a large red circle in the center on a white background";
/// After so few steps many pictures are half a skull to the safety checker; none of this seed's.
const SEED: &str = "2";

/// One line for each kind of job, with the flags that make `generate` draw the same.
const LINES: [(&str, &[&str]); 5] = [
    (",,,,", &[]),
    (",0.1,0.7,,", &["--guidance-start", "0.1", "--guidance-stop", "0.7"]),
    (",,,3,", &["--cache-interval", "3"]),
    (
        "dpmpp_2m_karras,,0.5,2,5",
        &[
            "--scheduler",
            "dpmpp_2m_karras",
            "--guidance-stop",
            "0.5",
            "--cache-interval",
            "2",
            "--num-inference-steps",
            "5",
        ],
    ),
    (",0,1,1,", &[]),
];

fn demo_model() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../demo/model"))
}

/// What `darkroom-worker generate` draws with these flags.
fn generated(fleet: &Fleet, flags: &[&str]) -> Vec<u8> {
    let output = fleet.folder().join("generated.png");
    let mut command = fleet.command("darkroom-worker");
    command.arg("generate").arg("--model").arg(demo_model()).args(["--prompt", PROMPT, "--seed", SEED]);
    if !flags.contains(&STEPS[0]) {
        command.args(STEPS);
    }
    let run = command.args(flags).arg("--output").arg(&output).output().unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    pixels(&std::fs::read(output).unwrap())
}

fn pixels(png: &[u8]) -> Vec<u8> {
    image::load_from_memory(png).expect("a PNG").to_rgb8().into_raw()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recipe_gives_the_picture_of_its_flags_and_stands_on_its_row() {
    let fleet = Fleet::with_checkpoint(Servers::shared(), demo_model()).await;
    let mut csv = "prompt,seed,scheduler,guidance_start,guidance_stop,cache_interval,steps\n".to_owned();
    csv.extend(LINES.iter().map(|(line, _)| format!("{PROMPT},{SEED},{line}\n")));
    let file = fleet.write("recipes.csv", &csv);
    let mut arguments =
        vec!["submit", file.to_str().unwrap(), "--model", fleet.model(), "--principal", "tester", "--json"];
    arguments.extend(STEPS);
    let submitted = fleet.darkroom(&arguments).succeeded().json();
    let batch = submitted["batch_id"].as_str().unwrap();
    let _serve = fleet.serve();
    let _worker = fleet.worker(&["--max-microbatch", "2", "--max-wait-ms", "2000"]);
    fleet.await_all_final(Duration::from_secs(300)).await;
    assert_eq!(fleet.jobs_in("completed").await, 5);

    let rows = "SELECT guidance_start, guidance_stop, cache_interval, microbatch_size FROM v_images ORDER BY ordinal";
    let rows: Vec<(f64, f64, i32, i32)> = sqlx::query_as(rows).fetch_all(fleet.pool()).await.unwrap();
    let recipes: Vec<(f64, f64, i32)> =
        rows.iter().map(|&(start, stop, interval, _)| (start, stop, interval)).collect();
    assert_eq!(recipes, [(0.0, 1.0, 1), (0.1, 0.7, 1), (0.0, 1.0, 3), (0.0, 0.5, 2), (0.0, 1.0, 1)]);
    // The two that ask for the exact picture, with and without words, ride together, and nobody else does.
    let sizes: Vec<i32> = rows.iter().map(|row| row.3).collect();
    assert_eq!(sizes, [2, 1, 1, 1, 2]);

    let mut drawn = Vec::new();
    for (image, (line, flags)) in fleet.images(batch).await.iter().zip(LINES) {
        let png = fleet.object(image.object_key.as_ref().expect("no skull, so nothing is withheld")).await;
        let text = String::from_utf8_lossy(&png).into_owned();
        let is_exact = flags.is_empty();
        assert_eq!(text.contains("Cache interval"), !is_exact, "{line}");
        assert_eq!(text.contains("\"cache_interval\""), !is_exact, "{line}");
        drawn.push(pixels(&png));
        assert!(
            drawn[drawn.len() - 1] == generated(&fleet, flags),
            "the pixels of `{line}` are not those of {flags:?}"
        );
    }
    assert!(drawn[0] == drawn[4], "an exact picture is the same however it was asked for");
    for (index, picture) in drawn[1..4].iter().enumerate() {
        assert!(*picture != drawn[0], "the recipe of line {} changed nothing", index + 3);
    }
    let verified = fleet.darkroom(&["verify", batch, "--deep"]);
    assert_eq!(verified.code(), Some(0), "{}", verified.stdout());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recipe_that_makes_no_sense_is_a_fault_like_any_other() {
    let fleet = Fleet::new(Servers::shared()).await;
    let csv = "prompt,guidance_start,guidance_stop,cache_interval\nfine,,,\na,0.7,0.2,0\nb,half,1.5,2.5\n";
    let file = fleet.write("bad.csv", csv);
    let arguments = ["submit", file.to_str().unwrap(), "--model", fleet.model(), "--principal", "tester"];
    let refused = fleet.darkroom(&arguments);
    assert_eq!(refused.code(), Some(2), "{}", refused.stderr());
    let text = refused.stderr();
    for fault in [
        "bad.csv:3: `guidance_stop` has to be at least `guidance_start` (0.7), but is 0.2",
        "bad.csv:3: `cache_interval` has to be a whole number of steps, from 1 to 999, but is 0",
        "bad.csv:4: `guidance_start` has to be a fraction of the steps, from 0 to 1, but is \"half\"",
        "bad.csv:4: `guidance_stop` has to be a fraction of the steps, from 0 to 1, but is 1.5",
        "bad.csv:4: `cache_interval` has to be a whole number of steps, from 1 to 999, but is \"2.5\"",
    ] {
        assert!(text.lines().any(|line| line.ends_with(fault)), "{fault}\n{text}");
    }
    // Flags of the batch are told once; a line's own value counts where there is one.
    let bad_flag = fleet.try_submit("a\nb\n", &["--guidance-stop", "1.5"]);
    assert_eq!(bad_flag.code(), Some(2));
    assert_eq!(bad_flag.stderr().matches("`guidance_stop` has to be").count(), 1, "{}", bad_flag.stderr());
    assert_eq!(fleet.count("SELECT count(*) FROM batches").await, 0);
    fleet.submit("a\n", &["--guidance-stop", "0.6", "--cache-interval", "3"]);
    let recipes =
        "SELECT count(*) FROM jobs WHERE (guidance_start, guidance_stop, cache_interval) = (0, 0.6, 3)";
    assert_eq!(fleet.count(recipes).await, 1);
    let defaults = "SELECT count(*) FROM batches WHERE defaults ->> 'guidance_stop' = '0.6'";
    assert_eq!(fleet.count(defaults).await, 1);
}
