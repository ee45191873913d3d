//! `unet/config.json`: every setting of diffusers' `UNet2DConditionModel`, those of v1 read, the others refused.

use super::super::config::ConfigFile;
use super::super::load_error::Fault;

/// More channels, layers or blocks than any checkpoint has; guards against absurd configs.
const MAX_CHANNELS: i64 = 1 << 20;
/// See [`MAX_CHANNELS`].
const MAX_LAYERS: i64 = 64;
/// See [`MAX_CHANNELS`].
const MAX_BLOCKS: usize = 16;
/// v1's release of diffusers whose configs give half the true `sample_size`: all before this one (major, minor).
const FIRST_VERSION_WITH_TRUE_SAMPLE_SIZE: (u64, u64) = (0, 9);
/// The `sample_size` that those configs mean (diffusers' `StableDiffusionPipeline.__init__`).
const TRUE_SAMPLE_SIZE: i64 = 64;

/// Whether a block attends to the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockType {
    /// `CrossAttnDownBlock2D`, `CrossAttnUpBlock2D`.
    CrossAttn,
    /// `DownBlock2D`, `UpBlock2D`.
    Plain,
}

impl BlockType {
    fn parse_down(name: &str) -> Option<Self> {
        match name {
            "CrossAttnDownBlock2D" => Some(Self::CrossAttn),
            "DownBlock2D" => Some(Self::Plain),
            _ => None,
        }
    }

    fn parse_up(name: &str) -> Option<Self> {
        match name {
            "CrossAttnUpBlock2D" => Some(Self::CrossAttn),
            "UpBlock2D" => Some(Self::Plain),
            _ => None,
        }
    }
}

/// `unet/config.json`. The lists have one entry for each down block, widest resolution first.
#[derive(Debug, Clone)]
pub struct UNet2DConditionConfig {
    /// Default height and width of the latents.
    pub sample_size: (i64, i64),
    /// Channels of the input.
    pub in_channels: i64,
    /// Channels of the output.
    pub out_channels: i64,
    /// Whether the input is stretched from 0..1 to -1..1 first.
    pub center_input_sample: bool,
    /// Order of the sinusoids.
    pub flip_sin_to_cos: bool,
    /// Shift in the sinusoids' frequencies.
    pub freq_shift: f64,
    /// Down blocks.
    pub down_block_types: Vec<BlockType>,
    /// Up blocks, narrowest resolution first.
    pub up_block_types: Vec<BlockType>,
    /// Channels.
    pub block_out_channels: Vec<i64>,
    /// ResNets in a down block; an up block has one more.
    pub layers_per_block: Vec<i64>,
    /// What the mid block's ResNets are divided by.
    pub mid_block_scale_factor: f64,
    /// Groups of all GroupNorms.
    pub norm_num_groups: i64,
    /// Epsilon of the ResNets' GroupNorms.
    pub norm_eps: f64,
    /// Channels of the text embedding.
    pub cross_attention_dim: Vec<i64>,
    /// Transformer blocks in each transformer.
    pub transformer_layers_per_block: Vec<i64>,
    /// Attention heads, read from `attention_head_dim`: diffusers' naming mistake, kept in every v1 checkpoint.
    pub num_attention_heads: Vec<i64>,
    /// Whether the transformers' projections are linear layers.
    pub use_linear_projection: bool,
    /// Channels of the time embedding.
    pub time_embed_dim: i64,
}

impl UNet2DConditionConfig {
    /// Reads the file. Defaults are those of diffusers' class.
    pub fn read(config: ConfigFile) -> Result<Self, Vec<Fault>> {
        refuse_what_v1_does_not_use(&config);
        let block_out_channels = config.sizes("block_out_channels", &[320, 640, 1280, 1280], MAX_CHANNELS);
        let num_blocks = block_out_channels.len();
        if num_blocks > MAX_BLOCKS {
            config.fault("block_out_channels", format!("a list of at most {MAX_BLOCKS} integers"));
        }
        let per_block = |field, default, max| config.size_per_block(field, default, max, num_blocks);
        let time_embed_dim = config.size("time_embedding_dim", block_out_channels[0] * 4, MAX_CHANNELS);
        let read = Self {
            sample_size: sample_size(&config),
            in_channels: config.size("in_channels", 4, MAX_CHANNELS),
            out_channels: config.size("out_channels", 4, MAX_CHANNELS),
            center_input_sample: config.flag("center_input_sample", false),
            flip_sin_to_cos: config.flag("flip_sin_to_cos", true),
            freq_shift: config.number("freq_shift", 0.0),
            down_block_types: config.choices(
                "down_block_types",
                &[BlockType::CrossAttn, BlockType::CrossAttn, BlockType::CrossAttn, BlockType::Plain],
                "\"CrossAttnDownBlock2D\" or \"DownBlock2D\"",
                BlockType::parse_down,
            ),
            up_block_types: config.choices(
                "up_block_types",
                &[BlockType::Plain, BlockType::CrossAttn, BlockType::CrossAttn, BlockType::CrossAttn],
                "\"CrossAttnUpBlock2D\" or \"UpBlock2D\"",
                BlockType::parse_up,
            ),
            layers_per_block: per_block("layers_per_block", 2, MAX_LAYERS),
            mid_block_scale_factor: config.positive("mid_block_scale_factor", 1.0),
            norm_num_groups: config.size("norm_num_groups", 32, MAX_CHANNELS),
            norm_eps: config.positive("norm_eps", 1e-5),
            cross_attention_dim: per_block("cross_attention_dim", 1280, MAX_CHANNELS),
            transformer_layers_per_block: per_block("transformer_layers_per_block", 1, MAX_LAYERS),
            num_attention_heads: per_block("attention_head_dim", 8, MAX_CHANNELS),
            use_linear_projection: config.flag("use_linear_projection", false),
            time_embed_dim,
            block_out_channels,
        };
        read.check(&config);
        config.into_result(read)
    }

    /// Whether any block at this resolution attends to the text; the narrowest has the mid block.
    fn has_attention(&self, level: usize) -> bool {
        let up_level = self.block_out_channels.len() - 1 - level;
        up_level == 0
            || self.down_block_types.get(level) == Some(&BlockType::CrossAttn)
            || self.up_block_types.get(up_level) == Some(&BlockType::CrossAttn)
    }

    /// The rules between fields.
    fn check(&self, config: &ConfigFile) {
        let num_blocks = self.block_out_channels.len();
        for (field, len) in
            [("down_block_types", self.down_block_types.len()), ("up_block_types", self.up_block_types.len())]
        {
            if len != num_blocks {
                config.fault(field, format!("a list of {num_blocks}, as `block_out_channels` is"));
            }
        }
        if self.block_out_channels.iter().any(|channels| channels % self.norm_num_groups != 0) {
            let channels = &self.block_out_channels;
            config.fault(
                "norm_num_groups",
                format!("a divisor of each of `block_out_channels` ({channels:?})"),
            );
        }
        let divides = |level: usize| self.block_out_channels[level] % self.num_attention_heads[level] == 0;
        if !(0..num_blocks).filter(|&level| self.has_attention(level)).all(divides) {
            let channels = &self.block_out_channels;
            config.fault(
                "attention_head_dim",
                format!("heads that divide `block_out_channels` ({channels:?})"),
            );
        }
        let half = self.block_out_channels[0] / 2;
        if self.block_out_channels[0] % 2 != 0 {
            config.fault("block_out_channels", "a list that begins with an even number");
        } else if self.freq_shift >= half as f64 {
            config
                .fault("freq_shift", format!("less than half of the first of `block_out_channels` ({half})"));
        }
    }
}

/// Refuses the settings of later model families, whose weights would otherwise be misread.
fn refuse_what_v1_does_not_use(config: &ConfigFile) {
    config.only("mid_block_type", "UNetMidBlock2DCrossAttn");
    config.only("only_cross_attention", false);
    config.only("mid_block_only_cross_attention", false);
    config.only("downsample_padding", 1);
    config.only("act_fn", "silu");
    config.only("dual_cross_attention", false);
    config.only("resnet_time_scale_shift", "default");
    config.only("resnet_skip_time_act", false);
    config.only("resnet_out_scale_factor", 1.0);
    config.only("time_embedding_type", "positional");
    config.only("conv_in_kernel", 3);
    config.only("conv_out_kernel", 3);
    config.only("attention_type", "default");
    config.only("class_embeddings_concat", false);
    for field in [
        "reverse_transformer_layers_per_block",
        "encoder_hid_dim",
        "encoder_hid_dim_type",
        "num_attention_heads",
        "class_embed_type",
        "addition_embed_type",
        "addition_time_embed_dim",
        "num_class_embeds",
        "time_embedding_act_fn",
        "timestep_post_act",
        "time_cond_proj_dim",
        "projection_class_embeddings_input_dim",
        "cross_attention_norm",
    ] {
        config.absent(field);
    }
}

/// `sample_size` as (height, width): an integer, or a pair. Configs from before diffusers 0.9 say 32 and mean 64.
fn sample_size(config: &ConfigFile) -> (i64, i64) {
    if config.get("sample_size").is_some_and(serde_json::Value::is_array) {
        let pair = config.size_per_block("sample_size", TRUE_SAMPLE_SIZE, MAX_CHANNELS, 2);
        return (pair[0], pair[1]);
    }
    let size = config.size("sample_size", TRUE_SAMPLE_SIZE, MAX_CHANNELS);
    let version = config.get("_diffusers_version").and_then(|version| version.as_str()).and_then(major_minor);
    let is_old = version.is_some_and(|version| version < FIRST_VERSION_WITH_TRUE_SAMPLE_SIZE);
    let size = if is_old && size < TRUE_SAMPLE_SIZE { TRUE_SAMPLE_SIZE } else { size };
    (size, size)
}

/// The first two numbers of a version such as `0.6.0.dev0`.
fn major_minor(version: &str) -> Option<(u64, u64)> {
    let mut parts = version.split('.').map(|part| part.parse().ok());
    Some((parts.next()??, parts.next()??))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<UNet2DConditionConfig, Vec<String>> {
        let config = ConfigFile::from_fields("unet/config.json", serde_json::from_str(json).unwrap());
        UNet2DConditionConfig::read(config).map_err(|faults| faults.iter().map(Fault::to_string).collect())
    }

    #[test]
    fn a_sample_size_below_64_is_rewritten_for_old_configs_only() {
        for (json, expected) in [
            (r#"{"sample_size": 32, "_diffusers_version": "0.6.0"}"#, (64, 64)),
            (r#"{"sample_size": 32, "_diffusers_version": "0.9.0"}"#, (32, 32)),
            (r#"{"sample_size": 16, "_diffusers_version": "0.42.1"}"#, (16, 16)),
            (r#"{"sample_size": 32}"#, (32, 32)),
            (r#"{"sample_size": 96, "_diffusers_version": "0.6.0"}"#, (96, 96)),
            (r#"{"sample_size": [32, 48], "_diffusers_version": "0.6.0"}"#, (32, 48)),
        ] {
            assert_eq!(read(json).unwrap().sample_size, expected, "{json}");
        }
    }

    #[test]
    fn absurd_and_foreign_configs_are_refused_in_full() {
        let faults = read(
            r#"{"block_out_channels": [320, 640], "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
                "up_block_types": ["UpBlock2D"], "attention_head_dim": [7, 8], "norm_num_groups": 33,
                "layers_per_block": 1000000000, "addition_embed_type": "text_time"}"#,
        )
        .unwrap_err();
        for field in [
            "addition_embed_type",
            "down_block_types",
            "layers_per_block",
            "up_block_types",
            "norm_num_groups",
            "attention_head_dim",
        ] {
            let named = format!("`{field}` must be");
            assert!(faults.iter().any(|fault| fault.contains(&named)), "{field} is not in {faults:#?}");
        }
    }
}
