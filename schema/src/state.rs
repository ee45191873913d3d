//! The words of a job's life: its states and the moves between them, how attempts end, and what a lease is.
//!
//! [`TRANSITIONS`] is the chart. Table `job_state_transitions` holds the same pairs and a trigger refuses every
//! other move; a test compares the two, the SQL enums, and the chart in `migrations/README.md`.

use crate::id::JobId;
use crate::words::word_enum;

word_enum! {
    /// Where a job stands. What moves it on is written beside each state.
    JobState: "job_state", "job state" {
        /// Waits for a worker. Moves on when claimed or cancelled.
        Available = "available",
        /// A worker holds its lease. Moves on when completed, failed, released, cancelled, or rescued after the lease expired.
        Running = "running",
        /// An attempt failed and another is due at `scheduled_at`. Moves on when staged or cancelled.
        Retryable = "retryable",
        /// Its image is recorded. Final.
        Completed = "completed",
        /// A person no longer wants it. Final.
        Cancelled = "cancelled",
        /// Given up: its retries are spent or retrying cannot help. Final.
        Discarded = "discarded",
    }
}

impl JobState {
    /// Whether nothing leaves this state: `finalized_at` is set and late writers change nothing.
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Completed | Self::Cancelled | Self::Discarded)
    }

    /// Whether the chart has a move from this state to `next`.
    pub fn may_become(self, next: Self) -> bool {
        TRANSITIONS.contains(&(self, next))
    }
}

/// Every move a job may make. Nothing leaves a final state.
pub const TRANSITIONS: &[(JobState, JobState)] = &[
    // Claimed by a worker.
    (JobState::Available, JobState::Running),
    (JobState::Available, JobState::Cancelled),
    // The image is recorded.
    (JobState::Running, JobState::Completed),
    // Released by a worker that shuts down, or rescued from one that is gone; the attempt is given back.
    (JobState::Running, JobState::Available),
    // Failed with attempts left.
    (JobState::Running, JobState::Retryable),
    // Failed with none left, or with an error that another attempt cannot cure.
    (JobState::Running, JobState::Discarded),
    (JobState::Running, JobState::Cancelled),
    // Staged: its time has come.
    (JobState::Retryable, JobState::Available),
    (JobState::Retryable, JobState::Cancelled),
];

word_enum! {
    /// How one attempt ended. Only `error` spends the retry budget.
    AttemptOutcome: "attempt_outcome", "attempt outcome" {
        /// The image was recorded.
        Ok = "ok",
        /// The job failed; its error class says how.
        Error = "error",
        /// The lease expired and the job was rescued: the worker is gone or was too slow.
        Lost = "lost",
        /// The worker shut down and gave the job back.
        Preempted = "preempted",
        /// The job was cancelled while it ran.
        Cancelled = "cancelled",
    }
}

word_enum! {
    /// What kind of fault made an attempt fail.
    ErrorClass: "error_class", "error class" {
        /// The job's own spec cannot be done: retrying cannot help.
        Input = "input",
        /// The safety checker itself failed; a flagged picture is no error.
        Safety = "safety",
        /// A server or the network failed.
        Infra = "infra",
        /// The device had too little memory.
        OutOfMemory = "out_of_memory",
        /// The model produced NaN or infinity.
        NonFinite = "non_finite",
        /// Darkroom's own fault.
        Bug = "bug",
    }
}

word_enum! {
    /// How urgent a batch is. Each model has one queue per band.
    #[derive(Default)]
    PriorityBand: "priority_band", "priority band" {
        /// Before everything else, without starving it.
        High = "high",
        /// What a batch gets when nobody says otherwise.
        #[default]
        Normal = "normal",
        /// When there is room.
        Low = "low",
    }
}

word_enum! {
    /// A noise scheduler that a job may ask for, by the name people use.
    NoiseScheduler: "noise_scheduler", "noise scheduler" {
        /// Pseudo numerical methods (PLMS), the default of Stable Diffusion v1.
        Pndm = "pndm",
        /// Denoising diffusion implicit models.
        Ddim = "ddim",
        /// Euler's method.
        Euler = "euler",
        /// Euler's method with fresh noise at each step.
        EulerA = "euler_a",
        /// DPM-Solver++ 2M.
        Dpmpp2m = "dpmpp_2m",
        /// DPM-Solver++ 2M on Karras et al.'s noise levels.
        Dpmpp2mKarras = "dpmpp_2m_karras",
        /// UniPC, order 2.
        Unipc = "unipc",
        /// Linear multistep.
        Lms = "lms",
    }
}

/// The right to run one job: the job and the fencing token that the claim drew.
///
/// The token only grows, so a writer that comes late holds a smaller one and changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct Lease {
    /// The job that may be run.
    pub job_id: JobId,
    /// The fencing token of the claim.
    pub lease_generation: i64,
}

/// The answer to a writer whose lease is no longer the job's: it was rescued, cancelled, or has ended already.
/// Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the lease on job `{}` (generation {}) is lost; nothing was changed", .0.job_id, .0.lease_generation)]
pub struct LeaseLost(pub Lease);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn final_states_absorb_and_all_others_reach_one() {
        for &state in JobState::ALL {
            let leaves = TRANSITIONS.iter().any(|&(from, _)| from == state);
            assert_eq!(leaves, !state.is_final(), "{state}");
            assert!(!state.may_become(state), "{state} to itself is no move");
        }
    }

    #[test]
    fn words_round_trip_through_text_and_json() {
        for &state in JobState::ALL {
            assert_eq!(state.as_str().parse(), Ok(state));
            assert_eq!(serde_json::to_string(&state).unwrap(), format!("\"{state}\""));
        }
        for &noise_scheduler in NoiseScheduler::ALL {
            assert_eq!(noise_scheduler.as_str().parse(), Ok(noise_scheduler));
        }
    }

    #[test]
    fn an_unknown_word_is_told_the_known_ones() {
        insta::assert_snapshot!("urgent".parse::<PriorityBand>().unwrap_err(), @"`urgent` is not a priority band; it has to be one of high, normal, low");
        insta::assert_snapshot!("k_euler".parse::<NoiseScheduler>().unwrap_err(), @"`k_euler` is not a noise scheduler; it has to be one of pndm, ddim, euler, euler_a, dpmpp_2m, dpmpp_2m_karras, unipc, lms");
    }
}
