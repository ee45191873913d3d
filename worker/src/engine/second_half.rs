//! From denoised calls to pictures, on whichever thread.

use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use super::running::{DenoisedCall, Poison, Running, panicked};
use crate::pipeline::{PipelineError, StageTimes};
use crate::trace::{Span, Stage, Trace};

/// See the module.
pub(super) struct SecondHalf {
    pub trace: Trace,
    pub poison: Poison,
    /// Whether the thread is another than the pipeline's.
    pub is_beside: bool,
}

impl SecondHalf {
    /// Finishes what is denoised of a microbatch. What is not wanted any more is given up before it is decoded.
    pub(super) fn finish(&self, running: &mut Running) {
        for DenoisedCall { call, denoised, from, to } in mem::take(&mut running.denoised) {
            if !running.go_on_with(&call) {
                continue;
            }
            let started = Instant::now();
            let control = &mut running.control;
            let finish = AssertUnwindSafe(|| (denoised.finish)(control));
            let mut generated = catch_unwind(finish).unwrap_or_else(|panic| Err(panicked(&*panic)));
            if let Ok(generated) = &mut generated {
                generated.times.wait = started - to;
            }
            let times = generated.as_ref().map(|generated| generated.times);
            let span = |stage, from, to| Span {
                stage,
                microbatch_id: running.microbatch_id,
                picture: None,
                pictures: call.len(),
                from,
                to,
            };
            self.tell(&span, [from, to, started, Instant::now()], times);
            match generated {
                Ok(generated) => running.fill(call, generated),
                Err(failure) => running.fail(call, failure),
            }
        }
        if self.poison.why().is_some() {
            running.give_up_the_rest();
        }
    }

    /// Notes a call's spans: `moments` are the first half's start and end and the second's.
    fn tell(
        &self,
        span: &dyn Fn(Stage, Instant, Instant) -> Span,
        moments: [Instant; 4],
        times: Result<StageTimes, &PipelineError>,
    ) {
        let [from, denoised, started, to] = moments;
        let times = times.unwrap_or_default();
        if self.is_beside {
            self.trace.span(span(Stage::WaitForDecoder, denoised, started));
            let StageTimes { vae, safety, .. } = times;
            let second = StageTimes { vae, safety, ..StageTimes::default() };
            self.trace.generated(span(Stage::Finish, started, to), second);
        } else {
            self.trace.generated(span(Stage::Generate, from, to), times);
        }
    }
}
