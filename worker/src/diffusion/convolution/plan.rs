//! From a convolution to what cuDNN executes: its operation graph, the engines that take it, and the plan of one of them.

use std::collections::BTreeMap;
use std::ffi::c_void;

use tch::Tensor;

use super::backend::{Attribute, Cudnn, CudnnError, CudnnHandle, Descriptor, Kind, Named};
use super::engines::EngineChoice;
use super::{ALIGNMENT, Adds, Convolution, Operands};
use crate::diffusion::device::ComputeDtype;

/// The tensors of a graph: their unique ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Id {
    Input = 1,
    Weight = 2,
    Output = 3,
    Bias = 4,
    Residual = 5,
    /// Between two operations; in no memory.
    Between = 6,
}

/// `CUDNN_DATA_FLOAT`.
const FLOAT: Named = Named::Dtype(0);
/// `CUDNN_CROSS_CORRELATION`: what networks call a convolution.
const CROSS_CORRELATION: Named = Named::ConvolutionMode(1);
/// `CUDNN_POINTWISE_ADD`.
const ADD: Named = Named::Pointwise(0);

/// Where engines come from, the best guesses first: `CUDNN_HEUR_MODE_A`, then `CUDNN_HEUR_MODE_FALLBACK`.
const HEURISTICS: [Named; 2] = [Named::Heuristics(3), Named::Heuristics(2)];
/// More than cuDNN has ever given.
const MOST_CONFIGS: usize = 128;
/// More than an engine has.
const MOST_KNOBS: usize = 32;

/// `cudnnBackendNumericalNote_t` of engines that compute something else, or not the same each time: down-converted inputs, sums in
/// 16 bits, FFT, other bits in each run, Winograd in four sizes.
const REFUSED_NOTES: [i32; 8] = [1, 2, 3, 4, 5, 6, 7, 8];

/// `CUDNN_BEHAVIOR_NOTE_CUBLASLT_DEPENDENCY`: what computes is another library's choice.
const BY_CUBLASLT: i32 = 4;

fn dtype(dtype: ComputeDtype) -> Named {
    Named::Dtype(match dtype {
        ComputeDtype::F32 => 0,
        ComputeDtype::F16 => 2,
        ComputeDtype::Bf16 => 9,
    })
}

/// What engines and plans depend on of a GPU.
#[derive(Debug)]
pub struct DeviceProperties(Descriptor);

impl DeviceProperties {
    /// Of the GPU with this number.
    pub fn of_gpu(cudnn: &'static Cudnn, index: usize) -> Result<Self, CudnnError> {
        let mut properties = Descriptor::new(cudnn, Kind::DeviceProperties)?;
        properties.set(Attribute::DeviceNumber, &[i32::try_from(index).unwrap_or(i32::MAX)])?;
        properties.finalize("the GPU's properties").map(Self)
    }

    /// Of a GPU that is not here, as cuDNN writes them.
    pub fn from_json(cudnn: &'static Cudnn, json: &str) -> Result<Self, CudnnError> {
        let mut properties = Descriptor::new(cudnn, Kind::DeviceProperties)?;
        // cuDNN wants the zero at the end, too.
        let bytes: Vec<u8> = json.bytes().chain([0]).collect();
        properties.set(Attribute::DeviceJson, &bytes)?;
        properties.finalize("these properties of a GPU").map(Self)
    }
}

/// A convolution and what is added to it, in cuDNN's words.
#[derive(Debug)]
struct OperationGraph {
    graph: Descriptor,
    /// What the graph names.
    _parts: Vec<Descriptor>,
}

/// `(samples, channels, rows, columns)` by pixels.
fn map_strides([_, channels, height, width]: [i64; 4]) -> [i64; 4] {
    [height * width * channels, 1, width * channels, channels]
}

fn tensor(
    cudnn: &'static Cudnn,
    id: i64,
    dtype: Named,
    size: [i64; 4],
    is_virtual: bool,
) -> Result<Descriptor, CudnnError> {
    let mut tensor = Descriptor::new(cudnn, Kind::Tensor)?;
    tensor.set(Attribute::TensorId, &[id])?;
    tensor.set_named(Attribute::TensorDtype, dtype)?;
    tensor.set(Attribute::TensorDimensions, &size)?;
    tensor.set(Attribute::TensorStrides, &map_strides(size))?;
    tensor.set(Attribute::TensorAlignment, &[ALIGNMENT as i64])?;
    if is_virtual {
        tensor.set(Attribute::TensorIsVirtual, &[true])?;
    }
    tensor.finalize("a tensor")
}

impl OperationGraph {
    fn new(cudnn: &'static Cudnn, convolution: &Convolution) -> Result<Self, CudnnError> {
        let Convolution { batch_size, in_channels, height, width, out_channels, kernel_size, .. } =
            *convolution;
        let number = dtype(convolution.dtype);
        let output_size = convolution.output_size();
        let real = |id: Id, size| tensor(cudnn, id as i64, number, size, false);
        let input = real(Id::Input, [batch_size, in_channels, height, width])?;
        let weight = real(Id::Weight, [out_channels, in_channels, kernel_size, kernel_size])?;
        let output = real(Id::Output, output_size)?;
        let bias = |parts: &mut Vec<Descriptor>| -> Result<(), CudnnError> {
            parts.push(real(Id::Bias, [1, out_channels, 1, 1])?);
            Ok(())
        };
        // The residual comes first: in this order cuDNN has precompiled engines.
        let mut addends = Vec::new();
        match convolution.adds {
            Adds::Nothing => {}
            Adds::Bias => bias(&mut addends)?,
            Adds::BiasAndResidual => {
                addends.push(real(Id::Residual, output_size)?);
                bias(&mut addends)?;
            }
        }
        // Each operation but the last hands its output on, in f32.
        let between = (0..addends.len() as i64)
            .map(|i| tensor(cudnn, Id::Between as i64 + i, FLOAT, output_size, true))
            .collect::<Result<Vec<_>, _>>()?;
        let outputs: Vec<&Descriptor> = between.iter().chain([&output]).collect();

        let mut description = Descriptor::new(cudnn, Kind::Convolution)?;
        description.set(Attribute::ConvolutionSpatialDims, &[2i64])?;
        description.set_named(Attribute::ConvolutionPrecision, FLOAT)?;
        description.set_named(Attribute::ConvolutionMode, CROSS_CORRELATION)?;
        for side in [Attribute::ConvolutionPrePaddings, Attribute::ConvolutionPostPaddings] {
            description.set(side, &[convolution.padding; 2])?;
        }
        description.set(Attribute::ConvolutionDilations, &[1i64; 2])?;
        description.set(Attribute::ConvolutionStrides, &[convolution.stride; 2])?;
        let description = description.finalize("a convolution")?;
        let mut forward = Descriptor::new(cudnn, Kind::ConvolutionForward)?;
        forward.set_descriptors(Attribute::ForwardX, &[&input])?;
        forward.set_descriptors(Attribute::ForwardW, &[&weight])?;
        forward.set_descriptors(Attribute::ForwardY, &[outputs[0]])?;
        forward.set_descriptors(Attribute::ForwardConvolution, &[&description])?;
        forward.set(Attribute::ForwardAlpha, &[1f32])?;
        forward.set(Attribute::ForwardBeta, &[0f32])?;
        let mut operations = vec![forward.finalize("a convolution of these tensors")?];

        let mut add = Descriptor::new(cudnn, Kind::Pointwise)?;
        add.set_named(Attribute::PointwiseMode, ADD)?;
        add.set_named(Attribute::PointwisePrecision, FLOAT)?;
        let add = add.finalize("an addition")?;
        for (i, addend) in addends.iter().enumerate() {
            let mut operation = Descriptor::new(cudnn, Kind::PointwiseOperation)?;
            operation.set_descriptors(Attribute::PointwiseDescriptor, &[&add])?;
            operation.set_descriptors(Attribute::PointwiseX, &[outputs[i]])?;
            operation.set_descriptors(Attribute::PointwiseB, &[addend])?;
            operation.set_descriptors(Attribute::PointwiseY, &[outputs[i + 1]])?;
            operations.push(operation.finalize("an addition of these tensors")?);
        }

        let mut graph = Descriptor::new(cudnn, Kind::OperationGraph)?;
        graph.set_descriptors(Attribute::GraphOperations, &operations.iter().collect::<Vec<_>>())?;
        let graph = graph.finalize("a graph of operations")?;
        let parts = [input, weight, output, description, add];
        let parts = operations.into_iter().chain(addends).chain(between).chain(parts).collect();
        Ok(Self { graph, _parts: parts })
    }
}

/// The engines that take a convolution on a GPU, as cuDNN ranks them, with their settings: those that sum in f32, repeat
/// their bits and are cuDNN's own.
pub fn candidates(
    cudnn: &'static Cudnn,
    convolution: &Convolution,
    device: &DeviceProperties,
) -> Result<Vec<EngineChoice>, CudnnError> {
    let graph = OperationGraph::new(cudnn, convolution)?;
    let mut found = Vec::new();
    for mode in HEURISTICS {
        let mut heuristics = Descriptor::new(cudnn, Kind::EngineHeuristics)?;
        heuristics.set_descriptors(Attribute::HeuristicsGraph, &[&graph.graph])?;
        heuristics.set_named(Attribute::HeuristicsMode, mode)?;
        heuristics.set_descriptors(Attribute::HeuristicsDevice, &[&device.0])?;
        let heuristics = heuristics.finalize("heuristics")?;
        let configs =
            heuristics.descriptors(Attribute::HeuristicsResults, Kind::EngineConfig, MOST_CONFIGS)?;
        for config in &configs {
            if let Some(choice) = choice(config)?
                && !found.contains(&choice)
            {
                found.push(choice);
            }
        }
    }
    Ok(found)
}

/// A config's engine and settings; `None` if the engine is not one to be used.
fn choice(config: &Descriptor) -> Result<Option<EngineChoice>, CudnnError> {
    let engines = config.descriptors(Attribute::ConfigEngine, Kind::Engine, 1)?;
    let Some(engine) = engines.first() else { return Ok(None) };
    if engine.numerical_notes()?.iter().any(|note| REFUSED_NOTES.contains(note))
        || engine.behavior_notes()?.contains(&BY_CUBLASLT)
    {
        return Ok(None);
    }
    let mut knobs = BTreeMap::new();
    for knob in &config.descriptors(Attribute::ConfigKnobs, Kind::KnobChoice, MOST_KNOBS)? {
        knobs.insert(knob.knob()?, knob.number(Attribute::KnobValue)?);
    }
    Ok(Some(EngineChoice { engine: engine.number(Attribute::EngineIndex)?, knobs }))
}

/// What cuDNN executes.
#[derive(Debug)]
pub struct Plan {
    cudnn: &'static Cudnn,
    plan: Descriptor,
    workspace_bytes: i64,
    /// What the plan names.
    _parts: (OperationGraph, Vec<Descriptor>),
}

impl Plan {
    /// That of a convolution by this engine.
    pub fn new(
        cudnn: &'static Cudnn,
        convolution: &Convolution,
        choice: &EngineChoice,
        device: &DeviceProperties,
    ) -> Result<Self, CudnnError> {
        let graph = OperationGraph::new(cudnn, convolution)?;
        let mut engine = Descriptor::new(cudnn, Kind::Engine)?;
        engine.set_descriptors(Attribute::EngineGraph, &[&graph.graph])?;
        engine.set(Attribute::EngineIndex, &[choice.engine])?;
        engine.set_descriptors(Attribute::EngineDevice, &[&device.0])?;
        let engine = engine.finalize("this engine")?;
        let knob = |(&kind, &value): (&i32, &i64)| {
            let mut knob = Descriptor::new(cudnn, Kind::KnobChoice)?;
            knob.set_named(Attribute::KnobKind, Named::Knob(kind))?;
            knob.set(Attribute::KnobValue, &[value])?;
            knob.finalize("this setting of an engine")
        };
        let knobs = choice.knobs.iter().map(knob).collect::<Result<Vec<_>, CudnnError>>()?;
        let mut config = Descriptor::new(cudnn, Kind::EngineConfig)?;
        config.set_descriptors(Attribute::ConfigEngine, &[&engine])?;
        if !knobs.is_empty() {
            config.set_descriptors(Attribute::ConfigKnobs, &knobs.iter().collect::<Vec<_>>())?;
        }
        let config = config.finalize("these settings of an engine")?;
        let mut plan = Descriptor::new(cudnn, Kind::ExecutionPlan)?;
        plan.set_descriptors(Attribute::PlanConfig, &[&config])?;
        plan.set_descriptors(Attribute::PlanDevice, &[&device.0])?;
        let plan = plan.finalize("an execution plan")?;
        let workspace_bytes = plan.number(Attribute::PlanWorkspace)?;
        let parts = knobs.into_iter().chain([engine, config]).collect();
        Ok(Self { cudnn, plan, workspace_bytes, _parts: (graph, parts) })
    }

    /// Bytes on the GPU that an execution needs for itself.
    pub fn workspace_bytes(&self) -> i64 {
        self.workspace_bytes
    }

    /// Starts the convolution on `stream`.
    ///
    /// # Safety
    /// The tensors are on the handle's GPU, which is the current one and of the properties that the plan was made for; they have
    /// the sizes and dtype of its convolution, lie by pixels, begin at multiples of [`ALIGNMENT`] and live until the stream has passed
    /// the launch, as do the `workspace_bytes` at `workspace`.
    pub unsafe fn execute(
        &self,
        handle: CudnnHandle,
        stream: *mut c_void,
        operands: &Operands<'_>,
        output: &Tensor,
        workspace: *mut c_void,
    ) -> Result<(), CudnnError> {
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
        pack.set(Attribute::PackWorkspace, &[workspace])?;
        let pack = pack.finalize("the tensors of an execution")?;
        // SAFETY: the caller's promise.
        unsafe { self.cudnn.execute(handle, stream, &self.plan, &pack) }
    }
}
