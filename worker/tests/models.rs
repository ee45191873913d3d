//! Each network, and single blocks of it, against diffusers and transformers (`tests/golden/README.md`).
#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions; this is for their helpers")]

#[path = "support/golden.rs"]
mod golden;

use std::fs;

use golden::{
    CHECKPOINTS, assert_close, config, golden as golden_path, max_difference, same_key, tensors, weights,
};
use tch::{Device, Kind, Tensor};
use worker::diffusion::clip_image_processor::{CLIPImageProcessor, RgbPixels};
use worker::diffusion::config::ConfigFile;
use worker::diffusion::kernels::FeatureMap;
use worker::diffusion::models::attention::{BasicTransformerBlock, CrossAttention};
use worker::diffusion::models::autoencoder_kl::{AutoencoderKL, AutoencoderKLConfig};
use worker::diffusion::models::clip_text_model::{CLIPTextConfig, CLIPTextModel};
use worker::diffusion::models::embeddings::{TimestepEmbedding, Timesteps};
use worker::diffusion::models::resnet::{Downsample2D, ResnetBlock2D, ResnetConfig, Upsample2D};
use worker::diffusion::models::transformer_2d::{Transformer2DConfig, Transformer2DModel};
use worker::diffusion::models::unet_2d_blocks::{
    CrossAttnDownBlock2D, CrossAttnUpBlock2D, DownBlock, DownBlock2D, DownBlockConfig, UNetMidBlock2D,
    UNetMidBlock2DCrossAttn, UpBlock, UpBlock2D, UpBlockConfig,
};
use worker::diffusion::models::unet_2d_condition::UNet2DConditionModel;
use worker::diffusion::models::unet_2d_config::UNet2DConditionConfig;
use worker::diffusion::models::vae::UpDecoderBlock2D;
use worker::diffusion::rng::Generator;
use worker::diffusion::safety_checker::{SafetyCheckerConfig, StableDiffusionSafetyChecker};

const DIFFUSERS: &str = "diffusion_pytorch_model";

fn unet_config(checkpoint: &str) -> UNet2DConditionConfig {
    config(checkpoint, "unet/config.json", UNet2DConditionConfig::read)
}

/// diffusers' own tests of single blocks, with the slices that they publish (to 5e-3) and what it computes.
#[test]
fn blocks_give_the_slices_that_diffusers_publishes() {
    let expected = tensors("blocks.safetensors");
    let file = weights(".", ".", "blocks", same_key);
    let resnet = ResnetConfig { temb_channels: Some(128), groups: 32, eps: 1e-6, output_scale_factor: 1.0 };
    let without_temb = ResnetConfig { temb_channels: None, ..resnet };
    let down =
        DownBlockConfig { in_channels: 32, out_channels: 32, num_layers: 1, add_downsample: true, resnet };
    let up = UpBlockConfig {
        in_channels: 32,
        prev_output_channel: 32,
        out_channels: 32,
        num_layers: 1,
        add_upsample: true,
        resnet,
    };
    let transformer = Transformer2DConfig {
        heads: 1,
        cross_attention_dim: 32,
        num_layers: 1,
        norm_num_groups: 32,
        use_linear_projection: false,
    };
    let mut generator = Generator::new(0);
    let hidden_states = generator.randn(&[4, 32, 32, 32], Kind::Float).unwrap();
    let temb = &generator.randn(&[4, 128], Kind::Float).unwrap().silu();
    let residual = Generator::new(1).randn(&[4, 32, 32, 32], Kind::Float).unwrap();
    let skipped = &mut Vec::new();

    let mut compared = 0;
    let mut compare = |name: &str, output: Tensor| {
        let slice = output.select(0, 0).select(0, -1).narrow(0, -3, 3).narrow(1, -3, 3).flatten(0, 1);
        assert_close(name, &slice, &expected[&format!("{name}.slice")]);
        let published = &expected[&format!("{name}.published")];
        assert!(max_difference(&slice, published) < 5e-3, "{name}");
        compared += 1;
    };
    let block = |name: &str| file.root() / name / "weights";

    // Each picture has its own time embedding here, and the model has one for all: a picture at a time.
    let picture = |i: i64, tensor: &Tensor| tensor.narrow(0, i, 1);
    let map = |i: i64| FeatureMap::from(picture(i, &hidden_states));
    let of_each = |forward: &mut dyn FnMut(i64) -> Tensor| Tensor::cat(&[0, 1, 2, 3].map(forward), 0);
    let name = "DownBlock2D";
    let loaded = DownBlock::Plain(DownBlock2D::load(&block(name), &down));
    let mut down_block = |loaded: &DownBlock| {
        of_each(&mut |i| {
            let time = loaded.layers().time_biases(&picture(i, temb)).unwrap().remove(0);
            loaded.forward(&map(i), &time, &[], skipped).unwrap().into_tensor()
        })
    };
    compare(name, down_block(&loaded));
    let name = "CrossAttnDownBlock2D";
    let loaded = DownBlock::CrossAttn(CrossAttnDownBlock2D::load(&block(name), &down, &transformer));
    compare(name, down_block(&loaded));
    let name = "UNetMidBlock2D";
    let loaded = UNetMidBlock2D::load(&block(name), 32, &resnet, Some(32));
    let mid_block = of_each(&mut |i| {
        let time = loaded.layers().time_biases(&picture(i, temb)).unwrap().remove(0);
        loaded.forward(&map(i), &time).unwrap().into_tensor()
    });
    compare(name, mid_block);
    let name = "UNetMidBlock2DCrossAttn";
    let loaded = UNetMidBlock2DCrossAttn::load(&block(name), 32, &resnet, &transformer);
    let mid_block = of_each(&mut |i| {
        let time = loaded.layers().time_biases(&picture(i, temb)).unwrap().remove(0);
        loaded.forward(&map(i), &time, &[]).unwrap().into_tensor()
    });
    compare(name, mid_block);
    let up_block = |loaded: &UpBlock| {
        of_each(&mut |i| {
            let time = loaded.layers().time_biases(&picture(i, temb)).unwrap().remove(0);
            let residuals = vec![picture(i, &residual)];
            loaded.forward(&picture(i, &hidden_states), &time, residuals, &[], None).unwrap()
        })
    };
    let name = "UpBlock2D";
    let loaded = UpBlock::Plain(UpBlock2D::load(&block(name), &up));
    compare(name, up_block(&loaded));
    let name = "CrossAttnUpBlock2D";
    let loaded = UpBlock::CrossAttn(CrossAttnUpBlock2D::load(&block(name), &up, &transformer));
    compare(name, up_block(&loaded));
    let name = "UpDecoderBlock2D";
    let loaded = UpDecoderBlock2D::load(&block(name), 32, 32, 1, true, &without_temb);
    compare(name, loaded.forward(&hidden_states.into()).unwrap().into_tensor());
    assert_eq!(compared, 7);
    // Every tensor of these blocks was found and used; what is left is the encoder's block and the slices.
    for fault in file.into_faults() {
        let fault = fault.to_string();
        assert!(fault.contains("DownEncoderBlock2D.") || !fault.contains(".weights."), "{fault}");
    }
}

#[test]
fn text_encoders_equal_transformers() {
    for checkpoint in CHECKPOINTS {
        let expected = tensors(&format!("{checkpoint}-stages/text_encoder.safetensors"));
        let text_config = config(checkpoint, "text_encoder/config.json", CLIPTextConfig::read);
        let file = weights(checkpoint, "text_encoder", "model", CLIPTextModel::rename_key);
        let text_encoder = CLIPTextModel::load(&file.root(), &text_config);
        assert!(file.into_faults().is_empty());
        let output = text_encoder.forward(&expected["input_ids"]).unwrap();
        assert_close(checkpoint, &output, &expected["last_hidden_state"]);
    }
}

#[test]
fn timestep_embeddings_equal_diffusers() {
    for checkpoint in CHECKPOINTS {
        let expected = tensors(&format!("{checkpoint}-stages/unet.safetensors"));
        let unet_config = unet_config(checkpoint);
        let channels = unet_config.block_out_channels[0];
        let time_proj = Timesteps::new(channels, unet_config.flip_sin_to_cos, 0.0, Device::Cpu).unwrap();
        let file = weights(checkpoint, "unet", DIFFUSERS, same_key);
        let embedding_weights = file.root() / "time_embedding";
        let time_embedding =
            TimestepEmbedding::load(&embedding_weights, channels, unet_config.time_embed_dim);
        let timesteps = Vec::<f64>::try_from(expected["time_proj.timesteps"].to_kind(Kind::Double)).unwrap();
        let sinusoids = time_proj.forward(&timesteps).unwrap();
        assert_close(checkpoint, &sinusoids, &expected["time_proj.out"]);
        assert_close(
            checkpoint,
            &time_embedding.forward(&sinusoids).unwrap(),
            &expected["time_embedding.out"],
        );
    }
}

/// The numbers that the research notes took from diffusers at v1's width.
#[test]
fn the_timestep_embedding_of_v1_has_the_known_values() {
    let sinusoids = Timesteps::new(320, true, 0.0, Device::Cpu).unwrap().forward(&[981.0]).unwrap();
    let values = Vec::<f32>::try_from(sinusoids.flatten(0, 1)).unwrap();
    let known: [(usize, [f32; 4]); 2] =
        [(0, [0.679957, -0.798429, 0.578064, -0.6747]), (160, [0.733252, 0.602089, 0.815991, 0.738092])];
    for (start, known) in known {
        for (value, known) in values[start..].iter().zip(known) {
            assert!((value - known).abs() < 1e-4, "{value} is not {known}");
        }
    }
}

#[test]
fn unets_equal_diffusers_at_every_timestep_and_size() {
    for checkpoint in CHECKPOINTS {
        let expected = tensors(&format!("{checkpoint}-stages/unet.safetensors"));
        let file = weights(checkpoint, "unet", DIFFUSERS, same_key);
        let unet = UNet2DConditionModel::load(&file.root(), &unet_config(checkpoint)).unwrap();
        assert!(file.into_faults().is_empty());
        let states = &expected["encoder_hidden_states"];
        let timesteps = Vec::<f64>::try_from(expected["output_timesteps"].to_kind(Kind::Double)).unwrap();
        assert!(timesteps.iter().any(|timestep| timestep.fract() != 0.0));
        let text = unet.project_text(states).unwrap();
        let times = unet.embed_timesteps(&timesteps, Kind::Float).unwrap();
        for (i, (timestep, time)) in timesteps.into_iter().zip(&times).enumerate() {
            let output = unet.forward(&expected["sample"], time, &text).unwrap();
            assert_close(&format!("{checkpoint} at {timestep}"), &output, &expected[&format!("output.{i}")]);
        }
        // At 9×13 and 7×10 the up blocks must grow to the size of their skip connections.
        let text = unet.project_text(&states.narrow(0, 0, 1)).unwrap();
        let time = &unet.embed_timesteps(&[321.0], Kind::Float).unwrap()[0];
        for size in ["9x13", "7x10", "32x32"] {
            let sample = &expected[&format!("sample_{size}")];
            let output = unet.forward(sample, time, &text).unwrap();
            assert_close(&format!("{checkpoint} {size}"), &output, &expected[&format!("output_{size}")]);
        }
    }
}

/// Two texts for one sample: what comes before the first look at a text is computed once, and nothing changes by it.
#[test]
fn two_texts_for_one_sample_are_as_two_samples() {
    for checkpoint in CHECKPOINTS {
        let expected = tensors(&format!("{checkpoint}-stages/unet.safetensors"));
        let file = weights(checkpoint, "unet", DIFFUSERS, same_key);
        let unet = UNet2DConditionModel::load(&file.root(), &unet_config(checkpoint)).unwrap();
        assert!(file.into_faults().is_empty());
        let states = expected["encoder_hidden_states"].narrow(0, 0, 2);
        let text = unet.project_text(&states).unwrap();
        let time = &unet.embed_timesteps(&[321.0], Kind::Float).unwrap()[0];
        for size in ["9x13", "32x32"] {
            let sample = &expected[&format!("sample_{size}")].narrow(0, 0, 1);
            let twice = Tensor::cat(&[sample, sample], 0);
            let (once, deep_once) = unet.forward_and_keep(sample, time, &text).unwrap();
            let (apart, deep_apart) = unet.forward_and_keep(&twice, time, &text).unwrap();
            assert!(
                max_difference(&apart.get(0), &apart.get(1)) > 1e-3,
                "the texts should make a difference"
            );
            assert_close(&format!("{checkpoint} {size}"), &once, &apart);
            assert_close(&format!("{checkpoint} {size}, inner layers"), &deep_once, &deep_apart);
            let cached = |sample: &Tensor| unet.forward_cached(sample, &deep_apart, time, &text).unwrap();
            assert_close(&format!("{checkpoint} {size}, cached"), &cached(sample), &cached(&twice));
        }
    }
}

#[test]
fn parts_of_the_unet_equal_diffusers() {
    let expected = tensors("small-stages/unet.safetensors");
    let unet_config = unet_config("small");
    let file = weights("small", "unet", DIFFUSERS, same_key);
    let channels = &unet_config.block_out_channels;
    let resnet = ResnetConfig {
        temb_channels: Some(unet_config.time_embed_dim),
        groups: unet_config.norm_num_groups,
        eps: unet_config.norm_eps,
        output_scale_factor: 1.0,
    };
    let transformer = Transformer2DConfig {
        heads: unet_config.num_attention_heads[1],
        cross_attention_dim: unet_config.cross_attention_dim[1],
        num_layers: 1,
        norm_num_groups: unet_config.norm_num_groups,
        use_linear_projection: false,
    };
    let (heads, text_channels) = (transformer.heads, transformer.cross_attention_dim);
    let input = |module: &str, parameter: &str| &expected[&format!("blocks.{module}.in.{parameter}")];
    let compare = |module: &str, output: Tensor| {
        let recorded = expected.get(&format!("blocks.{module}.out"));
        // A transformer's output is a tuple of one in diffusers.
        assert_close(
            module,
            &output,
            recorded.unwrap_or_else(|| &expected[&format!("blocks.{module}.out.0")]),
        );
    };
    // A module's path in the file is its name.
    let at = |module: &str| module.split('.').fold(file.root(), |weights, name| weights / name);
    let resnets = [
        ("down_blocks.0.resnets.0", channels[0], channels[0]),
        ("down_blocks.1.resnets.0", channels[0], channels[1]),
        ("up_blocks.3.resnets.2", 2 * channels[0], channels[0]),
    ];
    for (module, in_channels, out_channels) in resnets {
        let block = ResnetBlock2D::load(&at(module), in_channels, out_channels, &resnet);
        // One step for all pictures: the rows of its embedding are alike.
        let temb = input(module, "temb").silu().narrow(0, 0, 1);
        let time_bias = &block.time_biases(&temb).unwrap()[0];
        let input = FeatureMap::from(input(module, "input_tensor").shallow_clone());
        compare(module, block.forward(&input, Some(time_bias)).unwrap().into_tensor());
    }
    let module = "down_blocks.0.downsamplers.0";
    let block = Downsample2D::load(&at(module), channels[0], resnet.groups);
    compare(module, block.forward(input(module, "hidden_states")).unwrap().into_tensor());
    let module = "up_blocks.0.upsamplers.0";
    let block = Upsample2D::load(&at(module), channels[3], resnet.groups);
    compare(module, block.forward(input(module, "hidden_states"), None).unwrap().into_tensor());

    let module = "down_blocks.1.attentions.0";
    let block = Transformer2DModel::load(&at(module), channels[1], &transformer);
    let text = block.project_text(input(module, "encoder_hidden_states")).unwrap();
    let input_map = FeatureMap::from(input(module, "hidden_states").copy());
    compare(module, block.forward(input_map, &text).unwrap().into_tensor());
    let module = "down_blocks.1.attentions.0.transformer_blocks.0";
    let block = BasicTransformerBlock::load(&at(module), channels[1], text_channels, heads);
    let text = block.project_text(input(module, "encoder_hidden_states")).unwrap();
    compare(module, block.forward(input(module, "hidden_states"), Some(&text)).unwrap());
    let module = "down_blocks.1.attentions.0.transformer_blocks.0.attn2";
    let block = CrossAttention::load(&at(module), channels[1], text_channels, heads);
    let text = block.project(input(module, "encoder_hidden_states")).unwrap();
    compare(module, block.forward(input(module, "hidden_states"), &text).unwrap());
}

#[test]
fn vae_decoders_equal_diffusers() {
    for checkpoint in CHECKPOINTS {
        let expected = tensors(&format!("{checkpoint}-stages/vae.safetensors"));
        let vae_config = config(checkpoint, "vae/config.json", AutoencoderKLConfig::read);
        let file = weights(checkpoint, "vae", DIFFUSERS, AutoencoderKL::rename_key);
        let vae = AutoencoderKL::load(&file.root(), &vae_config);
        assert!(file.into_faults().is_empty());
        for size in ["", "_5x7"] {
            // The golden latents are divided by the scaling factor already, and decode() does it itself.
            let latents = &expected[&format!("latents{size}")] * vae_config.scaling_factor;
            let image = vae.decode(&latents).unwrap();
            assert_close(&format!("{checkpoint}{size}"), &image, &expected[&format!("image{size}")]);
        }
    }
}

/// The pixels of a golden picture of shape `(height, width, 3)`.
fn bytes(image: &Tensor) -> (Vec<u8>, usize, usize) {
    let (height, width, _) = image.size3().unwrap();
    (Vec::try_from(image.flatten(0, 2)).unwrap(), width as usize, height as usize)
}

#[test]
fn the_image_processor_equals_pillow_bit_for_bit() {
    let file = "feature_extractor/preprocessor_config.json";
    let mut compared = 0;
    for checkpoint in CHECKPOINTS {
        let expected = tensors(&format!("{checkpoint}-stages/safety_checker.safetensors"));
        let processor = config(checkpoint, file, CLIPImageProcessor::read);
        let mut json: serde_json::Map<String, serde_json::Value> =
            serde_json::from_str(&fs::read_to_string(golden_path(checkpoint).join(file)).unwrap()).unwrap();
        json.insert("do_rescale".to_owned(), false.into());
        json.insert("do_normalize".to_owned(), false.into());
        let cropper = CLIPImageProcessor::read(ConfigFile::from_fields(file, json)).unwrap();
        for i in 0..6 {
            let (bytes, width, height) = bytes(&expected[&format!("images.{i}")]);
            let pixels = RgbPixels { bytes: &bytes, width, height };
            if let Some(crop) = expected.get(&format!("crops.{i}")) {
                let cropped = cropper.preprocess(pixels).unwrap().squeeze_dim(0).permute([1, 2, 0]);
                let difference = max_difference(&cropped, crop);
                assert_eq!(difference, 0.0, "{checkpoint} {width}x{height}");
                compared += 1;
            }
            if let Some(pixel_values) = expected.get(&format!("pixel_values.{i}")) {
                let processed = processor.preprocess(pixels).unwrap().squeeze_dim(0);
                assert_close(&format!("{checkpoint} {width}x{height}"), &processed, pixel_values);
                compared += 1;
            }
        }
    }
    assert_eq!(compared, 6 + 6 + 3);
}

#[test]
fn safety_checkers_give_diffusers_scores_and_verdicts() {
    for checkpoint in CHECKPOINTS {
        let expected = tensors(&format!("{checkpoint}-stages/safety_checker.safetensors"));
        let file = "feature_extractor/preprocessor_config.json";
        let processor = config(checkpoint, file, CLIPImageProcessor::read);
        let checker_config = config(checkpoint, "safety_checker/config.json", SafetyCheckerConfig::read);
        let file = weights(checkpoint, "safety_checker", "model", StableDiffusionSafetyChecker::rename_key);
        let checker = StableDiffusionSafetyChecker::load(&file.root(), &checker_config);
        let rows = |name: &str, row: i64| Vec::<f32>::try_from(expected[name].get(row)).unwrap();
        let thresholds =
            |name: &str, count: i64| Vec::<f32>::try_from(file.root().tensor(name, &[count])).unwrap();
        let concept_thresholds = thresholds("concept_embeds_weights", 17);
        let special_care_thresholds = thresholds("special_care_embeds_weights", 3);
        assert!(file.into_faults().is_empty());
        for i in 0..6 {
            let (bytes, width, height) = bytes(&expected[&format!("images.{i}")]);
            let pixel_values = processor.preprocess(RgbPixels { bytes: &bytes, width, height }).unwrap();
            let verdict = checker.forward(&pixel_values).unwrap().pop().unwrap().unwrap();
            let flagged = expected["has_nsfw_concept"].get(i).int64_value(&[]) != 0;
            assert_eq!(verdict.has_nsfw_concept, flagged, "{checkpoint} {i}");
            assert_eq!(verdict.concept_scores, rows("concept_scores", i), "{checkpoint} {i}");
            assert_eq!(verdict.special_care_scores, rows("special_care_scores", i), "{checkpoint} {i}");
            let raw = [
                (&verdict.raw_concept_scores, rows("concept_cosines", i), &concept_thresholds),
                (&verdict.raw_special_care_scores, rows("special_cosines", i), &special_care_thresholds),
            ];
            for (raw, cosines, thresholds) in raw {
                for ((raw, cosine), threshold) in raw.iter().zip(cosines).zip(thresholds) {
                    assert!((raw - (cosine - threshold)).abs() < 1e-5, "{checkpoint} {i}");
                }
            }
        }
    }
}
