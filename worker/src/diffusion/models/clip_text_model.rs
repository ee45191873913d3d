//! CLIP's text model, which turns token ids into what the UNet attends to.

use tch::{TchError, Tensor};

use super::super::config::ConfigFile;
use super::super::load_error::Fault;
use super::super::nn::{Embedding, LayerNorm};
use super::super::weights::Weights;
use super::clip_encoder::{CLIPEncoder, CLIPEncoderConfig, HiddenAct, MAX_CLIP_SIZE};

/// `text_encoder/config.json`.
#[derive(Debug, Clone, Copy)]
pub struct CLIPTextConfig {
    /// The transformer.
    pub encoder: CLIPEncoderConfig,
    /// Tokens in the vocabulary.
    pub vocab_size: i64,
    /// The longest sequence of tokens.
    pub max_position_embeddings: i64,
}

impl CLIPTextConfig {
    /// Reads the file. Defaults are those of transformers' `CLIPTextConfig`.
    pub fn read(config: ConfigFile) -> Result<Self, Vec<Fault>> {
        let defaults = CLIPEncoderConfig {
            hidden_size: 512,
            intermediate_size: 2048,
            num_hidden_layers: 12,
            num_attention_heads: 8,
            hidden_act: HiddenAct::QuickGelu,
            layer_norm_eps: 1e-5,
        };
        // diffusers would mask the padding; no v1 checkpoint asks for it.
        config.only("use_attention_mask", false);
        let read = Self {
            encoder: CLIPEncoderConfig::read(&config, defaults),
            vocab_size: config.size("vocab_size", 49_408, MAX_CLIP_SIZE),
            max_position_embeddings: config.size("max_position_embeddings", 77, MAX_CLIP_SIZE),
        };
        config.into_result(read)
    }
}

/// `CLIPTextModel`.
#[derive(Debug)]
pub struct CLIPTextModel {
    token_embedding: Embedding,
    position_embedding: Embedding,
    encoder: CLIPEncoder,
    final_layer_norm: LayerNorm,
}

impl CLIPTextModel {
    /// The names of transformers 5 for the keys of a file: older versions put `text_model.` before each, and stored
    /// the position ids.
    pub fn rename_key(key: &str) -> Option<String> {
        let key = key.strip_prefix("text_model.").unwrap_or(key);
        (!key.ends_with("position_ids")).then(|| key.to_owned())
    }

    /// Takes the tensors that `config` asks for.
    pub fn load(weights: &Weights<'_>, config: &CLIPTextConfig) -> Self {
        let CLIPEncoderConfig { hidden_size, layer_norm_eps, .. } = config.encoder;
        let embeddings = weights / "embeddings";
        Self {
            token_embedding: Embedding::load(
                &(&embeddings / "token_embedding"),
                config.vocab_size,
                hidden_size,
            ),
            position_embedding: Embedding::load(
                &(&embeddings / "position_embedding"),
                config.max_position_embeddings,
                hidden_size,
            ),
            encoder: CLIPEncoder::load(&(weights / "encoder"), &config.encoder, true),
            final_layer_norm: LayerNorm::load(&(weights / "final_layer_norm"), hidden_size, layer_norm_eps),
        }
    }

    /// Token ids, int64 of shape `(batch_size, length)`, to diffusers' `prompt_embeds`, the last hidden state of shape
    /// `(batch_size, length, hidden_size)`. Padding is not masked, as in training.
    pub fn forward(&self, input_ids: &Tensor) -> Result<Tensor, TchError> {
        let (_, length) = input_ids.size2()?;
        let positions = self.position_embedding.weight.f_narrow(0, 0, length)?;
        let embeddings = self.token_embedding.forward(input_ids)?.f_add_(&positions)?;
        self.final_layer_norm.forward(&self.encoder.forward(&embeddings)?)
    }
}

#[cfg(test)]
mod tests {
    use super::CLIPTextModel;

    #[test]
    fn both_key_spellings_give_the_same_names() {
        for key in ["text_model.encoder.layers.0.mlp.fc1.bias", "encoder.layers.0.mlp.fc1.bias"] {
            assert_eq!(CLIPTextModel::rename_key(key).unwrap(), "encoder.layers.0.mlp.fc1.bias");
        }
        assert_eq!(CLIPTextModel::rename_key("text_model.embeddings.position_ids"), None);
    }
}
