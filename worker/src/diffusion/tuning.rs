//! Which engine is fastest for each convolution of a model, on the GPU that is here: asked of the GPU, since cuDNN's own ranking is
//! a guess.
//!
//! An engine is taken only if it computes what libtorch does in f32, repeats its bits, and gives a sample the same bits in every
//! place of a batch; engines that split a sum by where an output lies do not.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use tch::{Device, Kind, TchError, Tensor};

use super::convolution::{
    Adds, Convolution, Convolve, Cudnn, CudnnError, DeviceProperties, EngineChoice, Operands, PinnedEngine,
    Plan, candidates,
};
use super::cuda;
use super::kernels::{GroupNormParameters, Kernels, Launch, PinnedConvolutions, tolerance};

/// Engines that are measured thoroughly, of those that a short look finds fastest.
const FINALISTS: usize = 4;
/// Seconds that a thorough measurement takes, at least.
const MEASURED_SECONDS: f64 = 2e-3;
/// The most executions of one measurement.
const MOST_RUNS: usize = 50;
/// Thorough measurements of one engine; the shortest counts.
const ROUNDS: usize = 3;
/// Epsilon of the norm after a map, while ways to it are compared.
const EPS: f64 = 1e-5;

/// Computes nothing and remembers what was asked of it: which convolutions a model has.
#[derive(Debug, Default)]
pub struct Recorder {
    seen: Mutex<BTreeSet<Convolution>>,
}

impl Recorder {
    /// What was asked for so far.
    pub fn seen(&self) -> BTreeSet<Convolution> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Convolve for Recorder {
    fn convolve(
        &self,
        convolution: &Convolution,
        _operands: &Operands<'_>,
    ) -> Result<Option<Tensor>, TchError> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).insert(*convolution);
        Ok(None)
    }

    fn name(&self) -> &str {
        "recorded"
    }
}

/// Where engines come from.
pub trait Engines {
    /// Those that may take a convolution.
    fn candidates(&self, convolution: &Convolution) -> Result<Vec<EngineChoice>, CudnnError>;

    /// One of them, to compute with.
    fn convolver(
        &self,
        convolution: &Convolution,
        choice: &EngineChoice,
    ) -> Result<Arc<dyn Convolve>, CudnnError>;
}

/// cuDNN's, on the GPU of a launcher.
#[derive(Debug)]
pub struct CudnnEngines {
    cudnn: &'static Cudnn,
    device: DeviceProperties,
    launcher: Arc<dyn Launch>,
}

impl CudnnEngines {
    /// For the GPU that `kernels` are on; an error where they are none of our own.
    pub fn open(kernels: &Kernels) -> Result<Self, CudnnError> {
        let Some(launcher) = kernels.launcher().cloned() else {
            let reason = "our own kernels, which go before them, cannot be used here".to_owned();
            return Err(CudnnError::Library { reason });
        };
        let cudnn = Cudnn::open()?;
        let device = DeviceProperties::of_gpu(cudnn, PinnedConvolutions::gpu(launcher.as_ref()))?;
        Ok(Self { cudnn, device, launcher })
    }
}

impl Engines for CudnnEngines {
    fn candidates(&self, convolution: &Convolution) -> Result<Vec<EngineChoice>, CudnnError> {
        candidates(self.cudnn, convolution, &self.device)
    }

    fn convolver(
        &self,
        convolution: &Convolution,
        choice: &EngineChoice,
    ) -> Result<Arc<dyn Convolve>, CudnnError> {
        let plan = Plan::new(self.cudnn, convolution, choice, &self.device)?;
        let launcher = self.launcher.clone();
        Ok(Arc::new(PinnedConvolutions::of_one(self.cudnn, launcher, *convolution, plan)))
    }
}

/// What was found for one convolution.
#[derive(Debug, Clone, PartialEq)]
pub struct Tuned {
    /// The convolution.
    pub convolution: Convolution,
    /// The engine to pin; `None` where libtorch's way is no slower.
    pub pinned: Option<PinnedEngine>,
    /// Engines that were tried.
    pub tried: usize,
    /// Of those that were looked at closely, the engines that compute something else, or other bits elsewhere.
    pub refused: usize,
}

/// Tries engines out.
#[derive(Debug)]
pub struct Tuner<'e, E> {
    /// What computes around the convolutions.
    pub kernels: Kernels,
    /// Where the engines come from.
    pub engines: &'e E,
    /// Where to compute.
    pub device: Device,
    /// Waits until the device has done what it was given.
    pub wait: fn() -> Result<(), TchError>,
    /// Seconds since whenever.
    pub clock: fn() -> f64,
}

/// The tensors of one convolution: every sample is the same.
struct Sample {
    input: Tensor,
    weight: Tensor,
    bias: Option<Tensor>,
    residual: Option<Tensor>,
    stride: i64,
    padding: i64,
    /// One sample's output, in f32.
    expected: Tensor,
}

impl<'e> Tuner<'e, CudnnEngines> {
    /// On the GPU that `kernels` are on.
    pub fn on_gpu(kernels: Kernels, engines: &'e CudnnEngines) -> Self {
        let wait = || cuda::synchronize().map_err(|error| TchError::Torch(error.to_string()));
        Self { kernels, engines, device: engines.launcher.device(), wait, clock: seconds_since_start }
    }
}

impl<E: Engines> Tuner<'_, E> {
    /// Finds the engines for `convolutions`, and tells each as it is found. A convolution that is there with bias (and residual) and
    /// without is one whose output a norm reads ([`Kernels::convolve_map`]): with them inside it is worth it only if that is
    /// faster than adding them after, when the norm's statistics are taken on the way.
    pub fn tune(
        &self,
        convolutions: &BTreeSet<Convolution>,
        mut found: impl FnMut(&Tuned),
    ) -> Result<Vec<Tuned>, TchError> {
        let _no_grad = tch::no_grad_guard();
        let mut all: Vec<Tuned> = Vec::new();
        // What computes a convolution whose addends come after it.
        let mut apart: BTreeMap<Convolution, Kernels> = BTreeMap::new();
        // In their order the one that adds nothing comes first.
        for convolution in convolutions {
            let adds_nothing = convolution.adds == Adds::Nothing;
            let twin = Convolution { adds: Adds::Nothing, ..*convolution };
            let kernels_apart = apart.get(&twin).filter(|_| !adds_nothing);
            let (tuned, pinned) = self.tune_one(convolution, kernels_apart)?;
            if adds_nothing {
                apart.insert(*convolution, pinned.map_or_else(|| self.kernels.clone(), |it| self.with(it)));
            }
            found(&tuned);
            all.push(tuned);
        }
        Ok(all)
    }

    /// Our own kernels, with convolutions by this engine.
    fn with(&self, convolver: Arc<dyn Convolve>) -> Kernels {
        self.kernels.clone().with_convolver(convolver)
    }

    /// The engine is given along if it is to be pinned. `apart` is what computes the same with the addends after it, where a norm
    /// reads the output.
    fn tune_one(
        &self,
        convolution: &Convolution,
        apart: Option<&Kernels>,
    ) -> Result<(Tuned, Option<Arc<dyn Convolve>>), TchError> {
        let sample = Sample::new(convolution, self.device)?;
        let mut tuned = Tuned { convolution: *convolution, pinned: None, tried: 0, refused: 0 };
        let mut looked_at = Vec::new();
        for choice in self.engines.candidates(convolution)? {
            // Some cannot be had after all: their libraries are missing, or the memory is.
            let Ok(convolver) = self.engines.convolver(convolution, &choice) else { continue };
            let Ok(seconds) = self.seconds(1, || sample.run(convolver.as_ref(), convolution)) else {
                continue;
            };
            tuned.tried += 1;
            looked_at.push((seconds, choice, convolver));
        }
        looked_at.sort_by(|(a, ..), (b, ..)| a.total_cmp(b));
        let mut best: Option<(f64, EngineChoice, Arc<dyn Convolve>)> = None;
        let mut finalists = 0;
        for (_, choice, convolver) in looked_at {
            if finalists == FINALISTS {
                break;
            }
            if !sample.is_right(convolver.as_ref(), convolution)? {
                tuned.refused += 1;
                continue;
            }
            finalists += 1;
            let seconds = self.seconds(ROUNDS, || sample.run(convolver.as_ref(), convolution))?;
            if best.as_ref().is_none_or(|(least, ..)| seconds < *least) {
                best = Some((seconds, choice, convolver));
            }
        }
        let Some((seconds, choice, convolver)) = best else { return Ok((tuned, None)) };
        let (ours, theirs) = match apart {
            None => (seconds, self.seconds(ROUNDS, || sample.operands().convolve())?),
            Some(apart) => {
                let inside = self.with(convolver.clone());
                (self.seconds_to_norm(&sample, &inside)?, self.seconds_to_norm(&sample, apart)?)
            }
        };
        if ours < theirs {
            let [microseconds, libtorch_microseconds] = [ours, theirs].map(|seconds| seconds * 1e6);
            let convolution = *convolution;
            tuned.pinned = Some(PinnedEngine { convolution, choice, microseconds, libtorch_microseconds });
            return Ok((tuned, Some(convolver)));
        }
        Ok((tuned, None))
    }

    /// From a convolution's input to its norm's output, by `kernels`.
    fn seconds_to_norm(&self, sample: &Sample, kernels: &Kernels) -> Result<f64, TchError> {
        let channels = sample.weight.size()[0];
        let options = (sample.input.kind(), self.device);
        let (weight, bias) = (Tensor::f_ones([channels], options)?, Tensor::f_zeros([channels], options)?);
        let num_groups = [32, 16, 8, 4, 2, 1].into_iter().find(|groups| channels % groups == 0).unwrap_or(1);
        let norm = GroupNormParameters { weight: &weight, bias: &bias, num_groups, eps: EPS, silu: true };
        self.seconds(ROUNDS, || {
            kernels.group_norm_of_map(&kernels.convolve_map(&sample.operands(), num_groups)?, &norm)
        })
    }

    /// The least seconds of `rounds` measurements of `work`, after two runs that do not count.
    fn seconds(
        &self,
        rounds: usize,
        mut work: impl FnMut() -> Result<Tensor, TchError>,
    ) -> Result<f64, TchError> {
        let mut timed = |runs: usize| -> Result<f64, TchError> {
            (self.wait)()?;
            let start = (self.clock)();
            for _ in 0..runs {
                let _ = work()?;
            }
            (self.wait)()?;
            Ok(((self.clock)() - start) / runs as f64)
        };
        timed(1)?;
        let once = timed(1)?;
        let runs = if rounds == 1 { 2 } else { (MEASURED_SECONDS / once).ceil() as usize };
        let mut least = f64::INFINITY;
        for _ in 0..rounds {
            least = least.min(timed(runs.clamp(1, MOST_RUNS))?);
        }
        Ok(least)
    }
}

impl Sample {
    fn new(convolution: &Convolution, device: Device) -> Result<Self, TchError> {
        let Convolution { batch_size, in_channels, height, width, out_channels, kernel_size, .. } =
            *convolution;
        let kind = convolution.dtype.to_tch();
        let drawn = |size: &[i64]| Tensor::f_randn(size, (Kind::Float, device))?.f_to_kind(kind);
        let by_pixels = |map: &Tensor| Kernels::plain(true).lay_out(map);
        // So that outputs are as large as inputs.
        let scale = 1.0 / ((in_channels * kernel_size * kernel_size) as f64).sqrt();
        let weight = drawn(&[out_channels, in_channels, kernel_size, kernel_size])?.f_mul_scalar(scale)?;
        let weight = by_pixels(&weight)?;
        let input = drawn(&[1, in_channels, height, width])?;
        let bias = (convolution.adds != Adds::Nothing).then(|| drawn(&[out_channels])).transpose()?;
        let [_, _, out_height, out_width] = convolution.output_size();
        let residual = (convolution.adds == Adds::BiasAndResidual)
            .then(|| drawn(&[1, out_channels, out_height, out_width]))
            .transpose()?;
        let everywhere = |sample: &Tensor| by_pixels(&sample.f_expand([batch_size, -1, -1, -1], false)?);
        let (stride, padding) = (convolution.stride, convolution.padding);
        let (of_bias, of_residual) = (bias.as_ref(), residual.as_ref());
        let expected = Operands {
            input: &input,
            weight: &weight,
            bias: of_bias,
            residual: of_residual,
            stride,
            padding,
        }
        .convolve_in_f32()?;
        let residual = residual.as_ref().map(everywhere).transpose()?;
        Ok(Self { input: everywhere(&input)?, weight, bias, residual, stride, padding, expected })
    }

    fn operands(&self) -> Operands<'_> {
        Operands {
            input: &self.input,
            weight: &self.weight,
            bias: self.bias.as_ref(),
            residual: self.residual.as_ref(),
            stride: self.stride,
            padding: self.padding,
        }
    }

    fn run(&self, convolver: &dyn Convolve, convolution: &Convolution) -> Result<Tensor, TchError> {
        let output = convolver.convolve(convolution, &self.operands())?;
        output.ok_or_else(|| TchError::Torch(format!("{convolution}: its own engine does not take it")))
    }

    /// Whether the engine computes what libtorch does, and the same bits in every place and again.
    fn is_right(&self, convolver: &dyn Convolve, convolution: &Convolution) -> Result<bool, TchError> {
        let (output, again) = (self.run(convolver, convolution)?, self.run(convolver, convolution)?);
        let first = output.f_narrow(0, 0, 1)?;
        let is_same = |other: &Tensor| -> Result<bool, TchError> {
            Ok(output.f_ne_tensor(other)?.f_any()?.f_int64_value(&[])? == 0)
        };
        let off = first.f_to_kind(Kind::Float)?.f_sub(&self.expected)?.f_abs()?.f_max()?;
        let difference = off.f_double_value(&[])? / self.expected.f_abs()?.f_max()?.f_double_value(&[])?;
        // So written that a NaN fails.
        Ok(difference <= tolerance(convolution.dtype) && is_same(&first)? && is_same(&again)?)
    }
}

/// The wall clock.
fn seconds_since_start() -> f64 {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_secs_f64()
}
