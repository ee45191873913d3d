//! Reads a checkpoint's folder in the layout of diffusers' `save_pretrained`.

use std::cell::{Cell, RefCell};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use serde_json::Value;
use tch::TchError;

use super::super::clip_image_processor::CLIPImageProcessor;
use super::super::clip_tokenizer::CLIPTokenizer;
use super::super::config::{ConfigFile, read_text};
use super::super::convolution::ConvolutionEngines;
use super::super::device::{ComputeDevice, ComputeDtype};
use super::super::drawn_weights::{DrawnTensor, DrawnWeights};
use super::super::kernels::{KernelChoice, Kernels};
use super::super::load_error::{Fault, LoadError};
use super::super::models::autoencoder_kl::{AutoencoderKL, AutoencoderKLConfig};
use super::super::models::clip_text_model::{CLIPTextConfig, CLIPTextModel};
use super::super::models::unet_2d_condition::UNet2DConditionModel;
use super::super::models::unet_2d_config::UNet2DConditionConfig;
use super::super::safety_checker::{SafetyCheckerConfig, StableDiffusionSafetyChecker};
use super::super::schedulers::SchedulerConfig;
use super::super::weights::{WeightFile, Weights};
use super::{Batching, Finisher, StableDiffusionPipeline};

/// Where and in which precision to compute.
#[derive(Debug, Clone, PartialEq)]
pub struct LoadOptions {
    /// The device.
    pub device: ComputeDevice,
    /// The precision of weights and activations.
    pub dtype: ComputeDtype,
    /// What a GPU computes with.
    pub kernels: KernelChoice,
    /// Engines for the convolutions of a GPU in 16 bits; an error on a GPU that they are not for. Without a meaning on the CPU.
    pub convolutions: Option<Arc<ConvolutionEngines>>,
}

/// Base name of the weights that diffusers saves (`SAFETENSORS_WEIGHTS_NAME` there).
const DIFFUSERS_STEM: &str = "diffusion_pytorch_model";
/// Base name of the weights that transformers saves.
const TRANSFORMERS_STEM: &str = "model";
/// The file that lists the components.
const MODEL_INDEX: &str = "model_index.json";
/// Pixels are red, green and blue.
const NUM_COLOR_CHANNELS: i64 = 3;

/// A component's entry in `model_index.json`: its name, the classes that we can stand in for, and whether a checkpoint
/// may do without.
const COMPONENTS: [(&str, &[&str], bool); 7] = [
    ("tokenizer", &["CLIPTokenizer", "CLIPTokenizerFast"], true),
    ("text_encoder", &["CLIPTextModel"], true),
    ("unet", &["UNet2DConditionModel"], true),
    ("vae", &["AutoencoderKL"], true),
    ("scheduler", &[], true),
    ("safety_checker", &["StableDiffusionSafetyChecker"], false),
    (
        "feature_extractor",
        &["CLIPImageProcessor", "CLIPFeatureExtractor", "CLIPImageProcessorFast", "CLIPImageProcessorPil"],
        false,
    ),
];

/// Where the weights come from.
#[derive(Debug, Clone, Copy)]
enum WeightSource {
    /// The checkpoint's files.
    Files,
    /// This seed.
    Drawn(u64),
}

/// What was drawn for one component.
struct DrawnComponent {
    component: &'static str,
    stem: &'static str,
    tensors: Vec<DrawnTensor>,
}

/// A checkpoint being read, with the faults found so far.
struct Loading<'d> {
    directory: &'d Path,
    options: LoadOptions,
    source: WeightSource,
    /// Kernels that are open already.
    given_kernels: Option<Kernels>,
    /// What the layers will compute with; libtorch's own operations until the device is open.
    kernels: Kernels,
    /// The tensors of each component, if they are drawn.
    drawn: Vec<DrawnComponent>,
    faults: Vec<Fault>,
}

impl StableDiffusionPipeline {
    /// Loads the checkpoint in `directory`. The error lists everything that is wrong with it.
    ///
    /// For a GPU, `options.device.open()` must have been the process's first use of libtorch; it is repeated here.
    pub fn from_pretrained(directory: &Path, options: &LoadOptions) -> Result<Self, LoadError> {
        Loading::new(directory, options.clone(), WeightSource::Files).run().map(|(pipeline, _)| pipeline)
    }

    /// As [`Self::from_pretrained`], computing with these kernels, whatever `options` say: so a GPU's way through the models can be
    /// gone on a CPU.
    pub fn from_pretrained_with_kernels(
        directory: &Path,
        options: &LoadOptions,
        kernels: Kernels,
    ) -> Result<Self, LoadError> {
        let loading = Loading::new(directory, options.clone(), WeightSource::Files);
        Loading { given_kernels: Some(kernels), ..loading }.run().map(|(pipeline, _)| pipeline)
    }

    /// As [`Self::with_drawn_weights`] and [`Self::from_pretrained_with_kernels`].
    pub fn with_drawn_weights_and_kernels(
        directory: &Path,
        options: &LoadOptions,
        seed: u64,
        kernels: Kernels,
    ) -> Result<Self, LoadError> {
        let loading = Loading::new(directory, options.clone(), WeightSource::Drawn(seed));
        Loading { given_kernels: Some(kernels), ..loading }.run().map(|(pipeline, _)| pipeline)
    }

    /// As [`Self::from_pretrained`] of a checkpoint whose JSON and tokenizer are in `directory` and whose weights are
    /// drawn from `seed` (see [`super::super::drawn_weights`]).
    pub fn with_drawn_weights(directory: &Path, options: &LoadOptions, seed: u64) -> Result<Self, LoadError> {
        Loading::new(directory, options.clone(), WeightSource::Drawn(seed))
            .run()
            .map(|(pipeline, _)| pipeline)
    }

    /// Writes the weights of [`Self::with_drawn_weights`] into `directory`, in f32, so that it becomes a checkpoint that
    /// every program can read. The VAE has its decoder only. The model is built once, on the CPU, to learn its names.
    pub fn save_drawn_weights(directory: &Path, seed: u64) -> Result<(), LoadError> {
        let options = LoadOptions {
            device: ComputeDevice::Cpu,
            dtype: ComputeDtype::F32,
            kernels: KernelChoice::Plain,
            convolutions: None,
        };
        let (_, drawn) = Loading::new(directory, options, WeightSource::Drawn(seed)).run()?;
        for DrawnComponent { component, stem, tensors } in drawn {
            let file = format!("{component}/{stem}.safetensors");
            DrawnWeights::new(component, seed).save(&tensors, &directory.join(&file)).map_err(|error| {
                let faults = vec![Fault::Safetensors { file, reason: error.to_string() }];
                LoadError { directory: directory.to_owned(), faults }
            })?;
        }
        Ok(())
    }
}

impl<'d> Loading<'d> {
    fn new(directory: &'d Path, options: LoadOptions, source: WeightSource) -> Self {
        let kernels = Kernels::plain(false);
        let (drawn, faults) = (Vec::new(), Vec::new());
        Self { directory, options, source, given_kernels: None, kernels, drawn, faults }
    }

    /// The pipeline, and what was drawn for it.
    fn run(mut self) -> Result<(StableDiffusionPipeline, Vec<DrawnComponent>), LoadError> {
        let failed = |faults| LoadError { directory: self.directory.to_owned(), faults };
        self.options.device.open().map_err(|error| failed(vec![error.into()]))?;
        let start = Instant::now();
        let _no_grad = tch::no_grad_guard();
        let LoadOptions { device, dtype, kernels, ref convolutions } = self.options;
        self.kernels = match self.given_kernels.take() {
            Some(kernels) => kernels,
            None => Kernels::open(kernels, device, dtype)
                .with_engines(device, dtype, convolutions.as_deref())
                .map_err(failed)?,
        };
        let pipeline = self.load();
        match pipeline {
            Some(pipeline) if self.faults.is_empty() => {
                let (checkpoint, seconds) = (self.directory.display(), start.elapsed().as_secs_f64());
                tracing::info!(%checkpoint, %device, %dtype, seconds, "Loaded the checkpoint");
                Ok((pipeline, self.drawn))
            }
            _ => Err(LoadError { directory: self.directory.to_owned(), faults: self.faults }),
        }
    }

    /// The pipeline, if every component could be made; there may be faults even so.
    fn load(&mut self) -> Option<StableDiffusionPipeline> {
        let has_safety_checker = self.read_model_index()?;
        let tokenizer = match CLIPTokenizer::from_pretrained(self.directory, "tokenizer") {
            Ok(tokenizer) => Some(tokenizer),
            Err(faults) => self.note(faults),
        };
        let text_config = self.config("text_encoder/config.json", CLIPTextConfig::read);
        let unet_config = self.config("unet/config.json", UNet2DConditionConfig::read);
        let vae_config = self.config("vae/config.json", AutoencoderKLConfig::read);
        let scheduler_config = self.scheduler_config();
        let safety = has_safety_checker.then(|| self.safety());
        if let (Some(text), Some(unet), Some(vae)) = (&text_config, &unet_config, &vae_config) {
            self.check_fit(tokenizer.as_ref(), text, unet, vae);
        }

        let text_encoder = self.model(
            "text_encoder",
            TRANSFORMERS_STEM,
            CLIPTextModel::rename_key,
            text_config.as_ref(),
            |weights, config| Ok(CLIPTextModel::load(weights, config)),
        );
        let any_key = |key: &str| Some(key.to_owned());
        let unet =
            self.model("unet", DIFFUSERS_STEM, any_key, unet_config.as_ref(), UNet2DConditionModel::load);
        let vae = self.model(
            "vae",
            DIFFUSERS_STEM,
            AutoencoderKL::rename_key,
            vae_config.as_ref(),
            |weights, config| Ok(AutoencoderKL::load(weights, config)),
        );
        let (unet_config, vae_config) = (unet_config?, vae_config?);
        Some(StableDiffusionPipeline {
            tokenizer: tokenizer?,
            text_encoder: text_encoder?,
            unet: unet?,
            finisher: Arc::new(Finisher::new(
                vae?,
                match safety {
                    Some(safety) => Some(safety?),
                    None => None,
                },
                self.options.clone(),
            )),
            last_negative: RefCell::default(),
            batching: Cell::new(Batching::of(self.options.device)),
            buffers: RefCell::default(),
            scheduler_config: scheduler_config?,
            sample_size: unet_config.sample_size,
            latent_channels: vae_config.latent_channels,
            vae_scale_factor: vae_config.vae_scale_factor(),
            options: self.options.clone(),
            kernels: self.kernels.clone(),
        })
    }

    /// Records faults in place of a component.
    fn note<T>(&mut self, faults: Vec<Fault>) -> Option<T> {
        self.faults.extend(faults);
        None
    }

    /// Checks the classes in `model_index.json`; whether there is a safety checker. `None` if the file cannot be read:
    /// then this is no checkpoint, and listing everything else that it lacks would not help.
    fn read_model_index(&mut self) -> Option<bool> {
        let index = match ConfigFile::read(self.directory, MODEL_INDEX) {
            Ok(index) => index,
            Err(fault) => return self.note(vec![fault]),
        };
        let class = index.get("_class_name").and_then(Value::as_str).map(strip_flax);
        if class.is_some_and(|class| class != "StableDiffusionPipeline") {
            index.fault("_class_name", "\"StableDiffusionPipeline\"");
        }
        for (name, classes, required) in COMPONENTS {
            match component_class(&index, name) {
                None if required => {
                    index.fault(name, format!("a [library, class] pair with {}", list(classes)))
                }
                Some(class) if !classes.is_empty() && !classes.contains(&class) => {
                    index.fault(name, format!("a [library, class] pair with {}", list(classes)));
                }
                _ => {}
            }
        }
        let has_safety_checker = component_class(&index, "safety_checker").is_some();
        if has_safety_checker && component_class(&index, "feature_extractor").is_none() {
            index.fault("feature_extractor", "given where `safety_checker` is");
        }
        if !has_safety_checker {
            tracing::warn!(
                checkpoint = %self.directory.display(),
                "The checkpoint has no safety checker: its pictures get no verdict"
            );
        }
        match index.into_result(has_safety_checker) {
            Ok(has_safety_checker) => Some(has_safety_checker),
            Err(faults) => self.note(faults),
        }
    }

    /// A component's config.
    fn config<C>(&mut self, file: &str, read: fn(ConfigFile) -> Result<C, Vec<Fault>>) -> Option<C> {
        let config = ConfigFile::read(self.directory, file).map_err(|fault| vec![fault]).and_then(read);
        match config {
            Ok(config) => Some(config),
            Err(faults) => self.note(faults),
        }
    }

    fn scheduler_config(&mut self) -> Option<SchedulerConfig> {
        let file = "scheduler/scheduler_config.json".to_owned();
        let config = read_text(self.directory, &file).and_then(|text| {
            SchedulerConfig::from_json(&text)
                .map_err(|error| Fault::Scheduler { file, reason: with_causes(&error) })
        });
        match config {
            Ok(config) => Some(config),
            Err(fault) => self.note(vec![fault]),
        }
    }

    /// The safety checker and what prepares pictures for it.
    fn safety(&mut self) -> Option<(CLIPImageProcessor, StableDiffusionSafetyChecker)> {
        let file = "feature_extractor/preprocessor_config.json";
        let feature_extractor = self.config(file, CLIPImageProcessor::read);
        let config = self.config("safety_checker/config.json", SafetyCheckerConfig::read);
        if let (Some(feature_extractor), Some(config)) = (&feature_extractor, &config) {
            let image_size = config.vision.image_size;
            let size = usize::try_from(image_size).unwrap_or_default();
            if feature_extractor.output_size() != Some((size, size)) {
                let found = feature_extractor.output_size();
                let found = found.map_or("absent".to_owned(), |(height, width)| format!("{height}x{width}"));
                self.misfit(
                    file,
                    "crop_size",
                    format!("the safety checker's image_size, {image_size},"),
                    found,
                );
            }
            if config.vision.num_channels != NUM_COLOR_CHANNELS {
                let (rule, found) = (NUM_COLOR_CHANNELS.to_string(), config.vision.num_channels);
                self.misfit("safety_checker/config.json", "vision_config.num_channels", rule, found);
            }
        }
        let safety_checker = self.model(
            "safety_checker",
            TRANSFORMERS_STEM,
            StableDiffusionSafetyChecker::rename_key,
            config.as_ref(),
            |weights, config| Ok(StableDiffusionSafetyChecker::load(weights, config)),
        );
        feature_extractor.zip(safety_checker)
    }

    /// A component's weights in its model. Without a config the file is still opened, so that its faults are known.
    fn model<C, M>(
        &mut self,
        component: &'static str,
        stem: &'static str,
        rename: fn(&str) -> Option<String>,
        config: Option<&C>,
        load: impl FnOnce(&Weights<'_>, &C) -> Result<M, TchError>,
    ) -> Option<M> {
        let LoadOptions { device, dtype, .. } = self.options;
        let file = match self.source {
            WeightSource::Files => {
                WeightFile::open(self.directory, component, stem, dtype, device.to_tch(), rename)
            }
            WeightSource::Drawn(seed) => Ok(WeightFile::drawn(component, seed, dtype, device.to_tch())),
        };
        let file = match file {
            Ok(file) => file.with_kernels(self.kernels.clone()),
            Err(fault) => return self.note(vec![fault]),
        };
        let model = load(&file.root(), config?);
        if matches!(self.source, WeightSource::Drawn(_)) {
            self.drawn.push(DrawnComponent { component, stem, tensors: file.asked_for() });
        }
        self.faults.extend(file.into_faults());
        match model {
            Ok(model) => Some(model),
            Err(error) => {
                let file = format!("{component}/config.json");
                self.note(vec![Fault::Tensor { file, key: "time_proj".to_owned(), error }])
            }
        }
    }

    /// Checks what the components must agree on.
    fn check_fit(
        &mut self,
        tokenizer: Option<&CLIPTokenizer>,
        text: &CLIPTextConfig,
        unet: &UNet2DConditionConfig,
        vae: &AutoencoderKLConfig,
    ) {
        let hidden_size = text.encoder.hidden_size;
        if let Some(dim) = unet.cross_attention_dim.iter().find(|&&dim| dim != hidden_size) {
            let rule = format!("the text encoder's hidden_size, {hidden_size},");
            self.misfit("unet/config.json", "cross_attention_dim", rule, dim);
        }
        for (field, channels) in [("in_channels", unet.in_channels), ("out_channels", unet.out_channels)] {
            if channels != vae.latent_channels {
                let rule = format!("the VAE's latent_channels, {},", vae.latent_channels);
                self.misfit("unet/config.json", field, rule, channels);
            }
        }
        if vae.out_channels != NUM_COLOR_CHANNELS {
            let rule = NUM_COLOR_CHANNELS.to_string();
            self.misfit("vae/config.json", "out_channels", rule, vae.out_channels);
        }
        let Some(tokenizer) = tokenizer else { return };
        let limits = [
            ("vocab_size", tokenizer.vocab_size(), text.vocab_size),
            ("max_position_embeddings", tokenizer.model_max_length(), text.max_position_embeddings),
        ];
        for (field, needed, given) in limits {
            if i64::try_from(needed).map_or(true, |needed| needed > given) {
                let rule = format!("at least the tokenizer's {needed}");
                self.misfit("text_encoder/config.json", field, rule, given);
            }
        }
    }

    /// Records that a field does not fit another component.
    fn misfit(&mut self, file: &str, field: &str, rule: String, found: impl ToString) {
        let (file, field) = (file.to_owned(), field.to_owned());
        self.faults.push(Fault::Config { file, field, rule, value: found.to_string() });
    }
}

/// Some repositories' `model_index.json` names the Flax twins of the classes, for the same weights.
fn strip_flax(class: &str) -> &str {
    class.strip_prefix("Flax").unwrap_or(class)
}

/// The class in a component's `[library, class]` pair; `None` where it is absent or `[null, null]`.
fn component_class<'a>(index: &'a ConfigFile, name: &str) -> Option<&'a str> {
    index.get(name)?.as_array()?.get(1)?.as_str().map(strip_flax)
}

/// `a, b or c` for messages.
fn list(classes: &[&str]) -> String {
    match classes {
        [] => "a noise scheduler's class".to_owned(),
        [only] => (*only).to_owned(),
        [first @ .., last] => format!("{} or {last}", first.join(", ")),
    }
}

/// An error's text and its causes', for faults that hold text.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
