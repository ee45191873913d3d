//! Settings of how the pictures of a call are computed.

use crate::diffusion::{BatchSize, Batching, ComputeDevice};

/// On or off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Switch {
    /// Yes.
    On,
    /// No.
    Off,
}

impl Switch {
    /// Whether it is on.
    pub fn is_on(self) -> bool {
        self == Self::On
    }
}

/// How the pictures of a call are computed; a matter of speed and of last bits.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct BatchingArgs {
    /// On a GPU, launch a denoising step as one CUDA graph, where it can be. Not measured yet, so off by itself.
    #[arg(long, value_name = "on|off", default_value = "off", hide_possible_values = true)]
    pub graph: Switch,
    /// Compute so many pictures at once, the missing ones made up: with a fleet's number, the last bits are the fleet's. 0
    /// makes nothing up.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u16).range(0..=1024))]
    pub pad_batch: u16,
}

impl BatchingArgs {
    /// In the model code's words.
    pub fn to_batching(self, device: ComputeDevice) -> Batching {
        batching(device, self.graph, self.pad_batch)
    }
}

/// What suits `device`, filled up to `pad_batch` pictures if that is not 0.
pub fn batching(device: ComputeDevice, graph: Switch, pad_batch: u16) -> Batching {
    let suited = Batching { graph: graph.is_on(), ..Batching::of(device) };
    match pad_batch {
        0 => suited,
        size => Batching { size: BatchSize::Padded(size.into()), ..suited },
    }
}
