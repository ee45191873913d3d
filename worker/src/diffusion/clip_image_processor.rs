//! Prepares a picture for the safety checker as transformers' `CLIPImageProcessor` does with Pillow: bicubic resize of
//! the 8-bit pixels, centre crop, rescale, normalize.
//!
//! The resize is Pillow's own fixed-point arithmetic (`src/libImaging/Resample.c`), so that every bit is the same: two
//! passes, horizontal first, each rounding to 8 bits, with the filter widened when it shrinks a picture.

use tch::{Device, TchError, Tensor};

use super::config::ConfigFile;
use super::load_error::Fault;

/// Color channels of the pixels.
const NUM_CHANNELS: usize = 3;
/// `PIL.Image.Resampling.BICUBIC`.
const BICUBIC: i64 = 3;
/// More pixels in one direction than any model looks at; a guard against absurd configs.
const MAX_SIZE: i64 = 1 << 14;
/// Means and standard deviations of the training pictures (transformers' `OPENAI_CLIP_MEAN` and `OPENAI_CLIP_STD`).
const OPENAI_CLIP_MEAN: [f64; NUM_CHANNELS] = [0.48145466, 0.4578275, 0.40821073];
/// See [`OPENAI_CLIP_MEAN`].
const OPENAI_CLIP_STD: [f64; NUM_CHANNELS] = [0.26862954, 0.26130258, 0.27577711];

/// RGB pixels, 8 bits each, row by row.
#[derive(Debug, Clone, Copy)]
pub struct RgbPixels<'a> {
    /// `width * height * 3` bytes.
    pub bytes: &'a [u8],
    /// Pixels in a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
}

/// What a picture is resized to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Resize {
    /// Its shorter side to this, keeping its proportions.
    ShortestEdge(usize),
    /// To this height and width.
    Exact(usize, usize),
}

/// `CLIPImageProcessor`, from `feature_extractor/preprocessor_config.json`.
#[derive(Debug, Clone)]
pub struct CLIPImageProcessor {
    resize: Option<Resize>,
    crop: Option<(usize, usize)>,
    rescale_factor: f64,
    mean: [f64; NUM_CHANNELS],
    std: [f64; NUM_CHANNELS],
}

impl CLIPImageProcessor {
    /// Reads the file. Defaults are those of transformers' class.
    pub fn read(config: ConfigFile) -> Result<Self, Vec<Fault>> {
        config.only("resample", BICUBIC);
        config.only("do_convert_rgb", true);
        let resize = config.flag("do_resize", true).then(|| read_resize(&config));
        let crop = config.flag("do_center_crop", true).then(|| read_crop(&config));
        let rescale = config.flag("do_rescale", true).then(|| config.positive("rescale_factor", 1.0 / 255.0));
        let normalize = config.flag("do_normalize", true);
        let read = Self {
            resize,
            crop,
            rescale_factor: rescale.unwrap_or(1.0),
            mean: if normalize { read_channels(&config, "image_mean", OPENAI_CLIP_MEAN) } else { [0.0; 3] },
            std: if normalize { read_channels(&config, "image_std", OPENAI_CLIP_STD) } else { [1.0; 3] },
        };
        if let (Some(Resize::ShortestEdge(edge)), Some((height, width))) = (read.resize, read.crop)
            && (height > edge || width > edge)
        {
            config.fault("crop_size", format!("at most the shortest edge after the resize ({edge})"));
        }
        config.into_result(read)
    }

    /// The height and width of what [`Self::preprocess`] makes, if every picture gives the same.
    pub fn output_size(&self) -> Option<(usize, usize)> {
        match (self.crop, self.resize) {
            (Some(size), _) => Some(size),
            (None, Some(Resize::Exact(height, width))) => Some((height, width)),
            (None, _) => None,
        }
    }

    /// The `pixel_values` of one picture: f32 on the CPU, of shape `(1, 3, height, width)`.
    pub fn preprocess(&self, pixels: RgbPixels<'_>) -> Result<Tensor, TchError> {
        let (height, width) = match self.resize {
            None => (pixels.height, pixels.width),
            Some(Resize::Exact(height, width)) => (height, width),
            Some(Resize::ShortestEdge(edge)) => shortest_edge(pixels.height, pixels.width, edge),
        };
        let resized = resize_bicubic(pixels, width, height);
        let (crop_height, crop_width) = self.crop.unwrap_or((height, width));
        if crop_height > height || crop_width > width {
            return Err(TchError::Shape(format!(
                "cannot crop {crop_height}x{crop_width} out of {height}x{width}"
            )));
        }
        let (top, left) = ((height - crop_height) / 2, (width - crop_width) / 2);
        let mut values = Vec::with_capacity(NUM_CHANNELS * crop_height * crop_width);
        for channel in 0..NUM_CHANNELS {
            let (mean, std) = (self.mean[channel] as f32, self.std[channel] as f32);
            for row in top..top + crop_height {
                let start = (row * width + left) * NUM_CHANNELS + channel;
                let row = resized[start..].iter().step_by(NUM_CHANNELS).take(crop_width);
                // transformers rescales in f64 and goes on in f32.
                values.extend(row.map(|&byte| ((f64::from(byte) * self.rescale_factor) as f32 - mean) / std));
            }
        }
        let shape = [1, NUM_CHANNELS, crop_height, crop_width].map(|size| size as i64);
        Tensor::f_from_slice(&values)?.f_view(shape)?.f_to_device(Device::Cpu)
    }
}

/// `size`: an integer or `shortest_edge`, or `height` and `width`.
fn read_resize(config: &ConfigFile) -> Resize {
    let Some(section) = config.section("size") else {
        return Resize::ShortestEdge(read_edge(config, "size"));
    };
    let resize = if section.get("height").is_some() || section.get("width").is_some() {
        Resize::Exact(read_edge(&section, "height"), read_edge(&section, "width"))
    } else {
        Resize::ShortestEdge(read_edge(&section, "shortest_edge"))
    };
    config.absorb(section);
    resize
}

/// `crop_size`: an integer, or `height` and `width`.
fn read_crop(config: &ConfigFile) -> (usize, usize) {
    let Some(section) = config.section("crop_size") else {
        let size = read_edge(config, "crop_size");
        return (size, size);
    };
    let crop = (read_edge(&section, "height"), read_edge(&section, "width"));
    config.absorb(section);
    crop
}

/// A number of pixels; 224 is the default of transformers' class.
fn read_edge(config: &ConfigFile, field: &str) -> usize {
    usize::try_from(config.size(field, 224, MAX_SIZE)).expect("a size is from 1 to MAX_SIZE")
}

/// One number for each color channel.
fn read_channels(config: &ConfigFile, field: &str, default: [f64; NUM_CHANNELS]) -> [f64; NUM_CHANNELS] {
    let Some(value) = config.get(field) else { return default };
    let numbers: Option<Vec<f64>> =
        value.as_array().and_then(|items| items.iter().map(serde_json::Value::as_f64).collect());
    match numbers.map(<[f64; NUM_CHANNELS]>::try_from) {
        Some(Ok(numbers)) => numbers,
        _ => {
            config.fault(field, "a list of three numbers");
            default
        }
    }
}

/// Height and width with the shorter side at `edge` and the longer rounded down (transformers'
/// `get_resize_output_image_size`).
fn shortest_edge(height: usize, width: usize, edge: usize) -> (usize, usize) {
    let longest = |short: usize, long: usize| edge * long / short.max(1);
    if height <= width { (edge, longest(height, width)) } else { (longest(width, height), edge) }
}

/// Half the width of the bicubic filter, in pixels of the source (`bicubic_filter` in Pillow's Resample.c).
const BICUBIC_SUPPORT: f64 = 2.0;
/// The filter's only parameter (as above).
const BICUBIC_A: f64 = -0.5;
/// Fractional bits of a filter coefficient: 32 less 8 for the pixel and 2 for overshoot (`PRECISION_BITS`, as above).
const PRECISION_BITS: u32 = 32 - 8 - 2;

/// The filter's value at a distance of `x` pixels.
fn bicubic(x: f64) -> f64 {
    let x = x.abs();
    let a = BICUBIC_A;
    if x < 1.0 {
        ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * a
    } else {
        0.0
    }
}

/// For each pixel of the output: the first pixel of the source that counts, and the weights from there on, as integers
/// with [`PRECISION_BITS`] fractional bits.
fn coefficients(in_size: usize, out_size: usize) -> Vec<(usize, Vec<i32>)> {
    let scale = in_size as f64 / out_size as f64;
    let filter_scale = scale.max(1.0);
    let support = BICUBIC_SUPPORT * filter_scale;
    let coefficients_of = |out: usize| {
        let center = (out as f64 + 0.5) * scale;
        // Casting truncates and clamps at zero, as the C code does in two steps.
        let first = (center - support + 0.5) as usize;
        let end = ((center + support + 0.5) as usize).min(in_size);
        let weights: Vec<f64> =
            (first..end).map(|i| bicubic((i as f64 - center + 0.5) * (1.0 / filter_scale))).collect();
        let sum: f64 = weights.iter().sum();
        let to_fixed = |weight: f64| {
            let normalized = if sum == 0.0 { weight } else { weight / sum };
            let fixed = normalized * f64::from(1u32 << PRECISION_BITS);
            (if fixed < 0.0 { fixed - 0.5 } else { fixed + 0.5 }) as i32
        };
        (first, weights.into_iter().map(to_fixed).collect())
    };
    (0..out_size).map(coefficients_of).collect()
}

/// The weighted sum of pixels `stride` apart, rounded and clamped to 8 bits.
fn weigh(bytes: &[u8], start: usize, stride: usize, weights: &[i32]) -> u8 {
    let pixels = bytes[start..].iter().step_by(stride);
    let rounding = 1i32 << (PRECISION_BITS - 1);
    let sum = pixels.zip(weights).fold(rounding, |sum, (&byte, weight)| sum + i32::from(byte) * weight);
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

/// `PIL.Image.Image.resize((width, height), BICUBIC)` of an RGB picture.
fn resize_bicubic(pixels: RgbPixels<'_>, width: usize, height: usize) -> Vec<u8> {
    let mut bytes = pixels.bytes.to_vec();
    if width != pixels.width {
        let columns = coefficients(pixels.width, width);
        let mut resized = Vec::with_capacity(pixels.height * width * NUM_CHANNELS);
        for row in bytes.chunks_exact(pixels.width * NUM_CHANNELS) {
            for (first, weights) in &columns {
                for channel in 0..NUM_CHANNELS {
                    resized.push(weigh(row, first * NUM_CHANNELS + channel, NUM_CHANNELS, weights));
                }
            }
        }
        bytes = resized;
    }
    if height != pixels.height {
        let row_length = width * NUM_CHANNELS;
        let mut resized = Vec::with_capacity(height * row_length);
        for (first, weights) in coefficients(pixels.height, height) {
            for column in 0..row_length {
                resized.push(weigh(&bytes, first * row_length + column, row_length, &weights));
            }
        }
        bytes = resized;
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn processor(json: &str) -> Result<CLIPImageProcessor, Vec<String>> {
        let file = "feature_extractor/preprocessor_config.json";
        let config = ConfigFile::from_fields(file, serde_json::from_str(json).unwrap());
        CLIPImageProcessor::read(config).map_err(|faults| faults.iter().map(Fault::to_string).collect())
    }

    #[test]
    fn the_long_edge_is_rounded_down() {
        assert_eq!(shortest_edge(512, 768, 224), (224, 336));
        assert_eq!(shortest_edge(512, 520, 224), (224, 227));
        assert_eq!(shortest_edge(520, 512, 224), (227, 224));
        assert_eq!(shortest_edge(128, 128, 224), (224, 224));
    }

    #[test]
    fn a_plain_picture_stays_plain() {
        let bytes = [7, 100, 255].repeat(13 * 9);
        let resized = resize_bicubic(RgbPixels { bytes: &bytes, width: 13, height: 9 }, 5, 31);
        assert_eq!(resized, [7, 100, 255].repeat(5 * 31));
    }

    #[test]
    fn sizes_are_integers_or_objects() {
        let old = processor(r#"{"size": 224, "crop_size": 224, "resample": 3}"#).unwrap();
        let new = r#"{"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}"#;
        assert_eq!(old.output_size(), Some((224, 224)));
        assert_eq!(processor(new).unwrap().output_size(), Some((224, 224)));
        let faults =
            processor(r#"{"size": 32, "crop_size": 64, "image_mean": [1], "resample": 2}"#).unwrap_err();
        assert_eq!(faults.len(), 3, "{faults:#?}");
    }

    #[test]
    fn pixels_become_normalized_planes() {
        let json = r#"{"do_resize": false, "do_center_crop": false, "image_mean": [0.5, 0.5, 0.5],
                       "image_std": [0.5, 0.5, 0.5]}"#;
        let bytes = [0, 255, 51, 255, 0, 204];
        let pixels = RgbPixels { bytes: &bytes, width: 2, height: 1 };
        let values = processor(json).unwrap().preprocess(pixels).unwrap();
        assert_eq!(values.size(), [1, 3, 1, 2]);
        let values: Vec<f32> = values.flatten(0, 3).try_into().unwrap();
        for (value, expected) in values.iter().zip([-1.0, 1.0, 1.0, -1.0, -0.6, 0.6]) {
            assert!((value - expected).abs() < 1e-6, "{values:?}");
        }
    }
}
