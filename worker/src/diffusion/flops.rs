//! How many floating-point operations the networks take, from their configs: what a speed is judged by.
//!
//! Counted are products of matrices and convolutions, a multiplication with its addition as two operations, as PyTorch's
//! own counter does. Norms, activations and sums are left out; they cost bytes, not operations. What an implementation
//! pads or computes twice does not count either.

use super::models::autoencoder_kl::AutoencoderKLConfig;
use super::models::clip_encoder::CLIPEncoderConfig;
use super::models::clip_text_model::CLIPTextConfig;
use super::models::unet_2d_config::{BlockType, UNet2DConditionConfig};
use super::safety_checker::SafetyCheckerConfig;

/// Kernel area of the convolutions that are not 1×1.
const KERNEL_3X3: i64 = 9;

/// A linear layer on `rows` vectors, or a 1×1 convolution on as many pixels.
fn linear(rows: i64, in_features: i64, out_features: i64) -> i64 {
    2 * rows * in_features * out_features
}

/// A 3×3 convolution with `pixels` in its output.
fn conv(pixels: i64, in_channels: i64, out_channels: i64) -> i64 {
    linear(pixels, KERNEL_3X3 * in_channels, out_channels)
}

/// Queries times keys, and their weights times values; `channels` over all heads.
fn attention(queries: i64, keys: i64, channels: i64) -> i64 {
    2 * linear(queries, keys, channels)
}

/// A `ResnetBlock2D`; `temb_channels` is 0 where it has no time embedding.
fn resnet(pixels: i64, in_channels: i64, out_channels: i64, temb_channels: i64) -> i64 {
    let shortcut = if in_channels == out_channels { 0 } else { linear(pixels, in_channels, out_channels) };
    conv(pixels, in_channels, out_channels)
        + conv(pixels, out_channels, out_channels)
        + linear(1, temb_channels, out_channels)
        + shortcut
}

impl UNet2DConditionConfig {
    /// One forward pass of one sample whose latents have `height` by `width` cells, with a text of `text_length` tokens.
    pub fn forward_flops(&self, height: i64, width: i64, text_length: i64) -> i64 {
        let levels = self.block_out_channels.len();
        let channels = &self.block_out_channels;
        let mut sizes = vec![(height, width)];
        for level in 1..levels {
            let (height, width) = sizes[level - 1];
            sizes.push(((height + 1) / 2, (width + 1) / 2));
        }
        let pixels: Vec<i64> = sizes.iter().map(|(height, width)| height * width).collect();
        let temb = self.time_embed_dim;
        let transformer = |level: usize| self.transformer_flops(level, pixels[level], text_length);

        let mut flops = linear(1, channels[0], temb) + linear(1, temb, temb);
        flops += conv(pixels[0], self.in_channels, channels[0]);
        for level in 0..levels {
            for layer in 0..self.layers_per_block[level] {
                let in_channels =
                    if layer == 0 { channels[level.saturating_sub(1)] } else { channels[level] };
                flops += resnet(pixels[level], in_channels, channels[level], temb);
                if self.down_block_types[level] == BlockType::CrossAttn {
                    flops += transformer(level);
                }
            }
            if level + 1 < levels {
                flops += conv(pixels[level + 1], channels[level], channels[level]);
            }
        }
        let last = levels - 1;
        flops += 2 * resnet(pixels[last], channels[last], channels[last], temb) + transformer(last);
        for (block, level) in (0..levels).rev().enumerate() {
            let previous = channels[(level + 1).min(last)];
            let num_layers = self.layers_per_block[level] + 1;
            for layer in 0..num_layers {
                let skip =
                    if layer == num_layers - 1 { channels[level.saturating_sub(1)] } else { channels[level] };
                let hidden = if layer == 0 { previous } else { channels[level] };
                flops += resnet(pixels[level], hidden + skip, channels[level], temb);
                if self.up_block_types[block] == BlockType::CrossAttn {
                    flops += transformer(level);
                }
            }
            if level > 0 {
                flops += conv(pixels[level - 1], channels[level], channels[level]);
            }
        }
        flops + conv(pixels[0], channels[0], self.out_channels)
    }

    /// As [`Self::forward_flops`], of the input and output convolutions and the last layer alone, which is what
    /// `UNet2DConditionModel::forward_cached` runs.
    pub fn outermost_flops(&self, height: i64, width: i64, text_length: i64) -> i64 {
        let (channels, pixels) = (self.block_out_channels[0], height * width);
        let transformer = match self.up_block_types.last() {
            Some(BlockType::CrossAttn) => self.transformer_flops(0, pixels, text_length),
            _ => 0,
        };
        conv(pixels, self.in_channels, channels)
            + resnet(pixels, 2 * channels, channels, self.time_embed_dim)
            + transformer
            + conv(pixels, channels, self.out_channels)
    }

    /// A `Transformer2DModel` at one resolution.
    fn transformer_flops(&self, level: usize, pixels: i64, text_length: i64) -> i64 {
        let (channels, text_channels) = (self.block_out_channels[level], self.cross_attention_dim[level]);
        let projection = linear(pixels, channels, channels);
        let self_attention = 4 * projection + attention(pixels, pixels, channels);
        let cross_attention = 2 * projection
            + 2 * linear(text_length, text_channels, channels)
            + attention(pixels, text_length, channels);
        // The first layer makes eight times the channels, of which one half gates the other.
        let feed_forward = linear(pixels, channels, 8 * channels) + linear(pixels, 4 * channels, channels);
        let block = self_attention + cross_attention + feed_forward;
        2 * projection + self.transformer_layers_per_block[level] * block
    }
}

impl AutoencoderKLConfig {
    /// Decoding one sample of latents with `height` by `width` cells.
    pub fn decode_flops(&self, height: i64, width: i64) -> i64 {
        let reversed: Vec<i64> = self.block_out_channels.iter().rev().copied().collect();
        let (first, mut pixels) = (reversed[0], height * width);
        let mut flops = conv(pixels, self.latent_channels, first) + 2 * resnet(pixels, first, first, 0);
        if self.use_post_quant_conv {
            flops += linear(pixels, self.latent_channels, self.latent_channels);
        }
        if self.mid_block_add_attention {
            flops += 4 * linear(pixels, first, first) + attention(pixels, pixels, first);
        }
        for (block, &channels) in reversed.iter().enumerate() {
            for layer in 0..=self.layers_per_block {
                let in_channels = if layer == 0 { reversed[block.saturating_sub(1)] } else { channels };
                flops += resnet(pixels, in_channels, channels, 0);
            }
            if block + 1 < reversed.len() {
                pixels *= 4;
                flops += conv(pixels, channels, channels);
            }
        }
        flops + conv(pixels, reversed[reversed.len() - 1], self.out_channels)
    }
}

impl CLIPEncoderConfig {
    /// The layers on one sequence.
    fn forward_flops(&self, length: i64) -> i64 {
        let attention = 4 * linear(length, self.hidden_size, self.hidden_size)
            + attention(length, length, self.hidden_size);
        let mlp = 2 * linear(length, self.hidden_size, self.intermediate_size);
        self.num_hidden_layers * (attention + mlp)
    }
}

impl CLIPTextConfig {
    /// Embedding one prompt, which is always padded to the full length.
    pub fn forward_flops(&self) -> i64 {
        self.encoder.forward_flops(self.max_position_embeddings)
    }
}

impl SafetyCheckerConfig {
    /// Checking one picture.
    pub fn forward_flops(&self) -> i64 {
        let vision = &self.vision;
        let patches = (vision.image_size / vision.patch_size).pow(2);
        let patch_size = vision.num_channels * vision.patch_size.pow(2);
        let hidden_size = vision.encoder.hidden_size;
        linear(patches, patch_size, hidden_size)
            + vision.encoder.forward_flops(patches + 1)
            + linear(1, hidden_size, self.projection_dim)
    }
}

#[cfg(test)]
mod tests {
    use super::super::config::ConfigFile;
    use super::*;

    fn file(json: &str) -> ConfigFile {
        ConfigFile::from_fields("config.json", serde_json::from_str(json).unwrap())
    }

    /// In units of 10⁹.
    fn giga(flops: i64) -> f64 {
        flops as f64 / 1e9
    }

    fn v1_unet() -> UNet2DConditionConfig {
        UNet2DConditionConfig::read(file(r#"{"cross_attention_dim": 768, "sample_size": 64}"#)).unwrap()
    }

    /// What PyTorch's flop counter finds in diffusers' and transformers' classes with v1's configs.
    #[test]
    fn v1_takes_what_pytorch_counts() {
        assert_eq!(format!("{:.6}", giga(v1_unet().forward_flops(64, 64, 77))), "803.273441");
        let vae = r#"{"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
                      "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"]}"#;
        let vae = AutoencoderKLConfig::read(file(vae)).unwrap();
        assert_eq!(format!("{:.1}", giga(vae.decode_flops(64, 64))), "2514.5");
        let text = r#"{"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}"#;
        let text = CLIPTextConfig::read(file(text)).unwrap();
        assert_eq!(format!("{:.2}", giga(text.forward_flops())), "13.30");
        let safety = r#"{"projection_dim": 768, "vision_config": {"hidden_size": 1024, "intermediate_size": 4096,
                         "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14}}"#;
        let safety = SafetyCheckerConfig::read(file(safety)).unwrap();
        assert_eq!(format!("{:.1}", giga(safety.forward_flops())), "162.0");
    }

    /// Sizes that cannot be halved evenly are rounded up on the way down, and the way up meets them again.
    #[test]
    fn odd_sizes_take_more_than_the_even_ones_below_and_less_than_those_above() {
        let flops = |height, width| v1_unet().forward_flops(height, width, 77);
        assert!(flops(56, 64) < flops(57, 64));
        assert!(flops(57, 64) < flops(64, 64));
        assert_eq!(flops(64, 32), flops(32, 64));
    }
}
