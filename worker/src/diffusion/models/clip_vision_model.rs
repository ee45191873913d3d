//! CLIP's vision model, the eyes of the safety checker.

use tch::{TchError, Tensor};

use super::super::config::ConfigFile;
use super::super::nn::LayerNorm;
use super::super::weights::Weights;
use super::clip_encoder::{CLIPEncoder, CLIPEncoderConfig, HiddenAct, MAX_CLIP_SIZE};

/// The `vision_config` in `safety_checker/config.json`.
#[derive(Debug, Clone, Copy)]
pub struct CLIPVisionConfig {
    /// The transformer.
    pub encoder: CLIPEncoderConfig,
    /// Color channels.
    pub num_channels: i64,
    /// Height and width of the input in pixels.
    pub image_size: i64,
    /// Height and width of a patch in pixels.
    pub patch_size: i64,
}

impl CLIPVisionConfig {
    /// Reads the section; its faults stay in `config`. Defaults are those of transformers' `CLIPVisionConfig`.
    pub fn read(config: &ConfigFile) -> Self {
        let defaults = CLIPEncoderConfig {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            hidden_act: HiddenAct::QuickGelu,
            layer_norm_eps: 1e-5,
        };
        let image_size = config.size("image_size", 224, MAX_CLIP_SIZE);
        let patch_size = config.size("patch_size", 32, MAX_CLIP_SIZE);
        if patch_size > image_size {
            config.fault("patch_size", format!("at most `image_size` ({image_size})"));
        }
        Self {
            encoder: CLIPEncoderConfig::read(config, defaults),
            num_channels: config.size("num_channels", 3, MAX_CLIP_SIZE),
            image_size,
            patch_size,
        }
    }

    /// Patches in an image, and one class token.
    fn num_positions(&self) -> i64 {
        let per_side = self.image_size / self.patch_size.max(1);
        per_side * per_side + 1
    }
}

/// `CLIPVisionModel`.
#[derive(Debug)]
pub struct CLIPVisionModel {
    class_embedding: Tensor,
    patch_embedding: Tensor,
    position_embedding: Tensor,
    patch_size: i64,
    pre_layernorm: LayerNorm,
    encoder: CLIPEncoder,
    post_layernorm: LayerNorm,
}

impl CLIPVisionModel {
    /// Takes the tensors that `config` asks for.
    pub fn load(weights: &Weights<'_>, config: &CLIPVisionConfig) -> Self {
        let CLIPEncoderConfig { hidden_size, layer_norm_eps, .. } = config.encoder;
        let embeddings = weights / "embeddings";
        let patch_shape = [hidden_size, config.num_channels, config.patch_size, config.patch_size];
        Self {
            class_embedding: embeddings.tensor("class_embedding", &[hidden_size]),
            patch_embedding: embeddings.tensor("patch_embedding.weight", &patch_shape),
            position_embedding: embeddings
                .tensor("position_embedding.weight", &[config.num_positions(), hidden_size]),
            patch_size: config.patch_size,
            // The name in the files really is spelled like this.
            pre_layernorm: LayerNorm::load(&(weights / "pre_layrnorm"), hidden_size, layer_norm_eps),
            encoder: CLIPEncoder::load(&(weights / "encoder"), &config.encoder, false),
            post_layernorm: LayerNorm::load(&(weights / "post_layernorm"), hidden_size, layer_norm_eps),
        }
    }

    /// Preprocessed pixels of shape `(batch_size, num_channels, image_size, image_size)` to the pooled output of shape
    /// `(batch_size, hidden_size)`: the class token's last hidden state, normalized.
    pub fn forward(&self, pixel_values: &Tensor) -> Result<Tensor, TchError> {
        let (batch_size, _, _, _) = pixel_values.size4()?;
        let no_bias = None::<&Tensor>;
        let stride = [self.patch_size; 2];
        let patches = pixel_values
            .f_conv2d(&self.patch_embedding, no_bias, stride, [0, 0], [1, 1], 1)?
            .f_flatten(2, 3)?
            .f_transpose(1, 2)?;
        let class = self.class_embedding.f_expand([batch_size, 1, -1], false)?;
        let embeddings = Tensor::f_cat(&[class, patches], 1)?.f_add_(&self.position_embedding)?;
        let hidden_states = self.encoder.forward(&self.pre_layernorm.forward(&embeddings)?)?;
        self.post_layernorm.forward(&hidden_states.f_select(1, 0)?)
    }
}
