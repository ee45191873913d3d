//! Convolutions by pinned engines of cuDNN, on libtorch's stream of a GPU.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use tch::{Device, Kind, TchError, Tensor};

use super::super::convolution::{
    ALIGNMENT, Convolution, ConvolutionEngines, Convolve, Cudnn, CudnnError, CudnnHandle, DeviceProperties,
    Operands, PinnedEngine, Plan,
};
use super::super::layout::from_pixels;
use super::Launch;

/// The plans of one GPU.
#[derive(Debug)]
pub struct PinnedConvolutions {
    cudnn: &'static Cudnn,
    /// Knows the GPU and libtorch's stream on it.
    launcher: Arc<dyn Launch>,
    name: String,
    plans: HashMap<Convolution, Plan>,
}

thread_local! {
    /// cuDNN's handles of this thread, by GPU: one must not be used by two threads at once. They are kept for good.
    static HANDLES: RefCell<BTreeMap<usize, CudnnHandle>> = const { RefCell::new(BTreeMap::new()) };
}

impl PinnedConvolutions {
    /// Makes the plans of all engines in `engines` for the launcher's GPU.
    pub fn open(launcher: Arc<dyn Launch>, engines: &ConvolutionEngines) -> Result<Self, CudnnError> {
        let cudnn = Cudnn::open()?;
        let device = DeviceProperties::of_gpu(cudnn, Self::gpu(launcher.as_ref()))?;
        let plan = |PinnedEngine { convolution, choice, .. }: &PinnedEngine| {
            Ok((*convolution, Plan::new(cudnn, convolution, choice, &device)?))
        };
        let plans = engines.pinned.iter().map(plan).collect::<Result<_, CudnnError>>()?;
        Ok(Self { cudnn, launcher, name: engines.name(), plans })
    }

    /// One plan, to be tried out.
    pub fn of_one(
        cudnn: &'static Cudnn,
        launcher: Arc<dyn Launch>,
        convolution: Convolution,
        plan: Plan,
    ) -> Self {
        Self { cudnn, launcher, name: String::new(), plans: HashMap::from([(convolution, plan)]) }
    }

    /// The number of the launcher's GPU.
    pub fn gpu(launcher: &dyn Launch) -> usize {
        match launcher.device() {
            Device::Cuda(index) => index,
            _ => 0,
        }
    }

    fn handle(&self) -> Result<CudnnHandle, CudnnError> {
        let gpu = Self::gpu(self.launcher.as_ref());
        HANDLES.with_borrow_mut(|handles| {
            if let Some(&handle) = handles.get(&gpu) {
                return Ok(handle);
            }
            let handle = self.cudnn.handle()?;
            handles.insert(gpu, handle);
            Ok(handle)
        })
    }
}

impl Convolve for PinnedConvolutions {
    fn convolve(
        &self,
        convolution: &Convolution,
        operands: &Operands<'_>,
    ) -> Result<Option<Tensor>, TchError> {
        let Some(plan) = self.plans.get(convolution) else { return Ok(None) };
        let output = empty_output(convolution, operands)?;
        let tensors = [operands.input, operands.weight, &output];
        if !are_aligned(&tensors)
            || !are_aligned(&operands.bias.into_iter().chain(operands.residual).collect::<Vec<_>>())
        {
            return Err(TchError::Torch(format!("{convolution}: a tensor does not begin where 16 bytes do")));
        }
        let workspace = Tensor::f_empty([plan.workspace_bytes().max(1)], (Kind::Uint8, output.device()))?;
        self.launcher.on_stream(&mut |stream| {
            let handle = self.handle()?;
            // SAFETY: `Convolution::of` has seen that the tensors have the sizes, strides and dtypes that the plan was made for, and
            // they are on its GPU. What is freed goes back to libtorch's pool for this stream. The handle is this thread's.
            Ok(unsafe { plan.execute(handle, stream, operands, &output, workspace.data_ptr()) }?)
        })?;
        Ok(Some(output))
    }

    fn name(&self) -> &str {
        &self.name
    }
}

/// Room for an output, by pixels, where `operands` are.
fn empty_output(convolution: &Convolution, operands: &Operands<'_>) -> Result<Tensor, TchError> {
    let [batch_size, channels, height, width] = convolution.output_size();
    let options = (operands.input.kind(), operands.input.device());
    from_pixels(&Tensor::f_empty([batch_size, height, width, channels], options)?)
}

/// Whether cuDNN may load 16 bytes at once from where these begin, as it is told it may.
fn are_aligned(tensors: &[&Tensor]) -> bool {
    tensors.iter().all(|tensor| tensor.data_ptr().addr().is_multiple_of(ALIGNMENT))
}
