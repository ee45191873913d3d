//! The blocks that UNet and VAE are stacked from (diffusers' `models/unets/unet_2d_blocks.py`).
//!
//! `hidden_states` are of shape `(batch_size, channels, height, width)`. What does not change with them is made ahead: by
//! [`Layers::time_biases`] from `temb`, of shape `(num_steps, temb_channels)` after SiLU, for each step a tensor for each
//! ResNet, and by [`Layers::project_text`] from `encoder_hidden_states`, of shape
//! `(batch_size, text_length, cross_attention_dim)`, one list for each transformer; without any, transformers attend to
//! themselves.
//!
//! What a GroupNorm reads next is handed on as a [`FeatureMap`], with the norm's statistics where a kernel has taken them.

use tch::{TchError, Tensor};

use super::super::kernels::{FeatureMap, Kernels};
use super::super::nn::GroupNorm;
use super::super::weights::Weights;
use super::attention::{KeyValue, SelfAttention};
use super::resnet::{Downsample2D, ResnetBlock2D, ResnetConfig, Upsample2D};
use super::transformer_2d::{Transformer2DConfig, Transformer2DModel};

/// What a down block is made from.
#[derive(Debug, Clone, Copy)]
pub struct DownBlockConfig {
    /// Channels of the block above.
    pub in_channels: i64,
    /// Channels of this block.
    pub out_channels: i64,
    /// ResNets.
    pub num_layers: i64,
    /// Whether the block ends with a convolution of stride 2.
    pub add_downsample: bool,
    /// Its ResNets.
    pub resnet: ResnetConfig,
}

impl DownBlockConfig {
    fn resnets(&self, weights: &Weights<'_>) -> Vec<ResnetBlock2D> {
        let weights = weights / "resnets";
        let in_channels = |i| if i == 0 { self.in_channels } else { self.out_channels };
        (0..self.num_layers)
            .map(|i| ResnetBlock2D::load(&(&weights / i), in_channels(i), self.out_channels, &self.resnet))
            .collect()
    }

    fn downsampler(&self, weights: &Weights<'_>) -> Option<Downsample2D> {
        self.add_downsample.then(|| {
            Downsample2D::load(&(weights / "downsamplers" / 0), self.out_channels, self.resnet.groups)
        })
    }
}

/// What an up block is made from.
#[derive(Debug, Clone, Copy)]
pub struct UpBlockConfig {
    /// Channels of the skip connection at the last ResNet: those of the down block one resolution wider.
    pub in_channels: i64,
    /// Channels of the block before.
    pub prev_output_channel: i64,
    /// Channels of this block.
    pub out_channels: i64,
    /// ResNets.
    pub num_layers: i64,
    /// Whether the block ends with an upsampler.
    pub add_upsample: bool,
    /// Its ResNets.
    pub resnet: ResnetConfig,
}

impl UpBlockConfig {
    fn resnets(&self, weights: &Weights<'_>) -> Vec<ResnetBlock2D> {
        let weights = weights / "resnets";
        (0..self.num_layers)
            .map(|i| {
                let skip_channels =
                    if i == self.num_layers - 1 { self.in_channels } else { self.out_channels };
                let hidden_channels = if i == 0 { self.prev_output_channel } else { self.out_channels };
                let in_channels = hidden_channels + skip_channels;
                ResnetBlock2D::load(&(&weights / i), in_channels, self.out_channels, &self.resnet)
            })
            .collect()
    }

    fn upsampler(&self, weights: &Weights<'_>) -> Option<Upsample2D> {
        self.add_upsample
            .then(|| Upsample2D::load(&(weights / "upsamplers" / 0), self.out_channels, self.resnet.groups))
    }
}

/// `num_layers` transformers below `weights / "attentions"`.
fn attentions(
    weights: &Weights<'_>,
    num_layers: i64,
    channels: i64,
    config: &Transformer2DConfig,
) -> Vec<Transformer2DModel> {
    let weights = weights / "attentions";
    (0..num_layers).map(|i| Transformer2DModel::load(&(&weights / i), channels, config)).collect()
}

/// What each transformer of a block makes of a text.
pub type TransformerTexts = Vec<Vec<KeyValue>>;

/// The parts of a block that something can be made for ahead.
#[derive(Debug, Clone, Copy)]
pub struct Layers<'b> {
    resnets: &'b [ResnetBlock2D],
    /// None in a block without attention to the text.
    attentions: &'b [Transformer2DModel],
}

impl Layers<'_> {
    /// For each step, each ResNet's [`ResnetBlock2D::time_biases`].
    pub fn time_biases(&self, temb: &Tensor) -> Result<Vec<Vec<Tensor>>, TchError> {
        let (num_steps, _) = temb.size2()?;
        let mut steps: Vec<Vec<Tensor>> = (0..num_steps).map(|_| Vec::new()).collect();
        for resnet in self.resnets {
            for (step, bias) in steps.iter_mut().zip(resnet.time_biases(temb)?) {
                step.push(bias);
            }
        }
        Ok(steps)
    }

    /// Each transformer's [`Transformer2DModel::project_text`].
    pub fn project_text(&self, encoder_hidden_states: &Tensor) -> Result<TransformerTexts, TchError> {
        self.attentions.iter().map(|attention| attention.project_text(encoder_hidden_states)).collect()
    }
}

/// A transformer's part of a text; empty without one.
fn text_of(text: &[Vec<KeyValue>], transformer: usize) -> &[KeyValue] {
    text.get(transformer).map_or(&[], Vec::as_slice)
}

/// A down block of the UNet.
#[derive(Debug)]
pub enum DownBlock {
    /// With attention to the text.
    CrossAttn(CrossAttnDownBlock2D),
    /// Without.
    Plain(DownBlock2D),
}

impl DownBlock {
    /// What its ResNets and transformers are.
    pub fn layers(&self) -> Layers<'_> {
        match self {
            Self::CrossAttn(block) => Layers { resnets: &block.resnets, attentions: &block.attentions },
            Self::Plain(block) => Layers { resnets: &block.resnets, attentions: &[] },
        }
    }

    /// The block's output; what the up blocks will need is pushed onto `res_samples`, one tensor for each ResNet and
    /// one for the downsampler.
    pub fn forward(
        &self,
        hidden_states: &FeatureMap,
        time: &[Tensor],
        text: &[Vec<KeyValue>],
        res_samples: &mut Vec<Tensor>,
    ) -> Result<FeatureMap, TchError> {
        match self {
            Self::CrossAttn(block) => block.forward(hidden_states, time, text, res_samples),
            Self::Plain(block) => block.forward(hidden_states, time, res_samples),
        }
    }
}

/// `DownBlock2D`.
#[derive(Debug)]
pub struct DownBlock2D {
    resnets: Vec<ResnetBlock2D>,
    downsampler: Option<Downsample2D>,
}

impl DownBlock2D {
    /// Takes the tensors that `config` asks for.
    pub fn load(weights: &Weights<'_>, config: &DownBlockConfig) -> Self {
        Self { resnets: config.resnets(weights), downsampler: config.downsampler(weights) }
    }

    /// See [`DownBlock::forward`].
    pub fn forward(
        &self,
        hidden_states: &FeatureMap,
        time: &[Tensor],
        res_samples: &mut Vec<Tensor>,
    ) -> Result<FeatureMap, TchError> {
        let mut hidden_states = hidden_states.shallow_clone();
        for (i, resnet) in self.resnets.iter().enumerate() {
            hidden_states = resnet.forward(&hidden_states, time.get(i))?;
            res_samples.push(hidden_states.tensor().shallow_clone());
        }
        downsample(self.downsampler.as_ref(), hidden_states, res_samples)
    }
}

/// `CrossAttnDownBlock2D`.
#[derive(Debug)]
pub struct CrossAttnDownBlock2D {
    resnets: Vec<ResnetBlock2D>,
    attentions: Vec<Transformer2DModel>,
    downsampler: Option<Downsample2D>,
}

impl CrossAttnDownBlock2D {
    /// Takes the tensors that the configs ask for.
    pub fn load(weights: &Weights<'_>, config: &DownBlockConfig, transformer: &Transformer2DConfig) -> Self {
        Self {
            resnets: config.resnets(weights),
            attentions: attentions(weights, config.num_layers, config.out_channels, transformer),
            downsampler: config.downsampler(weights),
        }
    }

    /// See [`DownBlock::forward`].
    pub fn forward(
        &self,
        hidden_states: &FeatureMap,
        time: &[Tensor],
        text: &[Vec<KeyValue>],
        res_samples: &mut Vec<Tensor>,
    ) -> Result<FeatureMap, TchError> {
        let mut hidden_states = hidden_states.shallow_clone();
        for (i, (resnet, attention)) in self.resnets.iter().zip(&self.attentions).enumerate() {
            hidden_states = resnet.forward(&hidden_states, time.get(i))?;
            hidden_states = attention.forward(hidden_states, text_of(text, i))?;
            res_samples.push(hidden_states.tensor().shallow_clone());
        }
        downsample(self.downsampler.as_ref(), hidden_states, res_samples)
    }
}

/// The end of a down block.
fn downsample(
    downsampler: Option<&Downsample2D>,
    hidden_states: FeatureMap,
    res_samples: &mut Vec<Tensor>,
) -> Result<FeatureMap, TchError> {
    let Some(downsampler) = downsampler else { return Ok(hidden_states) };
    let hidden_states = downsampler.forward(hidden_states.tensor())?;
    res_samples.push(hidden_states.tensor().shallow_clone());
    Ok(hidden_states)
}

/// The UNet's narrowest block, `UNetMidBlock2DCrossAttn`: a ResNet, a transformer, a ResNet.
#[derive(Debug)]
pub struct UNetMidBlock2DCrossAttn {
    resnets: [ResnetBlock2D; 2],
    attention: Transformer2DModel,
}

impl UNetMidBlock2DCrossAttn {
    /// Takes the tensors that the configs ask for.
    pub fn load(
        weights: &Weights<'_>,
        channels: i64,
        resnet: &ResnetConfig,
        transformer: &Transformer2DConfig,
    ) -> Self {
        let resnets = weights / "resnets";
        Self {
            resnets: [0, 1].map(|i| ResnetBlock2D::load(&(&resnets / i), channels, channels, resnet)),
            attention: Transformer2DModel::load(&(weights / "attentions" / 0), channels, transformer),
        }
    }

    /// What its ResNets and transformers are.
    pub fn layers(&self) -> Layers<'_> {
        Layers { resnets: &self.resnets, attentions: std::slice::from_ref(&self.attention) }
    }

    /// Keeps the shape of `hidden_states`.
    pub fn forward(
        &self,
        hidden_states: &FeatureMap,
        time: &[Tensor],
        text: &[Vec<KeyValue>],
    ) -> Result<FeatureMap, TchError> {
        let [first, second] = &self.resnets;
        let hidden_states = first.forward(hidden_states, time.first())?;
        let hidden_states = self.attention.forward(hidden_states, text_of(text, 0))?;
        second.forward(&hidden_states, time.get(1))
    }
}

/// The VAE's narrowest block, `UNetMidBlock2D`: a ResNet, attention if there is any, a ResNet.
#[derive(Debug)]
pub struct UNetMidBlock2D {
    resnets: [ResnetBlock2D; 2],
    attention: Option<(GroupNorm, SelfAttention)>,
    groups: i64,
    kernels: Kernels,
}

impl UNetMidBlock2D {
    /// Takes the tensors that the config asks for. `attention_heads` divides `channels`; `None` is without attention.
    pub fn load(
        weights: &Weights<'_>,
        channels: i64,
        resnet: &ResnetConfig,
        attention_heads: Option<i64>,
    ) -> Self {
        let resnets = weights / "resnets";
        let attention = weights / "attentions" / 0;
        Self {
            resnets: [0, 1].map(|i| ResnetBlock2D::load(&(&resnets / i), channels, channels, resnet)),
            attention: attention_heads.map(|heads| {
                (
                    GroupNorm::load(&(&attention / "group_norm"), resnet.groups, channels, resnet.eps),
                    SelfAttention::load_with_bias(&attention, channels, heads),
                )
            }),
            groups: resnet.groups,
            kernels: weights.kernels().clone(),
        }
    }

    /// What its ResNets are.
    pub fn layers(&self) -> Layers<'_> {
        Layers { resnets: &self.resnets, attentions: &[] }
    }

    /// Keeps the shape of `hidden_states`. `time` is empty in the VAE.
    pub fn forward(&self, hidden_states: &FeatureMap, time: &[Tensor]) -> Result<FeatureMap, TchError> {
        let [first, second] = &self.resnets;
        let mut hidden_states = first.forward(hidden_states, time.first())?;
        if let Some((group_norm, attention)) = &self.attention {
            let (batch_size, channels, height, width) = hidden_states.tensor().size4()?;
            let sequence = group_norm.forward(&hidden_states)?.f_flatten(2, 3)?.f_transpose(1, 2)?;
            let attended = attention.forward(&sequence)?.f_transpose(1, 2)?;
            let attended = attended.f_reshape([batch_size, channels, height, width])?;
            let residual = hidden_states.into_tensor();
            hidden_states = self.kernels.add_bias_residual(residual, None, Some(&attended), self.groups)?;
        }
        second.forward(&hidden_states, time.get(1))
    }
}

/// An up block of the UNet.
#[derive(Debug)]
pub enum UpBlock {
    /// With attention to the text.
    CrossAttn(CrossAttnUpBlock2D),
    /// Without.
    Plain(UpBlock2D),
}

impl UpBlock {
    /// What its ResNets and transformers are.
    pub fn layers(&self) -> Layers<'_> {
        match self {
            Self::CrossAttn(block) => Layers { resnets: &block.resnets, attentions: &block.attentions },
            Self::Plain(block) => Layers { resnets: &block.resnets, attentions: &[] },
        }
    }

    /// ResNets of the block: how many `res_samples` it takes.
    pub fn num_resnets(&self) -> usize {
        self.layers().resnets.len()
    }

    /// The last layer alone, which makes the block's output where the block has no upsampler: on `hidden_states`, what the
    /// layer before it gave, and `res_sample`, the first of those that the down blocks pushed for this block.
    pub fn forward_last(
        &self,
        hidden_states: &Tensor,
        time: &[Tensor],
        res_sample: &Tensor,
        text: &[Vec<KeyValue>],
    ) -> Result<FeatureMap, TchError> {
        let Layers { resnets, attentions } = self.layers();
        let hidden_states = match resnets.last() {
            Some(resnet) => resnet.forward(&resnet.join(hidden_states, res_sample)?, time.last())?,
            None => Tensor::f_cat(&[hidden_states, res_sample], 1)?.into(),
        };
        match attentions.last() {
            Some(attention) => attention.forward(hidden_states, text_of(text, attentions.len() - 1)),
            None => Ok(hidden_states),
        }
    }

    /// The block's output, upsampled to `upsample_size` (height, width) or, without it, doubled. `res_samples` are
    /// those that the down blocks pushed, in that order, one for each ResNet; the last is used first. With one of them
    /// missing, the block ends before its last layer, without upsampling.
    pub fn forward(
        &self,
        hidden_states: &Tensor,
        time: &[Tensor],
        res_samples: Vec<Tensor>,
        text: &[Vec<KeyValue>],
        upsample_size: Option<[i64; 2]>,
    ) -> Result<Tensor, TchError> {
        match self {
            Self::CrossAttn(block) => block.forward(hidden_states, time, res_samples, text, upsample_size),
            Self::Plain(block) => block.forward(hidden_states, time, res_samples, upsample_size),
        }
    }
}

/// `UpBlock2D`.
#[derive(Debug)]
pub struct UpBlock2D {
    resnets: Vec<ResnetBlock2D>,
    upsampler: Option<Upsample2D>,
}

impl UpBlock2D {
    /// Takes the tensors that `config` asks for.
    pub fn load(weights: &Weights<'_>, config: &UpBlockConfig) -> Self {
        Self { resnets: config.resnets(weights), upsampler: config.upsampler(weights) }
    }

    /// See [`UpBlock::forward`].
    pub fn forward(
        &self,
        hidden_states: &Tensor,
        time: &[Tensor],
        res_samples: Vec<Tensor>,
        upsample_size: Option<[i64; 2]>,
    ) -> Result<Tensor, TchError> {
        let mut hidden_states = hidden_states.shallow_clone();
        for (i, (resnet, res_sample)) in self.resnets.iter().zip(res_samples.into_iter().rev()).enumerate() {
            let joined = resnet.join(&hidden_states, &res_sample)?;
            hidden_states = resnet.forward(&joined, time.get(i))?.into_tensor();
        }
        upsample(self.upsampler.as_ref(), hidden_states, upsample_size)
    }
}

/// `CrossAttnUpBlock2D`.
#[derive(Debug)]
pub struct CrossAttnUpBlock2D {
    resnets: Vec<ResnetBlock2D>,
    attentions: Vec<Transformer2DModel>,
    upsampler: Option<Upsample2D>,
}

impl CrossAttnUpBlock2D {
    /// Takes the tensors that the configs ask for.
    pub fn load(weights: &Weights<'_>, config: &UpBlockConfig, transformer: &Transformer2DConfig) -> Self {
        Self {
            resnets: config.resnets(weights),
            attentions: attentions(weights, config.num_layers, config.out_channels, transformer),
            upsampler: config.upsampler(weights),
        }
    }

    /// See [`UpBlock::forward`].
    pub fn forward(
        &self,
        hidden_states: &Tensor,
        time: &[Tensor],
        res_samples: Vec<Tensor>,
        text: &[Vec<KeyValue>],
        upsample_size: Option<[i64; 2]>,
    ) -> Result<Tensor, TchError> {
        let mut hidden_states = hidden_states.shallow_clone();
        let layers = self.resnets.iter().zip(&self.attentions);
        for (i, ((resnet, attention), res_sample)) in layers.zip(res_samples.into_iter().rev()).enumerate() {
            let joined = resnet.join(&hidden_states, &res_sample)?;
            let resolved = resnet.forward(&joined, time.get(i))?;
            hidden_states = attention.forward(resolved, text_of(text, i))?.into_tensor();
        }
        upsample(self.upsampler.as_ref(), hidden_states, upsample_size)
    }
}

/// The end of an up block.
fn upsample(
    upsampler: Option<&Upsample2D>,
    hidden_states: Tensor,
    upsample_size: Option<[i64; 2]>,
) -> Result<Tensor, TchError> {
    match upsampler {
        Some(upsampler) => Ok(upsampler.forward(&hidden_states, upsample_size)?.into_tensor()),
        None => Ok(hidden_states),
    }
}
