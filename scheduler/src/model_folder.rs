//! A model's folder in the diffusers layout: what it is, which files count, and what its pictures look like when a
//! job says nothing. Reads JSON and hashes files; the weights themselves are the worker's business.
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use schema::limits::{MAX_SIDE, MIN_SIDE, SIDE_STEP};
use schema::{ModelComponent, NoiseScheduler, Sha256Digest};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// Components with weights. The safety checker may be absent.
const WEIGHTED: [&str; 4] = ["text_encoder", "unet", "vae", "safety_checker"];
/// Components that every Stable Diffusion v1 has.
const REQUIRED: [&str; 5] = ["text_encoder", "tokenizer", "unet", "vae", "scheduler"];
/// Components that may be absent, or `[null, null]` in the index.
const OPTIONAL: [&str; 2] = ["safety_checker", "feature_extractor"];
/// Files that a worker reads. Pickles (`.bin`, `.ckpt`) are programs, so they are neither read nor registered.
const READ: [&str; 3] = ["safetensors", "json", "txt"];
/// Licence texts are looked for under these names.
const LICENCE_NAMES: [&str; 6] =
    ["LICENSE", "LICENCE", "LICENSE.md", "LICENCE.md", "LICENSE.txt", "LICENCE.txt"];

/// What diffusers' scheduler classes are called here.
const NOISE_SCHEDULERS: [(&str, NoiseScheduler); 7] = [
    ("PNDMScheduler", NoiseScheduler::Pndm),
    ("DDIMScheduler", NoiseScheduler::Ddim),
    ("EulerDiscreteScheduler", NoiseScheduler::Euler),
    ("EulerAncestralDiscreteScheduler", NoiseScheduler::EulerA),
    ("DPMSolverMultistepScheduler", NoiseScheduler::Dpmpp2m),
    ("UniPCMultistepScheduler", NoiseScheduler::Unipc),
    ("LMSDiscreteScheduler", NoiseScheduler::Lms),
];

/// A model's folder that looks complete.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelFolder {
    /// Absolute, symbolic links resolved.
    pub folder: PathBuf,
    /// Paths below it of the files that count, sorted, with their sizes in bytes.
    pub files: Vec<(String, u64)>,
    /// Width of a picture when a job says nothing, in pixels.
    pub default_width: u32,
    /// Height of a picture when a job says nothing, in pixels.
    pub default_height: u32,
    /// Noise scheduler when a job says nothing.
    pub default_noise_scheduler: NoiseScheduler,
    /// Whether there is a safety checker.
    pub has_safety_checker: bool,
}

impl ModelFolder {
    /// Reads the folder's JSON files and lists what counts.
    ///
    /// # Errors
    /// If it is not a Stable Diffusion v1 pipeline in the diffusers layout, or something of it is missing.
    pub fn read(folder: &Path) -> Result<Self> {
        let folder =
            folder.canonicalize().with_context(|| format!("there is no folder {}", folder.display()))?;
        let index = json(&folder.join("model_index.json")).context(
            "this is not a model in the diffusers layout, which has a model_index.json beside the folders unet, vae, \
             text_encoder, tokenizer and scheduler",
        )?;
        let class = class_name(&index).unwrap_or_default();
        ensure!(
            class == "StableDiffusionPipeline",
            "the model's pipeline has to be StableDiffusionPipeline (Stable Diffusion v1), but model_index.json says {class:?}"
        );
        let present = |name: &&str| {
            index.get(*name).is_none_or(|entry| !is_null_entry(entry)) && folder.join(name).is_dir()
        };
        for name in REQUIRED {
            ensure!(present(&name), "the model has no {name}: {} is not there", folder.join(name).display());
        }
        let components: Vec<&str> =
            REQUIRED.into_iter().chain(OPTIONAL.into_iter().filter(present)).collect();
        let files = files(&folder, &components)?;
        for name in WEIGHTED.into_iter().filter(|name| components.contains(name)) {
            let prefix = format!("{name}/");
            let has_weights =
                files.iter().any(|(path, _)| path.starts_with(&prefix) && path.ends_with(".safetensors"));
            ensure!(
                has_weights,
                "{} has no .safetensors file\nhint: pickled weights (.bin, .ckpt) are not read; convert them with diffusers' \
                 `save_pretrained(..., safe_serialization=True)`",
                folder.join(name).display()
            );
        }
        let (default_width, default_height) = default_size(&folder)?;
        Ok(Self {
            default_noise_scheduler: noise_scheduler(&folder.join("scheduler/scheduler_config.json"))?,
            has_safety_checker: components.contains(&"safety_checker"),
            folder,
            files,
            default_width,
            default_height,
        })
    }

    /// Bytes in all files.
    pub fn size_bytes(&self) -> u64 {
        self.files.iter().map(|(_, size_bytes)| size_bytes).sum()
    }

    /// Hashes every file; takes as long as the disk does. Tells `progress` of each few bytes.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn hash(&self, mut progress: impl FnMut(u64)) -> Result<Vec<ModelComponent>> {
        let mut buffer = vec![0; 1 << 20];
        let hash = |(path, size_bytes): &(String, u64)| {
            let full = self.folder.join(path);
            let context = || format!("cannot read {}", full.display());
            let mut file = File::open(&full).with_context(context)?;
            let mut hasher = Sha256::new();
            loop {
                let read = file.read(&mut buffer).with_context(context)?;
                if read == 0 {
                    break;
                }
                hasher.update(&buffer[..read]);
                progress(read as u64);
            }
            let digest: [u8; 32] = hasher.finalize().into();
            Ok(ModelComponent {
                path: path.clone(),
                sha256: Sha256Digest::from(digest),
                size_bytes: *size_bytes,
            })
        };
        self.files.iter().map(hash).collect()
    }
}

/// The licence text in `file`, or in a file of the usual name in `folder`; and what to call it: its first line.
///
/// # Errors
/// If there is none, or it is not text.
pub fn licence(file: Option<&Path>, folder: &Path) -> Result<(String, String)> {
    let usual = || LICENCE_NAMES.iter().map(|name| folder.join(name)).find(|path| path.is_file());
    let Some(file) = file.map(Path::to_owned).or_else(usual) else {
        bail!(
            "the model's folder {} holds no licence text\nhint: name one by --licence FILE; nobody can use a model \
             without accepting its licence",
            folder.display()
        )
    };
    let bytes = fs::read(&file).with_context(|| format!("cannot read the licence {}", file.display()))?;
    let text = String::from_utf8(bytes).ok().filter(|text| !text.contains('\0'));
    let text = text.with_context(|| format!("the licence {} has to be UTF-8 text", file.display()))?;
    let name = text
        .lines()
        .map(|line| line.trim_matches(['#', '*', ' ', '\t', '\u{feff}']))
        .find(|line| !line.is_empty());
    let name = name.with_context(|| format!("the licence {} is empty", file.display()))?;
    Ok((name.chars().take(100).collect(), text))
}

/// The files that count below `folder`: the index, and the components' own, not those of folders further down.
fn files(folder: &Path, components: &[&str]) -> Result<Vec<(String, u64)>> {
    let mut files =
        vec![("model_index.json".to_owned(), fs::metadata(folder.join("model_index.json"))?.len())];
    for component in components {
        let context = || format!("cannot list {}", folder.join(component).display());
        for entry in fs::read_dir(folder.join(component)).with_context(context)? {
            let path = entry.with_context(context)?.path();
            let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
            // Follows symbolic links, which is what the cache of huggingface_hub consists of.
            let metadata = fs::metadata(&path).with_context(|| format!("cannot read {}", path.display()))?;
            let name = path.file_name().and_then(|name| name.to_str());
            if let Some(name) = name.filter(|_| metadata.is_file() && READ.contains(&extension)) {
                files.push((format!("{component}/{name}"), metadata.len()));
            }
        }
    }
    files.sort();
    Ok(files)
}

/// Width and height as diffusers derives them: the U-Net's `sample_size` in latent cells times the pixels of a cell.
fn default_size(folder: &Path) -> Result<(u32, u32)> {
    let path = folder.join("unet/config.json");
    let unet = json(&path)?;
    let sample_size =
        unet.get("sample_size").with_context(|| format!("{} has no sample_size", path.display()))?;
    let cells = match sample_size {
        Value::Number(side) => side.as_u64().map(|side| {
            let side = if is_before_0_9(&unet) && side < 64 { 64 } else { side };
            (side, side)
        }),
        Value::Array(sides) => match sides.as_slice() {
            // Height comes first, as in all of torch.
            [height, width] => width.as_u64().zip(height.as_u64()),
            _ => None,
        },
        _ => None,
    };
    let cells = cells.with_context(|| {
        format!("sample_size in {} has to be one or two whole numbers, but is {sample_size}", path.display())
    })?;
    let path = folder.join("vae/config.json");
    let blocks = json(&path)?.get("block_out_channels").and_then(Value::as_array).map(Vec::len);
    let blocks = blocks.filter(|blocks| (1..=8).contains(blocks));
    let blocks =
        blocks.with_context(|| format!("{} has no list of 1 to 8 block_out_channels", path.display()))?;
    let vae_scale_factor = 1 << (blocks - 1);
    let pixels = |cells: u64| {
        let side =
            cells.checked_mul(vae_scale_factor).and_then(|side| u32::try_from(side).ok()).unwrap_or(u32::MAX);
        let allowed = (MIN_SIDE..=MAX_SIDE).contains(&side) && side.is_multiple_of(SIDE_STEP);
        ensure!(
            allowed,
            "the model's own size has to be a multiple of {SIDE_STEP}, from {MIN_SIDE} to {MAX_SIDE}, but is {side} \
             (sample_size {cells} × {vae_scale_factor})"
        );
        Ok(side)
    };
    Ok((pixels(cells.0)?, pixels(cells.1)?))
}

/// Early configurations say 32 and mean 64; diffusers corrects those written before its version 0.9.0
/// (`StableDiffusionPipeline.__init__`).
fn is_before_0_9(config: &Value) -> bool {
    let version = config.get("_diffusers_version").and_then(Value::as_str);
    let Some((major, rest)) = version.and_then(|version| version.split_once('.')) else { return false };
    let minor: String = rest.chars().take_while(char::is_ascii_digit).collect();
    major == "0" && minor.parse::<u32>().is_ok_and(|minor| minor < 9)
}

fn noise_scheduler(path: &Path) -> Result<NoiseScheduler> {
    let config = json(path)?;
    let class = class_name(&config).unwrap_or_default();
    let known = NOISE_SCHEDULERS.iter().find(|(name, _)| *name == class);
    let (_, noise_scheduler) = known.with_context(|| {
        let names: Vec<_> = NOISE_SCHEDULERS.iter().map(|(name, _)| *name).collect();
        format!(
            "the model's noise scheduler has to be one of {}, but {} says {class:?}",
            names.join(", "),
            path.display()
        )
    })?;
    let karras = config.get("use_karras_sigmas").and_then(Value::as_bool).unwrap_or(false);
    Ok(match noise_scheduler {
        NoiseScheduler::Dpmpp2m if karras => NoiseScheduler::Dpmpp2mKarras,
        other => *other,
    })
}

/// `_class_name` without the `Flax` that some revisions of the v1 models were saved with.
fn class_name(config: &Value) -> Option<&str> {
    let name = config.get("_class_name")?.as_str()?;
    Some(name.strip_prefix("Flax").unwrap_or(name))
}

/// A component that is switched off: `[null, null]`.
fn is_null_entry(entry: &Value) -> bool {
    entry.is_null() || entry.as_array().is_some_and(|entry| entry.iter().all(Value::is_null))
}

fn json(path: &Path) -> Result<Value> {
    let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{} is not JSON", path.display()))
}

#[cfg(test)]
mod tests;
