//! Schedules whose steps are sums with numbers that are known before the first of them: then a step is the same few
//! operations each time on different numbers, which is what a CUDA graph can hold.

/// All steps of a schedule. Between steps `num_rows` tensors are kept, each of the sample's shape: the first is the sample, the
/// others are what the scheduler looks back on, and are zero at first.
#[derive(Debug, Clone, PartialEq)]
pub struct LinearSteps {
    /// Tensors kept, at least one.
    pub num_rows: usize,
    /// In order, one for each timestep.
    pub steps: Vec<LinearStep>,
}

/// One step.
#[derive(Debug, Clone, PartialEq)]
pub struct LinearStep {
    /// What the sample is multiplied with before the UNet is shown it.
    pub input_scale: f64,
    /// For each tensor kept, what it becomes: the weights of all kept ones and, last, of the UNet's (guided) output.
    pub rows: Vec<Vec<f64>>,
}

impl LinearStep {
    /// `rows`, each after the other.
    pub fn weights(&self) -> Vec<f64> {
        self.rows.concat()
    }
}

#[cfg(test)]
mod tests {
    use tch::{Kind, Tensor};

    use super::super::{SchedulerConfig, SchedulerKind};

    const LINEAR: [SchedulerKind; 5] = [
        SchedulerKind::Pndm,
        SchedulerKind::Ddim,
        SchedulerKind::Euler,
        SchedulerKind::Dpmpp2m,
        SchedulerKind::Dpmpp2mKarras,
    ];

    fn config(extra: &str) -> SchedulerConfig {
        let json = format!(
            r#"{{"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012,
                "beta_schedule": "scaled_linear", "skip_prk_steps": true, "set_alpha_to_one": false{extra}}}"#
        );
        SchedulerConfig::from_json(&json).unwrap()
    }

    /// Numbers that look like noise, without libtorch's generator.
    fn noise(seed: i64) -> Tensor {
        let numbers: Vec<f32> =
            (0..64).map(|i| ((i * 37 + seed * 101) as f32 * 12.9898).sin() * 1.7).collect();
        Tensor::from_slice(&numbers).view([1, 4, 4, 4])
    }

    /// Runs both on the same outputs; the largest difference between samples, by the sample's largest value.
    fn difference(kind: SchedulerKind, config: &SchedulerConfig, num_inference_steps: usize) -> f64 {
        let mut scheduler = kind.build(config, num_inference_steps).unwrap();
        let linear = scheduler.linear_steps().unwrap().unwrap();
        assert_eq!(linear.steps.len(), scheduler.timesteps().len());
        let mut sample = noise(0) * scheduler.init_noise_sigma();
        let mut kept: Vec<Tensor> = (0..linear.num_rows).map(|_| sample.zeros_like()).collect();
        kept[0] = sample.copy();
        let mut worst: f64 = 0.0;
        let largest = |tensor: &Tensor| tensor.abs().max().double_value(&[]);
        for (step_index, step) in linear.steps.iter().enumerate() {
            let input = scheduler.scale_model_input(&sample, step_index).unwrap();
            worst = worst.max(largest(&(&input - &kept[0] * step.input_scale)) / largest(&input));
            let output = noise(step_index as i64 + 1);
            sample = scheduler.step(&output, step_index, &sample, &mut []).unwrap();
            kept.push(output);
            let sum = |weights: &Vec<f64>| {
                let terms =
                    kept.iter().zip(weights).map(|(tensor, weight)| tensor.to_kind(Kind::Double) * *weight);
                terms.reduce(|a, b| a + b).unwrap().to_kind(Kind::Float)
            };
            kept = step.rows.iter().map(sum).collect();
            worst = worst.max(largest(&(&sample - &kept[0])) / largest(&sample));
        }
        worst
    }

    #[test]
    fn they_are_the_schedulers_own_steps() {
        for extra in ["", r#", "prediction_type": "v_prediction""#, r#", "solver_type": "heun""#] {
            let config = config(extra);
            for kind in LINEAR {
                for num_inference_steps in [1, 2, 3, 5, 20, 50] {
                    let difference = difference(kind, &config, num_inference_steps);
                    assert!(difference < 1e-5, "{kind}, {num_inference_steps} steps{extra}: {difference:e}");
                }
            }
        }
    }

    #[test]
    fn what_cannot_be_written_so_says_so() {
        for kind in SchedulerKind::ALL.into_iter().filter(|kind| !LINEAR.contains(kind)) {
            assert_eq!(kind.build(&config(""), 10).unwrap().linear_steps().unwrap(), None, "{kind}");
        }
        let config = SchedulerConfig::from_json(r#"{"_class_name": "PNDMScheduler"}"#).unwrap();
        assert_eq!(SchedulerKind::Pndm.build(&config, 10).unwrap().linear_steps().unwrap(), None);
    }
}
