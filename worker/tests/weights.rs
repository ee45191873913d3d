//! Checkpoints that are whole, old, incomplete, foreign or damaged: each loads or is refused with all its faults, and
//! none makes the process panic.
#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions; this is for their helpers")]

#[path = "support/checkpoint.rs"]
mod checkpoint;
#[path = "support/golden.rs"]
mod golden;

use std::fs;

use checkpoint::{Checkpoint, UNET, VAE};
use golden::{F32, golden as golden_path};
use serde_json::{Value, json};
use tch::{Kind, Tensor};
use worker::diffusion::load_error::Fault;
use worker::diffusion::{
    ComputeDevice, ComputeDtype, GenerationParameters, ImageError, ImageRequest, LoadOptions, SchedulerKind,
    StableDiffusionPipeline, Stage, StepControl,
};

const TEXT_ENCODER: &str = "text_encoder/model.safetensors";
const SAFETY_CHECKER: &str = "safety_checker/model.safetensors";

/// What one quick picture of the checkpoint is.
fn draw(pipeline: &StableDiffusionPipeline) -> Result<Vec<u8>, ImageError> {
    let requests = [ImageRequest {
        prompt: "a red circle".to_owned(),
        negative_prompt: String::new(),
        seed: 5,
        guidance_scale: 7.5,
    }];
    let parameters = GenerationParameters {
        width: 32,
        height: 32,
        num_inference_steps: 2,
        scheduler: SchedulerKind::Ddim,
        noise: None,
        recipe: worker::diffusion::Recipe::default(),
    };
    let mut generation = pipeline.generate(&requests, &parameters, &mut |_| StepControl::Continue).unwrap();
    generation.images.pop().unwrap().map(|image| image.pixels)
}

#[test]
fn faults_of_all_components_are_listed_together() {
    let checkpoint = Checkpoint::new();
    checkpoint.edit_weights(UNET, |tensors| {
        assert!(tensors.remove("conv_in.weight").is_some());
        tensors.insert("conv_in.bias".to_owned(), Tensor::zeros([5], (Kind::Float, tch::Device::Cpu)));
        tensors.insert("lora.up".to_owned(), Tensor::zeros([1], (Kind::Float, tch::Device::Cpu)));
    });
    checkpoint.edit_weights(VAE, |tensors| {
        let bias = tensors["post_quant_conv.bias"].to_kind(Kind::Int64);
        tensors.insert("post_quant_conv.bias".to_owned(), bias);
    });
    fs::remove_file(checkpoint.path(TEXT_ENCODER)).unwrap();
    checkpoint.edit_json("safety_checker/config.json", |json| json["projection_dim"] = json!(-1));

    let error = checkpoint.load().unwrap_err();
    let texts: Vec<String> = error.faults.iter().map(Fault::to_string).collect();
    let expected = [
        "safety_checker/config.json: `projection_dim` must be an integer from 1 to 1048576 but is -1",
        "text_encoder/model.safetensors or text_encoder/model.fp16.safetensors: there is no such file",
        "unet/diffusion_pytorch_model.safetensors: has no `conv_in.weight` of shape [4, 4, 3, 3]",
        "unet/diffusion_pytorch_model.safetensors: `conv_in.bias` must have shape [4] but has [5]",
        "unet/diffusion_pytorch_model.safetensors: has `lora.up`, which the model has no place for",
        "vae/diffusion_pytorch_model.safetensors: `post_quant_conv.bias` must be f64, f32, f16 or bf16 but is I64",
    ];
    for expected in expected {
        assert!(texts.iter().any(|text| text == expected), "{expected} is not in {texts:#?}");
    }
    assert_eq!(texts.len(), expected.len(), "{texts:#?}");
    let printed = error.to_string();
    assert!(printed.contains("cannot be used, 6 faults:\n  "), "{printed}");
    assert!(printed.contains("\n  hint: weights are read from .safetensors files"), "{printed}");
}

#[test]
fn a_folder_that_is_no_checkpoint_is_refused_with_a_hint() {
    let folder = tempfile::tempdir().unwrap();
    let error = StableDiffusionPipeline::from_pretrained(folder.path(), &F32).unwrap_err().to_string();
    assert!(error.contains("1 fault:\n  model_index.json: there is no such file"), "{error}");
    assert!(error.contains("hint: the folder must hold a diffusers checkpoint"), "{error}");
}

#[test]
fn other_model_families_are_refused() {
    let checkpoint = Checkpoint::new();
    checkpoint.edit_json("model_index.json", |json| {
        json["_class_name"] = json!("StableDiffusionXLPipeline");
        json["text_encoder"] = json!(["transformers", "CLIPTextModelWithProjection"]);
        json["unet"] = json!([null, null]);
    });
    let error = checkpoint.load().unwrap_err();
    assert_eq!(error.faults.len(), 3, "{error}");
    assert!(error.to_string().contains("hint: only the Stable Diffusion v1 family is supported"), "{error}");
    // Nine input channels: an inpainting model.
    let checkpoint = Checkpoint::new();
    checkpoint.edit_json("unet/config.json", |json| json["in_channels"] = json!(9));
    let expected = "unet/config.json: `in_channels` must be the VAE's latent_channels, 4, but is 9";
    assert!(checkpoint.texts().iter().any(|text| text == expected));
}

#[test]
fn flax_names_and_absent_components_are_understood() {
    let checkpoint = Checkpoint::new();
    checkpoint.edit_json("model_index.json", |json| {
        json["_class_name"] = json!("FlaxStableDiffusionPipeline");
        json["unet"] = json!(["diffusers", "FlaxUNet2DConditionModel"]);
        json["scheduler"] = json!(["diffusers", "FlaxPNDMScheduler"]);
        json["safety_checker"] = json!([null, null]);
    });
    fs::remove_dir_all(checkpoint.path("safety_checker")).unwrap();
    let pipeline = checkpoint.load().unwrap();
    assert!(!pipeline.has_safety_checker());
    assert!(draw(&pipeline).is_ok());
    // A checker without its eyes.
    checkpoint.edit_json("model_index.json", |json| {
        json["safety_checker"] = json!(["stable_diffusion", "StableDiffusionSafetyChecker"]);
        json["feature_extractor"] = json!([null, null]);
    });
    let expected =
        "model_index.json: `feature_extractor` must be given where `safety_checker` is but is [null,null]";
    assert_eq!(checkpoint.texts(), [expected]);
}

#[test]
fn the_file_that_fits_the_dtype_is_read() {
    let checkpoint = Checkpoint::new();
    let fp16 = checkpoint.path("unet/diffusion_pytorch_model.fp16.safetensors");
    fs::copy(checkpoint.path(UNET), &fp16).unwrap();
    // A fault in one of the two tells which was read.
    checkpoint.edit_weights("unet/diffusion_pytorch_model.fp16.safetensors", |tensors| {
        assert!(tensors.remove("conv_in.bias").is_some());
    });
    let with = |dtype| checkpoint.load_as(&LoadOptions { dtype, ..F32 });
    assert!(with(ComputeDtype::F32).is_ok());
    assert!(with(ComputeDtype::Bf16).is_ok());
    assert!(
        with(ComputeDtype::F16).unwrap_err().to_string().contains("fp16.safetensors: has no `conv_in.bias`")
    );
    fs::remove_file(checkpoint.path(UNET)).unwrap();
    assert!(
        with(ComputeDtype::F32).unwrap_err().to_string().contains("fp16.safetensors: has no `conv_in.bias`")
    );
}

/// Old names and new ones for the same weights make the same picture.
#[test]
fn all_key_spellings_make_the_same_picture() {
    let checkpoint = Checkpoint::new();
    let picture = draw(&checkpoint.load().unwrap()).unwrap();
    let rename = |file: &str, rename: &dyn Fn(&str) -> String| {
        checkpoint.edit_weights(file, |tensors| {
            *tensors =
                std::mem::take(tensors).into_iter().map(|(key, tensor)| (rename(&key), tensor)).collect();
        });
    };
    rename(TEXT_ENCODER, &|key| format!("text_model.{key}"));
    rename(SAFETY_CHECKER, &|key| key.replace("vision_model.", "vision_model.vision_model."));
    rename(VAE, &|key| {
        let attention = "mid_block.attentions.0.";
        let names =
            [("to_q.", "query."), ("to_k.", "key."), ("to_v.", "value."), ("to_out.0.", "proj_attn.")];
        names.iter().fold(key.to_owned(), |key, (new, old)| {
            key.replace(&format!("{attention}{new}"), &format!("{attention}{old}"))
        })
    });
    checkpoint.edit_weights(TEXT_ENCODER, |tensors| {
        let ids = Tensor::arange(77, (Kind::Int64, tch::Device::Cpu)).unsqueeze(0);
        tensors.insert("text_model.embeddings.position_ids".to_owned(), ids);
    });
    checkpoint.edit_weights(VAE, |tensors| {
        assert!(tensors.contains_key("decoder.mid_block.attentions.0.proj_attn.weight"));
    });
    assert_eq!(draw(&checkpoint.load().unwrap()).unwrap(), picture);
}

#[test]
fn absurd_configs_are_refused() {
    let damages: [(&str, &str, Value); 12] = [
        ("unet/config.json", "attention_head_dim", json!(3)),
        ("unet/config.json", "block_out_channels", json!([])),
        ("unet/config.json", "block_out_channels", json!([4, 1e300])),
        ("unet/config.json", "norm_num_groups", json!(3)),
        ("unet/config.json", "cross_attention_dim", json!(9)),
        ("unet/config.json", "down_block_types", json!(["DownBlock2D"])),
        ("unet/config.json", "freq_shift", json!(1e9)),
        ("unet/config.json", "layers_per_block", json!(u64::MAX)),
        ("text_encoder/config.json", "num_attention_heads", json!(5)),
        ("text_encoder/config.json", "max_position_embeddings", json!(76)),
        ("text_encoder/config.json", "vocab_size", json!(10)),
        ("vae/config.json", "norm_num_groups", json!(0)),
    ];
    for (file, field, value) in damages {
        let checkpoint = Checkpoint::new();
        checkpoint.edit_json(file, |json| json[field] = value.clone());
        let named = format!("{file}: `{field}` must be ");
        let texts = checkpoint.texts();
        assert!(texts.iter().any(|text| text.starts_with(&named)), "{field} = {value}: {texts:#?}");
    }
    for file in ["unet/config.json", "scheduler/scheduler_config.json", "model_index.json"] {
        let checkpoint = Checkpoint::new();
        for text in ["", "[]", "{", "\"x\"", "null"] {
            fs::write(checkpoint.path(file), text).unwrap();
            let texts = checkpoint.texts();
            assert!(texts[0].starts_with(&format!("{file}: ")), "{text}: {texts:#?}");
        }
    }
    let checkpoint = Checkpoint::new();
    checkpoint.edit_json("feature_extractor/preprocessor_config.json", |json| {
        json["crop_size"] = json!({"height": 16, "width": 16});
    });
    assert!(checkpoint.texts()[0].contains("`crop_size` must be the safety checker's image_size"));
}

#[test]
fn truncated_and_damaged_files_are_refused_without_a_panic() {
    let checkpoint = Checkpoint::new();
    let whole = fs::read(checkpoint.path(VAE)).unwrap();
    for length in [0, 1, 7, 8, 9, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(checkpoint.path(VAE), &whole[..length]).unwrap();
        let faults = checkpoint.faults();
        assert!(
            faults.iter().any(|fault| matches!(fault, Fault::Safetensors { .. } | Fault::Unreadable { .. }))
        );
    }
    // Every byte of the header's beginning, each made another: whatever that means, it is an answer.
    let header = whole.len().min(600);
    for position in 0..header {
        let mut damaged = whole.clone();
        damaged[position] ^= 0x15;
        fs::write(checkpoint.path(VAE), &damaged).unwrap();
        let _ = checkpoint.load();
    }
    fs::remove_file(checkpoint.path(VAE)).unwrap();
    fs::create_dir(checkpoint.path(VAE)).unwrap();
    assert!(checkpoint.texts()[0].contains("cannot be read"));
}

/// NaN is never a picture, and never "safe".
#[test]
fn nan_is_an_error_of_the_stage_where_it_appears() {
    let cases = [
        (UNET, "conv_out.bias", Stage::Denoise),
        (VAE, "decoder.conv_out.bias", Stage::VaeDecode),
        (SAFETY_CHECKER, "visual_projection.weight", Stage::SafetyChecker),
        (SAFETY_CHECKER, "concept_embeds", Stage::SafetyChecker),
        (SAFETY_CHECKER, "special_care_embeds_weights", Stage::SafetyChecker),
    ];
    for (file, key, stage) in cases {
        let checkpoint = Checkpoint::new();
        checkpoint.edit_weights(file, |tensors| {
            let broken = tensors[key].full_like(f64::NAN);
            tensors.insert(key.to_owned(), broken);
        });
        assert_eq!(draw(&checkpoint.load().unwrap()), Err(ImageError::NonFinite { stage }), "{file} {key}");
    }
}

#[test]
fn a_gpu_without_its_libraries_is_refused_before_anything_is_read() {
    if ComputeDevice::Cuda(0).open().is_ok() {
        return; // There is a GPU here.
    }
    let options = LoadOptions { device: ComputeDevice::Cuda(0), dtype: ComputeDtype::F16, ..F32 };
    let error = StableDiffusionPipeline::from_pretrained(&golden_path("tiny"), &options).unwrap_err();
    assert!(matches!(error.faults[..], [Fault::Device(_)]), "{error}");
    assert!(error.to_string().contains("hint: "), "{error}");
}
