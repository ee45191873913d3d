//! The settings of the models that are measured: v1's structure in three sizes, with a tokenizer of single letters.

use std::path::Path;
use std::{fmt, fs, io};

use serde_json::{Value, json};

/// How large the model is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum ModelSize {
    /// For tests: 128×128 pixels, a second for a picture.
    Tiny,
    /// A quarter of v1's width, 256×256 pixels.
    Small,
    /// Stable Diffusion v1.5, 512×512 pixels.
    Full,
}

impl fmt::Display for ModelSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tiny => "tiny",
            Self::Small => "small",
            Self::Full => "full",
        })
    }
}

/// A CLIP transformer's sizes.
struct ClipSizes {
    hidden_size: u32,
    layers: u32,
    heads: u32,
}

/// What differs between the sizes.
struct Sizes {
    unet_channels: [u32; 4],
    vae_channels: [u32; 4],
    groups: u32,
    sample_size: u32,
    text: ClipSizes,
    vision: ClipSizes,
    patch_size: u32,
    projection_dim: u32,
}

impl ModelSize {
    /// `Full` has the numbers of stable-diffusion-v1-5's config files.
    fn sizes(self) -> Sizes {
        match self {
            Self::Tiny => Sizes {
                unet_channels: [32, 64, 64, 64],
                vae_channels: [16, 32, 32, 32],
                groups: 8,
                sample_size: 16,
                text: ClipSizes { hidden_size: 64, layers: 2, heads: 4 },
                vision: ClipSizes { hidden_size: 64, layers: 2, heads: 4 },
                patch_size: 32,
                projection_dim: 32,
            },
            Self::Small => Sizes {
                unet_channels: [80, 160, 320, 320],
                vae_channels: [32, 64, 128, 128],
                groups: 16,
                sample_size: 32,
                text: ClipSizes { hidden_size: 192, layers: 6, heads: 6 },
                vision: ClipSizes { hidden_size: 256, layers: 6, heads: 8 },
                patch_size: 14,
                projection_dim: 192,
            },
            Self::Full => Sizes {
                unet_channels: [320, 640, 1280, 1280],
                vae_channels: [128, 256, 512, 512],
                groups: 32,
                sample_size: 64,
                text: ClipSizes { hidden_size: 768, layers: 12, heads: 12 },
                vision: ClipSizes { hidden_size: 1024, layers: 24, heads: 16 },
                patch_size: 14,
                projection_dim: 768,
            },
        }
    }
}

/// Writes everything but the weights into `folder`, in diffusers' layout.
pub fn write(size: ModelSize, folder: &Path) -> io::Result<()> {
    let sizes = size.sizes();
    let files = [
        ("model_index.json", model_index()),
        ("unet/config.json", unet(&sizes)),
        ("vae/config.json", vae(&sizes)),
        ("text_encoder/config.json", text_encoder(&sizes.text)),
        ("safety_checker/config.json", safety_checker(&sizes)),
        ("feature_extractor/preprocessor_config.json", feature_extractor()),
        ("scheduler/scheduler_config.json", scheduler()),
        ("tokenizer/tokenizer_config.json", tokenizer()),
        ("tokenizer/vocab.json", vocabulary()),
    ];
    for (file, value) in files {
        write_file(&folder.join(file), &serde_json::to_string_pretty(&value)?)?;
    }
    write_file(&folder.join("tokenizer/merges.txt"), "#version: 0.2\n")
}

fn write_file(path: &Path, text: &str) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::write(path, text)
}

fn model_index() -> Value {
    json!({
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "requires_safety_checker": true,
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    })
}

fn unet(sizes: &Sizes) -> Value {
    json!({
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.42.1",
        "act_fn": "silu",
        "attention_head_dim": 8,
        "block_out_channels": sizes.unet_channels,
        "center_input_sample": false,
        "cross_attention_dim": sizes.text.hidden_size,
        "down_block_types":
            ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": true,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": sizes.groups,
        "out_channels": 4,
        "sample_size": sizes.sample_size,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    })
}

fn vae(sizes: &Sizes) -> Value {
    json!({
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.42.1",
        "act_fn": "silu",
        "block_out_channels": sizes.vae_channels,
        "down_block_types": vec!["DownEncoderBlock2D"; 4],
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": sizes.groups,
        "out_channels": 3,
        "sample_size": sizes.sample_size * 8,
        "scaling_factor": 0.18215,
        "up_block_types": vec!["UpDecoderBlock2D"; 4],
    })
}

fn text_encoder(sizes: &ClipSizes) -> Value {
    json!({
        "architectures": ["CLIPTextModel"],
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        "hidden_size": sizes.hidden_size,
        "intermediate_size": 4 * sizes.hidden_size,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "pad_token_id": 1,
        "projection_dim": sizes.hidden_size,
        "vocab_size": 49408,
    })
}

fn safety_checker(sizes: &Sizes) -> Value {
    let ClipSizes { hidden_size, layers, heads } = sizes.vision;
    json!({
        "architectures": ["StableDiffusionSafetyChecker"],
        "model_type": "clip",
        "projection_dim": sizes.projection_dim,
        "vision_config": {
            "hidden_act": "quick_gelu",
            "hidden_size": hidden_size,
            "image_size": 224,
            "intermediate_size": 4 * hidden_size,
            "layer_norm_eps": 1e-05,
            "model_type": "clip_vision_model",
            "num_attention_heads": heads,
            "num_channels": 3,
            "num_hidden_layers": layers,
            "patch_size": sizes.patch_size,
            "projection_dim": sizes.projection_dim,
        },
    })
}

fn feature_extractor() -> Value {
    json!({
        "crop_size": {"height": 224, "width": 224},
        "do_center_crop": true,
        "do_convert_rgb": true,
        "do_normalize": true,
        "do_rescale": true,
        "do_resize": true,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 1.0 / 255.0,
        "size": {"shortest_edge": 224},
    })
}

fn scheduler() -> Value {
    json!({
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.42.1",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": false,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": false,
        "skip_prk_steps": true,
        "steps_offset": 1,
        "trained_betas": null,
    })
}

fn tokenizer() -> Value {
    json!({
        "bos_token": "<|startoftext|>",
        "do_lower_case": true,
        "eos_token": "<|endoftext|>",
        "errors": "replace",
        "model_max_length": 77,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": "<|endoftext|>",
    })
}

/// CLIP's vocabulary without its merges: the 256 bytes as GPT-2 prints them, the same at the end of a word, start and end.
fn vocabulary() -> Value {
    let is_kept = |byte: &u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let kept = (0..256).filter(is_kept);
    let others = (0..256).filter(|byte| !is_kept(byte)).zip(256..).map(|(_, stand_in)| stand_in);
    let letters: String = kept.chain(others).filter_map(char::from_u32).collect();
    let mut entries: Vec<String> = letters.chars().map(String::from).collect();
    entries.extend(letters.chars().map(|letter| format!("{letter}</w>")));
    entries.extend(["<|startoftext|>", "<|endoftext|>"].map(str::to_owned));
    let numbered = entries.into_iter().zip(0_u32..).map(|(entry, id)| (entry, Value::from(id)));
    Value::Object(numbered.collect())
}
