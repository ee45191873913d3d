//! `darkroom-worker bench`, the command.
#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions; this is for their helpers")]

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn bench(options: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_darkroom-worker"));
    command.args(["--log", "warn", "bench", "--num-inference-steps", "2", "--width", "64", "--height", "64"]);
    command.args(options);
    command
}

fn succeeded(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn json(line: &str) -> Value {
    assert_eq!(line.trim_end().lines().count(), 1, "{line}");
    serde_json::from_str(line).unwrap()
}

#[test]
fn every_dtype_and_batch_size_is_measured_with_its_stages_and_operations() {
    let options = [
        "--size",
        "tiny",
        "--json",
        "--repeats",
        "2",
        "--warmup",
        "0",
        "--dtypes",
        "f32,bf16",
        "--batch-sizes",
        "1,3",
        "--peak-tflops",
        "0.5",
    ];
    let report = json(&succeeded(&bench(&options).output().unwrap()));
    assert_eq!((&report["model"], &report["device"]), (&"tiny".into(), &"cpu".into()));
    assert_eq!((report["width"].as_u64(), report["height"].as_u64()), (Some(64), Some(64)));
    let runs = report["runs"].as_array().unwrap();
    let measured: Vec<_> = runs
        .iter()
        .map(|run| (run["dtype"].as_str().unwrap(), run["batch_size"].as_u64().unwrap()))
        .collect();
    assert_eq!(measured, [("f32", 1), ("f32", 3), ("bf16", 1), ("bf16", 3)]);
    let flops = |part: &str| report["flops"][part].as_f64().unwrap();
    // Two PNDM steps are three calls of the UNet, each for two samples.
    let per_picture =
        6.0 * flops("unet_forward") + flops("text_encoder") + flops("vae_decode") + flops("safety_checker");
    for run in runs {
        let number = |pointer: &str| run.pointer(pointer).and_then(Value::as_f64).unwrap();
        let (min, median, max) = (number("/seconds/min"), number("/seconds/median"), number("/seconds/max"));
        assert!(0.0 < min && min <= median && median <= max, "{run}");
        let stages = ["text_encoder", "denoise", "vae_decode", "to_host", "safety_checker"];
        for stage in stages {
            assert!(number(&format!("/stages/{stage}/median")) > 0.0, "{stage}: {run}");
        }
        let rate = number("/batch_size") * per_picture / median / 1e12;
        assert!((number("/tflops_per_second") / rate - 1.0).abs() < 1e-6, "{run}");
        assert!((number("/share_of_peak") * 0.5 / rate - 1.0).abs() < 1e-6, "{run}");
        assert_eq!((&run["graph"], &run["replayed_steps"]), (&false.into(), &0.into()), "{run}");
        assert_eq!(run["computed_at_once"], 1, "{run}");
        assert_eq!(run["kernels"], "plain", "{run}");
        // The libraries alone take more than this.
        assert!(number("/peak_resident_bytes") > f64::from(1 << 24), "{run}");
        assert!(number("/cpu_seconds/median") > 0.0, "{run}");
    }
}

#[test]
fn graphs_take_turns_and_a_batch_is_filled_up() {
    let folder = tempfile::tempdir().unwrap();
    let outputs = folder.path().join("outputs");
    let tiny = ["--size", "tiny", "--json", "--repeats", "1", "--warmup", "0"];
    let alone = bench(&tiny).arg("--outputs").arg(&outputs).output().unwrap();
    assert_eq!(json(&succeeded(&alone))["difference_from_reference"], Value::Null);
    let padded =
        bench(&tiny).args(["--graph", "off,on", "--pad-batch", "3", "--reference"]).arg(&outputs).output();
    let report = json(&succeeded(&padded.unwrap()));
    let difference = report["difference_from_reference"].as_f64().unwrap();
    assert!(difference > 0.0 && difference < 1e-4, "{difference:e}");
    let runs = report["runs"].as_array().unwrap();
    let graphs: Vec<&Value> = runs.iter().map(|run| &run["graph"]).collect();
    assert_eq!(graphs, [&Value::from(false), &Value::from(true)]);
    for run in runs {
        // On the CPU there is nothing to make a graph with, and it says so.
        assert_eq!((&run["computed_at_once"], &run["replayed_steps"]), (&3.into(), &0.into()), "{run}");
    }
}

#[test]
fn a_picture_is_put_into_every_place_of_a_batch() {
    let options = ["--size", "tiny", "--check-company", "--batch-sizes", "3"];
    let report = json(&succeeded(&bench(&options).output().unwrap()));
    assert_eq!((&report["batch_size"], &report["calls"]), (&3.into(), &4.into()));
    assert_eq!(report["places_that_differ"], serde_json::json!([]));
    assert_eq!((&report["alone_is_equal"], &report["neighbors_differ"]), (&true.into(), &true.into()));
}

#[test]
fn calls_in_a_row_are_finished_beside_the_next_or_after_one_another() {
    let options = ["--size", "tiny", "--json", "--repeats", "1", "--warmup", "1", "--batch-sizes", "2"];
    let row = ["--overlap-decode", "off,on", "--in-a-row", "3"];
    let report = json(&succeeded(&bench(&options).args(row).output().unwrap()));
    let runs = report["runs"].as_array().unwrap();
    let overlaps: Vec<&Value> = runs.iter().map(|run| &run["overlap_decode"]).collect();
    assert_eq!(overlaps, [&Value::from(false), &Value::from(true)]);
    for run in runs {
        let number = |pointer: &str| run.pointer(pointer).and_then(Value::as_f64).unwrap();
        assert_eq!(run["in_a_row"], 3, "{run}");
        assert!(number("/stages/denoise/median") > 0.0 && number("/stages/vae_decode/median") > 0.0, "{run}");
        let rate = number("/images_per_second") * number("/seconds/median");
        assert!((rate - 2.0).abs() < 1e-6, "times are one call's: {run}");
    }
    let stages = ["denoise", "text_encoder", "vae_decode", "to_host", "safety_checker"];
    let median =
        |stage: &&str| runs[0].pointer(&format!("/stages/{stage}/median")).unwrap().as_f64().unwrap();
    let sum: f64 = stages.iter().map(median).sum();
    let seconds = runs[0].pointer("/seconds/median").unwrap().as_f64().unwrap();
    assert!(sum <= seconds, "one after the other, the stages are parts of the call");
}

#[test]
fn a_picture_does_not_depend_on_what_is_decoded_beside_it() {
    let options = ["--size", "tiny", "--check-company", "--batch-sizes", "3", "--overlap-decode", "off,on"];
    let output = succeeded(&bench(&options).output().unwrap());
    let reports: Vec<Value> = output.lines().map(json).collect();
    let overlaps: Vec<&Value> = reports.iter().map(|report| &report["overlap_decode"]).collect();
    assert_eq!(overlaps, [&Value::from(false), &Value::from(true)]);
    for report in &reports {
        assert_eq!((&report["calls"], &report["places_that_differ"]), (&4.into(), &serde_json::json!([])));
        assert_eq!((&report["alone_is_equal"], &report["neighbors_differ"]), (&true.into(), &true.into()));
    }
}

/// The pixels in a file that `--outputs` wrote.
fn pixels(path: &Path) -> Vec<u8> {
    let bytes = std::fs::read(path).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let pixels = tensors.tensor("pixels").unwrap();
    assert_eq!(pixels.shape(), [1, 64, 64, 3]);
    assert_eq!(tensors.tensor("latents").unwrap().shape(), [1, 4, 8, 8]);
    pixels.data().to_vec()
}

#[test]
fn a_saved_model_makes_the_pictures_of_the_drawn_one_and_answers_line_by_line() {
    let folder = tempfile::tempdir().unwrap();
    let (drawn, saved) = (folder.path().join("drawn"), folder.path().join("saved"));
    let model = folder.path().join("model");
    let output =
        bench(&["--size", "tiny", "--repeats", "1", "--warmup", "0", "--outputs"]).arg(&drawn).output();
    let table = succeeded(&output.unwrap());
    assert!(table.starts_with("tiny, cpu, 64x64, 2 pndm steps, guidance 7.5\n"), "{table}");
    assert_eq!(table.lines().count(), 3, "{table}");
    let save = bench(&["--size", "tiny", "--save-only", "--save-model"]).arg(&model).output().unwrap();
    assert_eq!(succeeded(&save), "");

    let mut child = bench(&["--on-demand", "--model"])
        .arg(&model)
        .arg("--outputs")
        .arg(&saved)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut stdin, mut stdout) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    for _ in 0..2 {
        stdin.write_all(b"\n").unwrap();
        line.clear();
        stdout.read_line(&mut line).unwrap();
        let call = json(&line);
        assert_eq!(call["num_steps"], 3);
        assert!(call["denoised_seconds"].as_f64().unwrap() <= call["seconds"].as_f64().unwrap(), "{call}");
    }
    drop(stdin);
    assert!(child.wait().unwrap().success());

    let pixels = [pixels(&drawn), pixels(&saved)];
    assert!(pixels[0] == pixels[1]);
    assert!(
        pixels[0].iter().any(|&byte| byte != pixels[0][0]),
        "a picture of one color would agree with anything"
    );
}

#[test]
fn a_file_of_engines_is_read_before_anything_is_measured() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("engines.json");
    std::fs::write(&file, r#"{"gpu": "a", "cudnn": "b", "pinned": [{"convolution": 1}]}"#).unwrap();
    let output = bench(&["--size", "tiny", "--convolutions"]).arg(&file).output().unwrap();
    assert!(!output.status.success());
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("engines.json cannot be used"), "{error}");
    assert!(error.contains("invalid type: integer `1`"), "{error}");
    assert!(error.contains("hint: `darkroom-worker tune`"), "{error}");
}
