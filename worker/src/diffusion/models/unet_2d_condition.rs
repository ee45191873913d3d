//! The network that is asked at each denoising step how much noise is in the latents (diffusers'
//! `models/unets/unet_2d_condition.py`).

use std::mem;

use tch::{Kind, TchError, Tensor};

use super::super::kernels::FeatureMap;
use super::super::nn::{Conv2d, GroupNorm, MapConv2d};
use super::super::weights::Weights;
use super::attention::{KeyValue, with_rows};
use super::embeddings::{TimestepEmbedding, Timesteps};
use super::resnet::ResnetConfig;
use super::transformer_2d::Transformer2DConfig;
use super::unet_2d_blocks::{
    CrossAttnDownBlock2D, CrossAttnUpBlock2D, DownBlock, DownBlock2D, DownBlockConfig, TransformerTexts,
    UNetMidBlock2DCrossAttn, UpBlock, UpBlock2D, UpBlockConfig,
};
use super::unet_2d_config::{BlockType, UNet2DConditionConfig};

/// `UNet2DConditionModel`.
#[derive(Debug)]
pub struct UNet2DConditionModel {
    center_input_sample: bool,
    time_proj: Timesteps,
    time_embedding: TimestepEmbedding,
    conv_in: MapConv2d,
    down_blocks: Vec<DownBlock>,
    mid_block: UNetMidBlock2DCrossAttn,
    up_blocks: Vec<UpBlock>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

/// What a UNet's ResNets make of a training step: it depends on the step alone.
#[derive(Debug)]
pub struct UNetTime {
    /// Of each block, one for each ResNet.
    down: Vec<Vec<Tensor>>,
    mid: Vec<Tensor>,
    up: Vec<Vec<Tensor>>,
}

/// What a UNet's transformers make of a text: it is the same at every step.
#[derive(Debug)]
pub struct UNetText {
    /// Of each block, one for each transformer, each a list of one for each of its layers.
    down: Vec<TransformerTexts>,
    mid: TransformerTexts,
    up: Vec<TransformerTexts>,
}

impl UNetTime {
    /// All its vectors in one, one after the other.
    pub fn flatten(&self) -> Result<Tensor, TchError> {
        Tensor::f_cat(&self.blocks().flatten().collect::<Vec<_>>(), 0)
    }

    /// One like this whose vectors are parts of `flat`, which is as [`Self::flatten`] gives it.
    pub fn in_place_of(&self, flat: &Tensor) -> Result<Self, TchError> {
        let mut start = 0;
        let mut part = |vector: &Tensor| {
            let length = vector.size1()?;
            start += length;
            flat.f_narrow(0, start - length, length)
        };
        let mut blocks = self.blocks().map(|block| block.iter().map(&mut part).collect());
        let mut next = || blocks.next().unwrap_or_else(|| Ok(Vec::new()));
        let down = self.down.iter().map(|_| next()).collect::<Result<_, _>>()?;
        Ok(Self { down, mid: next()?, up: self.up.iter().map(|_| next()).collect::<Result<_, _>>()? })
    }

    fn blocks(&self) -> impl Iterator<Item = &Vec<Tensor>> {
        self.down.iter().chain([&self.mid]).chain(&self.up)
    }
}

impl UNetText {
    /// How many rows it has; `None` if the UNet attends to no text.
    pub fn num_rows(&self) -> Option<i64> {
        let mut layers = self.down.iter().chain([&self.mid]).chain(&self.up).flatten().flatten();
        layers.next().map(KeyValue::num_rows)
    }

    /// Takes over the numbers of `other`, of the same shapes, into the tensors that are here.
    pub fn copy_from(&mut self, other: &Self) -> Result<(), TchError> {
        let ours = self.down.iter_mut().chain([&mut self.mid]).chain(&mut self.up).flatten().flatten();
        let theirs = other.down.iter().chain([&other.mid]).chain(&other.up).flatten().flatten();
        ours.zip(theirs).try_for_each(|(ours, theirs)| ours.copy_from(theirs))
    }

    /// Some of the rows.
    pub fn narrow(&self, start: i64, length: i64) -> Result<Self, TchError> {
        let layers =
            |layers: &Vec<KeyValue>| layers.iter().map(|layer| layer.narrow(start, length)).collect();
        let block = |transformers: &TransformerTexts| transformers.iter().map(layers).collect();
        let blocks = |blocks: &[TransformerTexts]| blocks.iter().map(block).collect::<Result<_, _>>();
        Ok(Self { down: blocks(&self.down)?, mid: block(&self.mid)?, up: blocks(&self.up)? })
    }

    /// Those of several pictures, of one UNet, as those of a batch.
    pub fn cat(parts: &[&Self]) -> Result<Self, TchError> {
        fn cat_layers(parts: &[&Vec<KeyValue>]) -> Result<Vec<KeyValue>, TchError> {
            cat_each(parts, KeyValue::cat)
        }
        fn cat_block(parts: &[&TransformerTexts]) -> Result<TransformerTexts, TchError> {
            cat_each(parts, cat_layers)
        }
        fn of<'t, T>(parts: &[&'t UNetText], part: fn(&UNetText) -> &T) -> Vec<&'t T> {
            parts.iter().map(|text| part(text)).collect()
        }
        if parts.is_empty() {
            return Err(TchError::Shape("there is no text to put together".to_owned()));
        }
        Ok(Self {
            down: cat_each(&of(parts, |text| &text.down), cat_block)?,
            mid: cat_block(&of(parts, |text| &text.mid))?,
            up: cat_each(&of(parts, |text| &text.up), cat_block)?,
        })
    }
}

/// Puts the first items of all `lists` together, the second ones, and so on; the lists are of one length.
fn cat_each<T>(lists: &[&Vec<T>], cat: fn(&[&T]) -> Result<T, TchError>) -> Result<Vec<T>, TchError> {
    let length = lists.first().map_or(0, |list| list.len());
    (0..length).map(|i| cat(&lists.iter().map(|list| &list[i]).collect::<Vec<_>>())).collect()
}

impl UNet2DConditionModel {
    /// Takes the tensors that `config` asks for.
    pub fn load(weights: &Weights<'_>, config: &UNet2DConditionConfig) -> Result<Self, TchError> {
        let first_channels = config.block_out_channels[0];
        let conv_in = weights / "conv_in";
        let first_conv = Conv2d::load(&conv_in, config.in_channels, first_channels, 3);
        Ok(Self {
            center_input_sample: config.center_input_sample,
            time_proj: Timesteps::new(
                first_channels,
                config.flip_sin_to_cos,
                config.freq_shift,
                weights.device(),
            )?,
            time_embedding: TimestepEmbedding::load(
                &(weights / "time_embedding"),
                first_channels,
                config.time_embed_dim,
            ),
            conv_in: MapConv2d::new(first_conv, config.norm_num_groups),
            down_blocks: load_down_blocks(&(weights / "down_blocks"), config),
            mid_block: load_mid_block(&(weights / "mid_block"), config),
            up_blocks: load_up_blocks(&(weights / "up_blocks"), config),
            conv_norm_out: GroupNorm::load(
                &(weights / "conv_norm_out"),
                config.norm_num_groups,
                first_channels,
                config.norm_eps,
            ),
            conv_out: Conv2d::load(&(weights / "conv_out"), first_channels, config.out_channels, 3),
        })
    }

    /// What the blocks make of training steps, possibly fractions. All at once, so that the weights behind it are read
    /// once and not for each step.
    pub fn embed_timesteps(&self, timesteps: &[f64], kind: Kind) -> Result<Vec<UNetTime>, TchError> {
        let sinusoids = self.time_proj.forward(timesteps)?.f_to_kind(kind)?;
        // Of shape `(timesteps.len(), time_embed_dim)`, with the SiLU that each ResNet would apply.
        let temb = self.time_embedding.forward(&sinusoids)?.f_silu_()?;
        let of_down = |block: &DownBlock| block.layers().time_biases(&temb);
        let of_up = |block: &UpBlock| block.layers().time_biases(&temb);
        // Of each block a list for each step; a step's are taken out of all of them.
        let mut down = self.down_blocks.iter().map(of_down).collect::<Result<Vec<_>, _>>()?;
        let mut mid = self.mid_block.layers().time_biases(&temb)?;
        let mut up = self.up_blocks.iter().map(of_up).collect::<Result<Vec<_>, _>>()?;
        let step = |i: usize| UNetTime {
            down: down.iter_mut().map(|steps| mem::take(&mut steps[i])).collect(),
            mid: mem::take(&mut mid[i]),
            up: up.iter_mut().map(|steps| mem::take(&mut steps[i])).collect(),
        };
        Ok((0..timesteps.len()).map(step).collect())
    }

    /// What the blocks make of `encoder_hidden_states` `(batch_size, text_length, cross_attention_dim)`.
    pub fn project_text(&self, encoder_hidden_states: &Tensor) -> Result<UNetText, TchError> {
        let states = encoder_hidden_states;
        Ok(UNetText {
            down: self
                .down_blocks
                .iter()
                .map(|block| block.layers().project_text(states))
                .collect::<Result<_, _>>()?,
            mid: self.mid_block.layers().project_text(states)?,
            up: self
                .up_blocks
                .iter()
                .map(|block| block.layers().project_text(states))
                .collect::<Result<_, _>>()?,
        })
    }

    /// The noise predicted in `sample`, of the same shape `(batch_size, in_channels, height, width)` and dtype. `time`
    /// is the same for the whole batch, `text` has as many rows.
    ///
    /// Or twice as many: then its halves are two texts for the same samples, and the halves of what comes out are the
    /// predictions with each. What comes before the first look at a text is computed once for both.
    pub fn forward(&self, sample: &Tensor, time: &UNetTime, text: &UNetText) -> Result<Tensor, TchError> {
        let first = self.conv_in(sample, text)?;
        let deep = self.forward_deep(&first, time, text)?;
        self.forward_outermost(first.tensor(), &deep, time, text)
    }

    /// As [`Self::forward`], and what all layers but the outermost made, for [`Self::forward_cached`].
    pub fn forward_and_keep(
        &self,
        sample: &Tensor,
        time: &UNetTime,
        text: &UNetText,
    ) -> Result<(Tensor, Tensor), TchError> {
        let first = self.conv_in(sample, text)?;
        let deep = self.forward_deep(&first, time, text)?;
        Ok((self.forward_outermost(first.tensor(), &deep, time, text)?, deep))
    }

    /// As [`Self::forward`], with what all layers but the outermost made of an earlier `sample` of the same shape.
    pub fn forward_cached(
        &self,
        sample: &Tensor,
        deep: &Tensor,
        time: &UNetTime,
        text: &UNetText,
    ) -> Result<Tensor, TchError> {
        self.forward_outermost(self.conv_in(sample, text)?.tensor(), deep, time, text)
    }

    /// The first convolution; a row for each of `sample`, even where there are two texts for it, if the next layers can do
    /// with that.
    fn conv_in(&self, sample: &Tensor, text: &UNetText) -> Result<FeatureMap, TchError> {
        let first = if self.center_input_sample {
            self.conv_in.forward(&sample.f_mul_scalar(2.0)?.f_sub_scalar(1.0)?)?
        } else {
            self.conv_in.forward(sample)?
        };
        match self.down_blocks.first() {
            Some(DownBlock::CrossAttn(_)) => Ok(first),
            _ => first.with_samples(|rows| with_rows(rows, text.num_rows())),
        }
    }

    /// The last layer of the last up block, and the output convolution. `first` is [`Self::conv_in`]'s output, `deep`
    /// [`Self::forward_deep`]'s.
    fn forward_outermost(
        &self,
        first: &Tensor,
        deep: &Tensor,
        time: &UNetTime,
        text: &UNetText,
    ) -> Result<Tensor, TchError> {
        let hidden_states = match (self.up_blocks.last(), time.up.last(), text.up.last()) {
            (Some(block), Some(time), Some(text)) => {
                block.forward_last(deep, time, &with_rows(first, deep.size().first().copied())?, text)?
            }
            _ => deep.shallow_clone().into(),
        };
        self.conv_out.forward(&self.conv_norm_out.forward_silu(&hidden_states)?)
    }

    /// Everything between [`Self::conv_in`] and [`Self::forward_outermost`].
    fn forward_deep(&self, first: &FeatureMap, time: &UNetTime, text: &UNetText) -> Result<Tensor, TchError> {
        let (_, _, height, width) = first.tensor().size4()?;
        let upsample_factor = 1 << (self.up_blocks.len() - 1);
        let forward_upsample_size = height % upsample_factor != 0 || width % upsample_factor != 0;

        let mut hidden_states = first.shallow_clone();
        let mut res_samples = vec![first.tensor().shallow_clone()];
        for (block, (time, text)) in self.down_blocks.iter().zip(time.down.iter().zip(&text.down)) {
            hidden_states = block.forward(&hidden_states, time, text, &mut res_samples)?;
        }

        let mut hidden_states = self.mid_block.forward(&hidden_states, &time.mid, &text.mid)?.into_tensor();

        for (block, (time, text)) in self.up_blocks.iter().zip(time.up.iter().zip(&text.up)) {
            // The first of all is left for the outermost layer.
            let start = res_samples.len().saturating_sub(block.num_resnets()).max(1);
            let block_res_samples = res_samples.split_off(start);
            // Halving an odd size rounded up, so doubling it back gives one too many: grow to the size of the skip
            // connection that comes next instead.
            let upsample_size = match res_samples.last() {
                Some(next) if forward_upsample_size => {
                    let (_, _, height, width) = next.size4()?;
                    Some([height, width])
                }
                _ => None,
            };
            hidden_states = block.forward(&hidden_states, time, block_res_samples, text, upsample_size)?;
        }
        Ok(hidden_states)
    }
}

/// The ResNets of down and up blocks.
fn resnet_config(config: &UNet2DConditionConfig) -> ResnetConfig {
    ResnetConfig {
        temb_channels: Some(config.time_embed_dim),
        groups: config.norm_num_groups,
        eps: config.norm_eps,
        output_scale_factor: 1.0,
    }
}

/// The transformers at one resolution.
fn transformer_config(config: &UNet2DConditionConfig, level: usize) -> Transformer2DConfig {
    Transformer2DConfig {
        heads: config.num_attention_heads[level],
        cross_attention_dim: config.cross_attention_dim[level],
        num_layers: config.transformer_layers_per_block[level],
        norm_num_groups: config.norm_num_groups,
        use_linear_projection: config.use_linear_projection,
    }
}

fn load_down_blocks(weights: &Weights<'_>, config: &UNet2DConditionConfig) -> Vec<DownBlock> {
    let channels = &config.block_out_channels;
    let load = |level: usize| {
        let weights = weights / level;
        let block = DownBlockConfig {
            in_channels: channels[level.saturating_sub(1)],
            out_channels: channels[level],
            num_layers: config.layers_per_block[level],
            add_downsample: level + 1 < channels.len(),
            resnet: resnet_config(config),
        };
        match config.down_block_types[level] {
            BlockType::Plain => DownBlock::Plain(DownBlock2D::load(&weights, &block)),
            BlockType::CrossAttn => {
                let transformer = transformer_config(config, level);
                DownBlock::CrossAttn(CrossAttnDownBlock2D::load(&weights, &block, &transformer))
            }
        }
    };
    (0..channels.len()).map(load).collect()
}

fn load_mid_block(weights: &Weights<'_>, config: &UNet2DConditionConfig) -> UNetMidBlock2DCrossAttn {
    let last = config.block_out_channels.len() - 1;
    let resnet = ResnetConfig { output_scale_factor: config.mid_block_scale_factor, ..resnet_config(config) };
    let transformer = transformer_config(config, last);
    UNetMidBlock2DCrossAttn::load(weights, config.block_out_channels[last], &resnet, &transformer)
}

fn load_up_blocks(weights: &Weights<'_>, config: &UNet2DConditionConfig) -> Vec<UpBlock> {
    let channels = &config.block_out_channels;
    let last = channels.len() - 1;
    let load = |i: usize| {
        let weights = weights / i;
        let level = last - i;
        let block = UpBlockConfig {
            in_channels: channels[level.saturating_sub(1)],
            prev_output_channel: channels[(level + 1).min(last)],
            out_channels: channels[level],
            num_layers: config.layers_per_block[level] + 1,
            add_upsample: level > 0,
            resnet: resnet_config(config),
        };
        match config.up_block_types[i] {
            BlockType::Plain => UpBlock::Plain(UpBlock2D::load(&weights, &block)),
            BlockType::CrossAttn => {
                let transformer = transformer_config(config, level);
                UpBlock::CrossAttn(CrossAttnUpBlock2D::load(&weights, &block, &transformer))
            }
        }
    };
    (0..channels.len()).map(load).collect()
}
