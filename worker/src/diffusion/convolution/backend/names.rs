//! The numbers of cuDNN's backend interface (`cudnn_graph_v9.h`) that are used here.

use std::ffi::c_int;

use super::Handle;

/// What a descriptor describes: `cudnnBackendDescriptorType_t`.
#[derive(Debug, Clone, Copy)]
pub(in super::super) enum Kind {
    Pointwise = 0,
    Convolution = 1,
    Engine = 2,
    EngineConfig = 3,
    EngineHeuristics = 4,
    ExecutionPlan = 5,
    KnobChoice = 7,
    ConvolutionForward = 10,
    PointwiseOperation = 13,
    OperationGraph = 15,
    VariantPack = 16,
    Tensor = 17,
    DeviceProperties = 38,
}

/// `cudnnBackendAttributeName_t`.
#[derive(Debug, Clone, Copy)]
pub(in super::super) enum Attribute {
    PointwiseMode = 0,
    PointwisePrecision = 1,
    ConvolutionPrecision = 100,
    ConvolutionMode = 101,
    ConvolutionDilations = 102,
    ConvolutionStrides = 103,
    ConvolutionPostPaddings = 104,
    ConvolutionPrePaddings = 105,
    ConvolutionSpatialDims = 106,
    HeuristicsMode = 200,
    HeuristicsGraph = 201,
    HeuristicsResults = 202,
    HeuristicsDevice = 204,
    ConfigEngine = 300,
    ConfigKnobs = 302,
    PlanConfig = 401,
    PlanWorkspace = 402,
    PlanDevice = 407,
    KnobKind = 600,
    KnobValue = 601,
    ForwardAlpha = 700,
    ForwardBeta = 701,
    ForwardConvolution = 702,
    ForwardW = 703,
    ForwardX = 704,
    ForwardY = 705,
    PointwiseDescriptor = 750,
    PointwiseX = 751,
    PointwiseB = 752,
    PointwiseY = 753,
    GraphOperations = 801,
    TensorAlignment = 900,
    TensorDtype = 901,
    TensorDimensions = 902,
    TensorStrides = 903,
    TensorId = 906,
    TensorIsVirtual = 907,
    PackIds = 1000,
    PackPointers = 1001,
    PackWorkspace = 1003,
    EngineGraph = 1300,
    EngineIndex = 1301,
    EngineNumericalNotes = 1303,
    EngineBehaviorNotes = 1305,
    EngineDevice = 1307,
    DeviceNumber = 2700,
    DeviceJson = 2702,
}

/// A plain value of an attribute, as Rust has it; enumerations of cuDNN, which are C's `int`, are [`Named`].
pub(in super::super) trait Value: Copy {
    /// Its `cudnnBackendAttributeType_t`.
    const TYPE: c_int;
}

impl Value for bool {
    const TYPE: c_int = 2;
}
impl Value for i64 {
    const TYPE: c_int = 3;
}
impl Value for f32 {
    const TYPE: c_int = 4;
}
impl Value for Handle {
    const TYPE: c_int = 6;
}
impl Value for i32 {
    const TYPE: c_int = 23;
}
impl Value for u8 {
    const TYPE: c_int = 24;
}

/// An enumeration's number, with the type that cuDNN has for that enumeration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Named {
    /// `cudnnDataType_t`.
    Dtype(c_int),
    /// `cudnnConvolutionMode_t`.
    ConvolutionMode(c_int),
    /// `cudnnBackendHeurMode_t`.
    Heuristics(c_int),
    /// `cudnnBackendKnobType_t`.
    Knob(c_int),
    /// `cudnnPointwiseMode_t`.
    Pointwise(c_int),
}

/// The types of enumerations and descriptors.
pub(super) const TYPE_KNOB: c_int = 9;
pub(super) const TYPE_NUMERICAL_NOTE: c_int = 11;
pub(super) const TYPE_BEHAVIOR_NOTE: c_int = 19;
pub(super) const TYPE_DESCRIPTOR: c_int = 15;

impl Named {
    /// The type's number and its own.
    pub(super) fn parts(self) -> (c_int, c_int) {
        match self {
            Self::Dtype(number) => (1, number),
            Self::ConvolutionMode(number) => (7, number),
            Self::Heuristics(number) => (8, number),
            Self::Knob(number) => (TYPE_KNOB, number),
            Self::Pointwise(number) => (14, number),
        }
    }
}
