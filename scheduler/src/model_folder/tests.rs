//! Model folders that are complete, old, and broken in one way each.
use serde_json::json;

use super::*;

/// The smallest folder that is a model.
fn model() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let write = |path: &str, value: Value| {
        let path = folder.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, value.to_string()).unwrap();
    };
    write(
        "model_index.json",
        json!({
            "_class_name": "StableDiffusionPipeline",
            "unet": ["diffusers", "UNet2DConditionModel"],
            "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        }),
    );
    write("unet/config.json", json!({"_diffusers_version": "0.35.1", "sample_size": 16}));
    write("vae/config.json", json!({"block_out_channels": [16, 32, 32, 32]}));
    write("scheduler/scheduler_config.json", json!({"_class_name": "PNDMScheduler"}));
    for component in ["text_encoder", "tokenizer", "safety_checker", "feature_extractor"] {
        write(&format!("{component}/config.json"), json!({}));
    }
    for component in WEIGHTED {
        write(&format!("{component}/model.safetensors"), json!("weights"));
    }
    fs::write(folder.path().join("tokenizer/merges.txt"), "m").unwrap();
    fs::write(folder.path().join("unet/model.bin"), "a pickle").unwrap();
    folder
}

fn replace(folder: &Path, path: &str, value: &Value) {
    fs::write(folder.join(path), value.to_string()).unwrap();
}

fn error(folder: &Path) -> String {
    let error = format!("{:#}", ModelFolder::read(folder).unwrap_err());
    error.replace(&folder.canonicalize().unwrap().display().to_string(), "DIR")
}

#[test]
fn a_complete_folder_tells_size_noise_scheduler_and_files() {
    let folder = model();
    let model = ModelFolder::read(folder.path()).unwrap();
    assert_eq!((model.default_width, model.default_height), (128, 128));
    assert_eq!(model.default_noise_scheduler, NoiseScheduler::Pndm);
    assert!(model.has_safety_checker);
    let names: Vec<_> = model.files.iter().map(|(path, _)| path.as_str()).collect();
    insta::assert_snapshot!(names.join("\n"), @"
    feature_extractor/config.json
    model_index.json
    safety_checker/config.json
    safety_checker/model.safetensors
    scheduler/scheduler_config.json
    text_encoder/config.json
    text_encoder/model.safetensors
    tokenizer/config.json
    tokenizer/merges.txt
    unet/config.json
    unet/model.safetensors
    vae/config.json
    vae/model.safetensors
    ");

    let mut bytes = 0;
    let components = model.hash(|read| bytes += read).unwrap();
    assert_eq!(bytes, model.size_bytes());
    let merges = components.iter().find(|component| component.path == "tokenizer/merges.txt").unwrap();
    assert_eq!(merges.sha256, Sha256Digest::of(b"m"));
}

#[test]
fn a_model_without_a_safety_checker_is_a_model() {
    let folder = model();
    let index = json!({"_class_name": "FlaxStableDiffusionPipeline", "safety_checker": [null, null]});
    replace(folder.path(), "model_index.json", &index);
    let model = ModelFolder::read(folder.path()).unwrap();
    assert!(!model.has_safety_checker);
    assert!(model.files.iter().all(|(path, _)| !path.starts_with("safety_checker/")));
}

#[test]
fn sample_sizes_mean_what_diffusers_takes_them_for() {
    let folder = model();
    for (unet, expected) in [
        (json!({"_diffusers_version": "0.6.0", "sample_size": 32}), (512, 512)),
        (json!({"_diffusers_version": "0.8.1", "sample_size": 64}), (512, 512)),
        (json!({"_diffusers_version": "0.9.0", "sample_size": 32}), (256, 256)),
        (json!({"_diffusers_version": "0.10.0.dev0", "sample_size": 96}), (768, 768)),
        (json!({"sample_size": 32}), (256, 256)),
        (json!({"sample_size": [64, 96]}), (768, 512)),
    ] {
        replace(folder.path(), "unet/config.json", &unet);
        let model = ModelFolder::read(folder.path()).unwrap();
        assert_eq!((model.default_width, model.default_height), expected, "{unet}");
    }
}

#[test]
fn noise_schedulers_go_by_our_names() {
    let folder = model();
    for (config, expected) in [
        (json!({"_class_name": "FlaxPNDMScheduler"}), NoiseScheduler::Pndm),
        (json!({"_class_name": "DPMSolverMultistepScheduler"}), NoiseScheduler::Dpmpp2m),
        (
            json!({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": true}),
            NoiseScheduler::Dpmpp2mKarras,
        ),
        (json!({"_class_name": "EulerAncestralDiscreteScheduler"}), NoiseScheduler::EulerA),
    ] {
        replace(folder.path(), "scheduler/scheduler_config.json", &config);
        let model = ModelFolder::read(folder.path()).unwrap();
        assert_eq!(model.default_noise_scheduler, expected, "{config}");
    }
}

#[test]
fn each_fault_is_told_so_that_it_can_be_mended() {
    type Fault = fn(&Path);
    let faults: [Fault; 8] = [
        |folder| fs::remove_file(folder.join("model_index.json")).unwrap(),
        |folder| replace(folder, "model_index.json", &json!({"_class_name": "StableDiffusionXLPipeline"})),
        |folder| fs::remove_dir_all(folder.join("vae")).unwrap(),
        |folder| fs::remove_file(folder.join("unet/model.safetensors")).unwrap(),
        |folder| replace(folder, "unet/config.json", &json!({"sample_size": "big"})),
        |folder| replace(folder, "unet/config.json", &json!({"sample_size": 1000})),
        |folder| replace(folder, "vae/config.json", &json!({"block_out_channels": []})),
        |folder| replace(folder, "scheduler/scheduler_config.json", &json!({"_class_name": "HeunScheduler"})),
    ];
    let told: Vec<_> = faults
        .iter()
        .map(|fault| {
            let folder = model();
            fault(folder.path());
            error(folder.path())
        })
        .collect();
    insta::assert_snapshot!(told.join("\n\n"), @r#"
    this is not a model in the diffusers layout, which has a model_index.json beside the folders unet, vae, text_encoder, tokenizer and scheduler: cannot read DIR/model_index.json: No such file or directory (os error 2)

    the model's pipeline has to be StableDiffusionPipeline (Stable Diffusion v1), but model_index.json says "StableDiffusionXLPipeline"

    the model has no vae: DIR/vae is not there

    DIR/unet has no .safetensors file
    hint: pickled weights (.bin, .ckpt) are not read; convert them with diffusers' `save_pretrained(..., safe_serialization=True)`

    sample_size in DIR/unet/config.json has to be one or two whole numbers, but is "big"

    the model's own size has to be a multiple of 8, from 64 to 2048, but is 8000 (sample_size 1000 × 8)

    DIR/vae/config.json has no list of 1 to 8 block_out_channels

    the model's noise scheduler has to be one of PNDMScheduler, DDIMScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler, LMSDiscreteScheduler, but DIR/scheduler/scheduler_config.json says "HeunScheduler"
    "#);
}

#[test]
fn a_licence_is_named_by_its_first_line() {
    let folder = model();
    let error = licence(None, folder.path()).unwrap_err().to_string();
    assert!(error.contains("holds no licence text\nhint: name one by --licence FILE"), "{error}");
    let text = "\n# CreativeML Open RAIL-M\n\ndated August 22, 2022\n";
    fs::write(folder.path().join("LICENSE"), text).unwrap();
    assert_eq!(licence(None, folder.path()).unwrap(), ("CreativeML Open RAIL-M".to_owned(), text.to_owned()));
    fs::write(folder.path().join("other"), b"\xFF").unwrap();
    let error = licence(Some(&folder.path().join("other")), folder.path()).unwrap_err().to_string();
    assert!(error.ends_with("other has to be UTF-8 text"), "{error}");
}
