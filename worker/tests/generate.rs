//! `darkroom-worker generate`, the command.
#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions; this is for their helpers")]

#[path = "support/golden.rs"]
mod golden;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use golden::golden as golden_path;
use serde_json::Value;
use sha2::{Digest as _, Sha256};

fn generate(checkpoint: &Path, output: &Path, options: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_darkroom-worker"))
        .args([
            "generate",
            "--prompt",
            "a red circle",
            "--seed",
            "42",
            "--num-inference-steps",
            "3",
            "--model",
        ])
        .arg(checkpoint)
        .arg("--output")
        .arg(output)
        .args(options)
        .output()
        .unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn one_line_of_json_describes_the_written_picture() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("picture.png");
    let output = generate(&golden_path("tiny"), &path, &["--json", "--height", "40", "--width", "24"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert_eq!(stdout.lines().count(), 1);
    let report: Value = serde_json::from_str(&stdout).unwrap();
    let png = fs::read(&path).unwrap();
    assert_eq!(report["sha256"], hex::encode(Sha256::digest(&png)));
    assert_eq!((report["seed"].as_u64(), report["width"].as_u64()), (Some(42), Some(24)));
    assert_eq!(report["height"].as_u64(), Some(40));
    assert_eq!(report["concept_scores"].as_array().unwrap().len(), 17);
    assert_eq!(report["special_care_scores"].as_array().unwrap().len(), 3);
    assert!(report["has_nsfw_concept"].is_boolean());
    for stage in ["load", "text_encoder", "denoise", "vae_decode", "to_host", "safety_checker", "total"] {
        assert!(report["seconds"][stage].as_f64().unwrap() > 0.0, "{stage}");
    }
    assert_eq!(report["scheduler"], "pndm");
    assert_eq!(report["kernels"], "plain");
    assert_eq!(png[..8], *b"\x89PNG\r\n\x1a\n");
    // Only the picture is left in its folder, and the same command makes the same file.
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    let again = generate(&golden_path("tiny"), &path, &["--json", "--height", "40", "--width", "24"]);
    assert!(again.status.success());
    assert_eq!(fs::read(&path).unwrap(), png);
}

#[test]
fn all_bad_arguments_are_named_and_nothing_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("picture.png");
    let options = [
        "--width",
        "100",
        "--scheduler",
        "plms",
        "--device",
        "gpu",
        "--dtype",
        "fp16",
        "--guidance-scale",
        "inf",
    ];
    let output = generate(&golden_path("small"), &path, &options);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    for fault in [
        "`device` must be `cpu`, `cuda` or `cuda:N` but is `gpu`",
        "`dtype` must be `f32`, `f16` or `bf16` but is `fp16`",
        "`scheduler` must be one of pndm | ddim | euler | euler_a | dpmpp_2m | dpmpp_2m_karras | unipc | lms but is `plms`",
        "`guidance_scale` must be a finite number but is inf",
        "`width` must be a positive multiple of 8 but is 100",
    ] {
        assert!(stderr(&output).contains(fault), "{fault} is not in {}", stderr(&output));
    }
    assert!(!path.exists());
}

#[test]
fn a_folder_without_a_checkpoint_fails_with_a_hint() {
    let folder = tempfile::tempdir().unwrap();
    let output = generate(folder.path(), &folder.path().join("picture.png"), &[]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("model_index.json: there is no such file"), "{}", stderr(&output));
}

#[test]
fn a_cut_prompt_is_said_on_standard_error_and_in_the_json() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("picture.png");
    let long = "@ ".repeat(77);
    let output = generate(&golden_path("tiny"), &path, &["--json", "--negative-prompt", &long]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("the negative prompt is too long"), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["truncated_negative_prompt"], "@ @");
    assert_eq!(report["truncated_prompt"], Value::Null);
}

#[test]
fn a_picture_that_is_not_the_exact_one_says_so_in_its_parameters() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("picture.png");
    let parameters_with = |options: &[&str]| {
        let output =
            generate(&golden_path("tiny"), &path, &[&["--height", "40", "--width", "24"], options].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        // The text chunk is not compressed.
        String::from_utf8_lossy(&fs::read(&path).unwrap()).into_owned()
    };
    let exact = parameters_with(&[]);
    assert!(exact.contains("RNG: CPU") && !exact.contains("interval"), "the exact one needs no word");
    let cached = parameters_with(&["--cache-interval", "2"]);
    assert!(cached.contains(", Guidance interval: 0-1, Cache interval: 2"));
    let partly_guided = parameters_with(&["--guidance-stop", "0.5"]);
    assert!(partly_guided.contains(", Guidance interval: 0-0.5, Cache interval: 1"));
}
