//! Pinned engines on a GPU.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::ffi::c_void;
use std::sync::Arc;

use tch::{Device, Kind as TensorKind, TchError, Tensor};

use super::backend::{Attribute, Cudnn, CudnnError, Descriptor, Handle, Kind};
use super::engines::{ConvolutionEngines, PinnedEngine};
use super::plan::{DeviceProperties, Id, Plan};
use super::{Convolution, Convolve, Operands, are_aligned, empty_output};
use crate::diffusion::kernels::Launch;

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
    static HANDLES: RefCell<BTreeMap<usize, Handle>> = const { RefCell::new(BTreeMap::new()) };
}

impl PinnedConvolutions {
    /// Makes the plans of all engines in `engines` for the launcher's GPU.
    pub fn open(launcher: Arc<dyn Launch>, engines: &ConvolutionEngines) -> Result<Self, CudnnError> {
        let cudnn = Cudnn::open()?;
        let device = DeviceProperties::of_gpu(cudnn, gpu(launcher.as_ref()))?;
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

    fn handle(&self) -> Result<Handle, CudnnError> {
        let gpu = gpu(self.launcher.as_ref());
        HANDLES.with_borrow_mut(|handles| {
            if let Some(&handle) = handles.get(&gpu) {
                return Ok(handle);
            }
            let handle = self.cudnn.handle()?;
            handles.insert(gpu, handle);
            Ok(handle)
        })
    }

    /// The tensors of an execution, by their ids.
    fn pack(
        &self,
        operands: &Operands<'_>,
        output: &Tensor,
        workspace: &Tensor,
    ) -> Result<Descriptor, CudnnError> {
        let tensors: [(Id, Option<&Tensor>); 5] = [
            (Id::Input, Some(operands.input)),
            (Id::Weight, Some(operands.weight)),
            (Id::Output, Some(output)),
            (Id::Bias, operands.bias),
            (Id::Residual, operands.residual),
        ];
        let (ids, pointers): (Vec<i64>, Vec<*mut c_void>) = tensors
            .into_iter()
            .filter_map(|(id, tensor)| tensor.map(|tensor| (id as i64, tensor.data_ptr())))
            .unzip();
        let mut pack = Descriptor::new(self.cudnn, Kind::VariantPack)?;
        pack.set(Attribute::PackIds, &ids)?;
        pack.set(Attribute::PackPointers, &pointers)?;
        pack.set(Attribute::PackWorkspace, &[workspace.data_ptr()])?;
        pack.finalize("the tensors of an execution")
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
        let workspace =
            Tensor::f_empty([plan.workspace_bytes().max(1)], (TensorKind::Uint8, output.device()))?;
        let pack = self.pack(operands, &output, &workspace).map_err(refused)?;
        self.launcher.on_stream(&mut |stream| {
            let handle = self.handle().map_err(refused)?;
            // SAFETY: `Convolution::of` has seen that the tensors have the sizes, strides and dtypes that the plan was made for, and
            // they are on its GPU. What is freed goes back to libtorch's pool for this stream. The handle is this thread's.
            let executed = unsafe { self.cudnn.execute(handle, stream, plan.descriptor(), &pack) };
            executed.map_err(refused)
        })?;
        Ok(Some(output))
    }

    fn name(&self) -> &str {
        &self.name
    }
}

/// The number of the launcher's GPU.
pub(super) fn gpu(launcher: &dyn Launch) -> usize {
    match launcher.device() {
        Device::Cuda(index) => index,
        _ => 0,
    }
}

/// The error as one of libtorch's.
fn refused(error: CudnnError) -> TchError {
    TchError::Torch(error.to_string())
}
