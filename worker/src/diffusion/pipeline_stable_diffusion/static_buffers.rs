//! The tensors that a batched denoising step reads and writes, and the CUDA graphs of it. They outlive a call: the next one of
//! the same shape uses them, and the graphs, again.

use std::collections::HashMap;
use std::fmt;

use tch::{Kind, TchError, Tensor};

use super::super::cuda::{CudaGraph, refused};
use super::super::kernels::{Kernels, LinearStepTensors, guided};
use super::super::models::unet_2d_condition::{UNet2DConditionModel, UNetText, UNetTime};
use super::denoising::Step;

/// Steps that are run as they are before one is captured: in the first ones libraries choose kernels and take memory. They are
/// steps of the pictures, nothing is computed for the sake of it.
const WARM_UP_STEPS: usize = 3;

/// What a call brings; all of one number of pictures.
pub(super) struct Contents {
    /// `(batch_size, channels, height, width)` in the compute dtype.
    pub latents: Tensor,
    /// A row for each picture or, with guidance, first the negative prompts' and then the prompts'.
    pub text: UNetText,
    /// `(batch_size, 1, 1, 1)` in f32; `None` without guidance.
    pub guidance_scale: Option<Tensor>,
}

/// See the module.
pub struct StaticBuffers {
    kernels: Kernels,
    latents: Tensor,
    text: UNetText,
    /// With guidance, the rows of `text` that are the prompts'.
    text_alone: Option<UNetText>,
    guidance_scale: Option<Tensor>,
    flat_time: Tensor,
    /// Parts of `flat_time`.
    time: UNetTime,
    scheduling: Scheduling,
    /// What the UNet's inner layers made, for steps without and with guidance.
    deep: [Option<Tensor>; 2],
    graphs: HashMap<Variant, Recorded>,
}

/// What stands for the noise scheduler within a step.
enum Scheduling {
    /// [`super::super::schedulers::LinearSteps`].
    Linear {
        /// `(num_rows, …)` in f32; the first is the sample.
        kept: Tensor,
        /// `1 + num_rows * (num_rows + 1)` numbers in f32.
        numbers: Tensor,
    },
    /// Nothing: the step ends with the guided prediction.
    Outside { model_input: Tensor, noise_pred: Tensor },
}

/// Steps that differ in it are different operations: with guidance, through the outermost layer only, keeping what the others made.
type Variant = (bool, bool, bool);

/// A graph of a step, or the way to one.
struct Recorded {
    graph: CudaGraph,
    warm_up_steps: usize,
}

/// How a step was done.
pub(super) struct Stepped {
    /// From a graph.
    pub is_replayed: bool,
    /// Why there is none, if that has been found out in this step.
    pub graph_error: Option<String>,
}

impl fmt::Debug for StaticBuffers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StaticBuffers").field("latents", &self.latents.size()).finish_non_exhaustive()
    }
}

impl StaticBuffers {
    /// Buffers that `contents` fit into. `num_rows` is what a linear scheduler keeps; `time` is any step's.
    pub(super) fn new(
        contents: &Contents,
        num_rows: Option<usize>,
        time: &UNetTime,
        kernels: &Kernels,
    ) -> Result<Self, TchError> {
        let Contents { latents, text, guidance_scale } = contents;
        let flat_time = time.flatten()?;
        let on_device = (Kind::Float, latents.device());
        let scheduling = match num_rows {
            Some(num_rows) => {
                let num_rows = num_rows as i64;
                let shape: Vec<i64> = std::iter::once(num_rows).chain(latents.size()).collect();
                Scheduling::Linear {
                    kept: Tensor::f_zeros(shape, on_device)?,
                    numbers: Tensor::f_zeros([1 + num_rows * (num_rows + 1)], on_device)?,
                }
            }
            None => Scheduling::Outside {
                model_input: latents.f_zeros_like()?,
                noise_pred: latents.f_zeros_like()?,
            },
        };
        let text = UNetText::cat(&[text])?;
        let batch_size = latents.size()[0];
        Ok(Self {
            kernels: kernels.clone(),
            latents: latents.f_zeros_like()?,
            text_alone: match guidance_scale {
                Some(_) => Some(text.narrow(batch_size, batch_size)?),
                None => None,
            },
            text,
            guidance_scale: guidance_scale.as_ref().map(Tensor::f_zeros_like).transpose()?,
            time: time.in_place_of(&flat_time)?,
            flat_time,
            scheduling,
            deep: [None, None],
            graphs: HashMap::new(),
        })
    }

    /// Whether these were made for a call like that.
    pub(super) fn fit(&self, contents: &Contents, num_rows: Option<usize>) -> bool {
        let own_rows = match &self.scheduling {
            Scheduling::Linear { kept, .. } => Some(kept.size()[0] as usize),
            Scheduling::Outside { .. } => None,
        };
        self.latents.size() == contents.latents.size()
            && self.guidance_scale.is_some() == contents.guidance_scale.is_some()
            && own_rows == num_rows
    }

    /// Starts a call: takes over what it brings, and forgets the one before.
    pub(super) fn fill(&mut self, contents: Contents) -> Result<(), TchError> {
        let Contents { latents, text, guidance_scale } = contents;
        self.text.copy_from(&text)?;
        if let (Some(ours), Some(theirs)) = (&mut self.guidance_scale, &guidance_scale) {
            ours.f_copy_(theirs)?;
        }
        if let Scheduling::Linear { kept, .. } = &mut self.scheduling {
            let _ = kept.f_zero_()?;
            kept.f_select(0, 0)?.f_copy_(&latents)?;
        }
        self.set_latents(&latents)
    }

    /// Pictures, made-up ones included.
    pub(super) fn batch_size(&self) -> usize {
        self.latents.size()[0] as usize
    }

    /// Sets the next step's time embedding.
    pub(super) fn set_time(&mut self, flat_time: &Tensor) -> Result<(), TchError> {
        self.flat_time.f_copy_(flat_time)
    }

    /// Sets a linear scheduler's numbers for the next step: the scale of the input, then the weights, row by row.
    pub(super) fn set_numbers(&mut self, step_numbers: &Tensor) -> Result<(), TchError> {
        match &mut self.scheduling {
            Scheduling::Linear { numbers, .. } => numbers.f_copy_(step_numbers),
            Scheduling::Outside { .. } => Ok(()),
        }
    }

    /// Sets what the UNet is shown next, where a scheduler outside says so.
    pub(super) fn set_model_input(&mut self, next: &Tensor) -> Result<(), TchError> {
        match &mut self.scheduling {
            Scheduling::Linear { .. } => Ok(()),
            Scheduling::Outside { model_input, .. } => model_input.f_copy_(next),
        }
    }

    /// Sets the latents of all pictures.
    pub(super) fn set_latents(&mut self, latents: &Tensor) -> Result<(), TchError> {
        self.latents.f_copy_(latents)
    }

    /// Copies of the guided prediction, for a scheduler outside, and of the latents.
    pub(super) fn noise_pred_and_latents(&self) -> Result<(Tensor, Tensor), TchError> {
        let noise_pred = match &self.scheduling {
            Scheduling::Linear { .. } => Tensor::new(),
            Scheduling::Outside { noise_pred, .. } => copy_of(noise_pred)?,
        };
        Ok((noise_pred, copy_of(&self.latents)?))
    }

    /// One picture's latents `(1, …)`, where they are: the next step changes them.
    pub(super) fn latents_of(&self, slot: usize) -> Result<Tensor, TchError> {
        self.latents.f_narrow(0, slot as i64, 1)
    }

    /// Does a step, from a graph if there is one. With `graph_device`, the GPU's number, graphs are made.
    pub(super) fn step(
        &mut self,
        unet: &UNet2DConditionModel,
        step: Step,
        graph_device: Option<usize>,
    ) -> Result<Stepped, TchError> {
        let plain = Stepped { is_replayed: false, graph_error: None };
        let Some(device) = graph_device else {
            return self.compute(unet, step).map(|()| plain);
        };
        let variant = (step.is_guided, step.is_cached, step.is_kept);
        let new = || CudaGraph::new(device).map(|graph| Recorded { graph, warm_up_steps: 0 });
        let mut recorded = match self.graphs.remove(&variant).map_or_else(new, Ok) {
            Ok(recorded) => recorded,
            Err(error) => return self.compute_without(unet, step, error.to_string()),
        };
        let graph = &mut recorded.graph;
        if graph.is_captured() {
            graph.replay().map_err(refused)?;
        } else if recorded.warm_up_steps < WARM_UP_STEPS {
            graph.warm_up(|| self.compute(unet, step)).map_err(refused)??;
            recorded.warm_up_steps += 1;
            self.graphs.insert(variant, recorded);
            return Ok(plain);
        } else {
            let written = graph.capture(|| self.compute(unet, step));
            let written = written.map_err(|error| error.to_string());
            match written.and_then(|written| written.map_err(|error| error.to_string())) {
                Ok(()) => graph.replay().map_err(refused)?,
                // Nothing of the step has been done.
                Err(error) => return self.compute_without(unet, step, error),
            }
        }
        self.graphs.insert(variant, recorded);
        Ok(Stepped { is_replayed: true, graph_error: None })
    }

    fn compute_without(
        &mut self,
        unet: &UNet2DConditionModel,
        step: Step,
        error: String,
    ) -> Result<Stepped, TchError> {
        self.graphs.clear();
        self.compute(unet, step)?;
        Ok(Stepped { is_replayed: false, graph_error: Some(error) })
    }

    /// The step itself. All that it allocates is its own, and nothing in it waits for the device.
    fn compute(&mut self, unet: &UNet2DConditionModel, step: Step) -> Result<(), TchError> {
        let is_guided = step.is_guided && self.guidance_scale.is_some();
        let text = if is_guided { &self.text } else { self.text_alone.as_ref().unwrap_or(&self.text) };
        let sample = match &self.scheduling {
            Scheduling::Linear { kept, numbers } => {
                let scale = numbers.f_narrow(0, 0, 1)?;
                kept.f_select(0, 0)?.f_mul(&scale)?.f_to_kind(self.latents.kind())?
            }
            Scheduling::Outside { model_input, .. } => model_input.shallow_clone(),
        };
        let kept = &mut self.deep[usize::from(is_guided)];
        let mut deep = kept.as_ref().map(Tensor::shallow_clone);
        let noise_pred = step.predict(unet, &sample, &self.time, text, &mut deep)?;
        if step.is_kept
            && let Some(made) = deep
        {
            match kept {
                Some(kept) => kept.f_copy_(&made)?,
                None => *kept = Some(copy_of(&made)?),
            }
        }
        self.finish_step(&noise_pred, is_guided)
    }

    /// From the UNet's prediction to the next step's sample.
    fn finish_step(&mut self, noise_pred: &Tensor, is_guided: bool) -> Result<(), TchError> {
        let guidance_scale = self.guidance_scale.as_ref().filter(|_| is_guided);
        match &mut self.scheduling {
            Scheduling::Outside { noise_pred: kept, .. } => {
                kept.f_copy_(&guided(noise_pred, guidance_scale)?)
            }
            Scheduling::Linear { kept, numbers } => self.kernels.linear_step(&LinearStepTensors {
                noise_pred,
                guidance_scale,
                numbers,
                kept,
                sample: &self.latents,
            }),
        }
    }
}

/// The same numbers in a tensor of their own.
pub(super) fn copy_of(tensor: &Tensor) -> Result<Tensor, TchError> {
    let mut copy = tensor.f_zeros_like()?;
    copy.f_copy_(tensor)?;
    Ok(copy)
}
