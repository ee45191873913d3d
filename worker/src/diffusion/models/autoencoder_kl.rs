//! The autoencoder whose latents are denoised (diffusers' `models/autoencoders/autoencoder_kl.py`): its decoder, which
//! is all that text to image needs.

use tch::{TchError, Tensor};

use super::super::config::ConfigFile;
use super::super::load_error::Fault;
use super::super::nn::Conv2d;
use super::super::weights::Weights;
use super::vae::Decoder;

/// More channels, layers or blocks than any checkpoint has; guards against absurd configs.
const MAX_CHANNELS: i64 = 1 << 20;
/// See [`MAX_CHANNELS`].
const MAX_LAYERS: i64 = 64;
/// See [`MAX_CHANNELS`].
const MAX_BLOCKS: usize = 16;
/// `scaling_factor` where `vae/config.json` has none, as in v1's early revisions (diffusers' `AutoencoderKL.__init__`).
const DEFAULT_SCALING_FACTOR: f64 = 0.18215;

/// `vae/config.json`.
#[derive(Debug, Clone)]
pub struct AutoencoderKLConfig {
    /// Color channels of the pixels.
    pub out_channels: i64,
    /// Channels at each resolution, widest first.
    pub block_out_channels: Vec<i64>,
    /// ResNets in an encoder block; a decoder block has one more.
    pub layers_per_block: i64,
    /// Channels of the latents.
    pub latent_channels: i64,
    /// Groups of all GroupNorms.
    pub norm_num_groups: i64,
    /// What the latents are divided by before they are decoded.
    pub scaling_factor: f64,
    /// Whether a 1×1 convolution comes before the decoder.
    pub use_post_quant_conv: bool,
    /// Whether the mid block has attention.
    pub mid_block_add_attention: bool,
}

impl AutoencoderKLConfig {
    /// Reads the file. Defaults are those of diffusers' class.
    pub fn read(config: ConfigFile) -> Result<Self, Vec<Fault>> {
        config.only("act_fn", "silu");
        for field in ["shift_factor", "latents_mean", "latents_std"] {
            config.absent(field);
        }
        let read = Self {
            out_channels: config.size("out_channels", 3, MAX_CHANNELS),
            block_out_channels: config.sizes("block_out_channels", &[64], MAX_CHANNELS),
            layers_per_block: config.size("layers_per_block", 1, MAX_LAYERS),
            latent_channels: config.size("latent_channels", 4, MAX_CHANNELS),
            norm_num_groups: config.size("norm_num_groups", 32, MAX_CHANNELS),
            scaling_factor: config.positive("scaling_factor", DEFAULT_SCALING_FACTOR),
            use_post_quant_conv: config.flag("use_post_quant_conv", true),
            mid_block_add_attention: config.flag("mid_block_add_attention", true),
        };
        let num_blocks = read.block_out_channels.len();
        let up_decoder_block = |name: &str| (name == "UpDecoderBlock2D").then_some(());
        let up_blocks = config.choices(
            "up_block_types",
            &[()],
            "\"UpDecoderBlock2D\"",
            up_decoder_block as fn(&str) -> _,
        );
        if num_blocks > MAX_BLOCKS {
            config.fault("block_out_channels", format!("a list of at most {MAX_BLOCKS} integers"));
        }
        if up_blocks.len() != num_blocks {
            config.fault("up_block_types", format!("a list of {num_blocks}, as `block_out_channels` is"));
        }
        if read.block_out_channels.iter().any(|channels| channels % read.norm_num_groups != 0) {
            let channels = &read.block_out_channels;
            config.fault(
                "norm_num_groups",
                format!("a divisor of each of `block_out_channels` ({channels:?})"),
            );
        }
        config.into_result(read)
    }

    /// Pixels per latent cell in each direction: 8 for v1.
    pub fn vae_scale_factor(&self) -> i64 {
        1 << (self.block_out_channels.len() - 1)
    }
}

/// `AutoencoderKL`, without its encoder.
#[derive(Debug)]
pub struct AutoencoderKL {
    post_quant_conv: Option<Conv2d>,
    decoder: Decoder,
    scaling_factor: f64,
}

impl AutoencoderKL {
    /// Today's names for the keys of a file, which may have the old ones for the attention in the mid block (diffusers'
    /// `_fix_state_dict_keys_on_load`); the encoder's are dropped.
    pub fn rename_key(key: &str) -> Option<String> {
        if key.starts_with("encoder.") || key.starts_with("quant_conv.") {
            return None;
        }
        let attention = "decoder.mid_block.attentions.0.";
        let renamed =
            key.strip_prefix(attention).and_then(|rest| rest.split_once('.')).and_then(|(layer, rest)| {
                let layer = match layer {
                    "query" => "to_q",
                    "key" => "to_k",
                    "value" => "to_v",
                    "proj_attn" => "to_out.0",
                    _ => return None,
                };
                Some(format!("{attention}{layer}.{rest}"))
            });
        Some(renamed.unwrap_or_else(|| key.to_owned()))
    }

    /// Takes the tensors that `config` asks for.
    pub fn load(weights: &Weights<'_>, config: &AutoencoderKLConfig) -> Self {
        let latent_channels = config.latent_channels;
        Self {
            post_quant_conv: config
                .use_post_quant_conv
                .then(|| Conv2d::load(&(weights / "post_quant_conv"), latent_channels, latent_channels, 1)),
            decoder: Decoder::load(&(weights / "decoder"), config),
            scaling_factor: config.scaling_factor,
        }
    }

    /// Denoised latents `(batch_size, latent_channels, height, width)` to pixels, roughly in -1..1, of shape
    /// `(batch_size, out_channels, height * vae_scale_factor, width * vae_scale_factor)`. Undoes the scaling of the
    /// latents first.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor, TchError> {
        let latents = latents.f_div_scalar(self.scaling_factor)?;
        match &self.post_quant_conv {
            Some(post_quant_conv) => self.decoder.forward(&post_quant_conv.forward(&latents)?),
            None => self.decoder.forward(&latents),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_attention_names_are_renamed_and_the_encoder_dropped() {
        let renamed = |key: &str| AutoencoderKL::rename_key(key);
        for (old, new) in [("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")] {
            let expected = format!("decoder.mid_block.attentions.0.{new}.weight");
            assert_eq!(
                renamed(&format!("decoder.mid_block.attentions.0.{old}.weight")).as_ref(),
                Some(&expected)
            );
            assert_eq!(renamed(&expected).as_ref(), Some(&expected));
        }
        let norm = "decoder.mid_block.attentions.0.group_norm.bias";
        assert_eq!(renamed(norm).as_deref(), Some(norm));
        assert_eq!(renamed("encoder.conv_in.weight"), None);
        assert_eq!(renamed("quant_conv.weight"), None);
        assert_eq!(renamed("post_quant_conv.weight").as_deref(), Some("post_quant_conv.weight"));
    }

    #[test]
    fn the_early_revisions_scaling_factor_is_the_default() {
        let config = |json| ConfigFile::from_fields("vae/config.json", serde_json::from_str(json).unwrap());
        let early = AutoencoderKLConfig::read(config("{}")).unwrap();
        assert_eq!(early.scaling_factor, 0.18215);
        let newer = AutoencoderKLConfig::read(config(r#"{"scaling_factor": 0.5}"#)).unwrap();
        assert_eq!(newer.scaling_factor, 0.5);
    }
}
