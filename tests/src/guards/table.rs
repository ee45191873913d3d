//! Which guards there are. `tests/it/guards.rs` sees that each stands where this says.

use super::{Cut, Guard, Target};

/// Cancelled, completed and discarded jobs absorb: the trigger behind every statement.
const FINAL_ABSORBS: Cut = Cut {
    file: "migrations/0005_jobs.sql",
    text: "WHEN (OLD.state IN ('completed', 'cancelled', 'discarded'))",
    replacement: "WHEN (false)",
};
/// One image row a job, by its index.
const ONE_IMAGE: Cut = Cut {
    file: "migrations/0006_attempts_and_images.sql",
    text: "job_id              uuid NOT NULL UNIQUE,",
    replacement: "job_id              uuid NOT NULL,",
};
/// A batch needs an acceptance that is valid, by trigger.
const VALID_ACCEPTANCE: Cut = Cut {
    file: "migrations/0004_batches.sql",
    text: "IF NOT FOUND THEN\n        RAISE EXCEPTION 'licence acceptance %",
    replacement: "IF false THEN\n        RAISE EXCEPTION 'licence acceptance %",
};

/// All of them, by promise.
pub const GUARDS: &[Guard] = &[
    Guard {
        promise: "P1",
        what: "the rescuer takes jobs whose lease has expired",
        cuts: &[Cut {
            file: "schema/src/catalog/rescue.rs",
            text: "WHERE state = 'running' AND lease_expires_at < now()",
            replacement: "WHERE state = 'running' AND false",
        }],
        target: Target::Schema,
        tests: &["claims::an_expired_lease_is_rescued_and_its_holder_told"],
    },
    Guard {
        promise: "P1",
        what: "the republisher takes back what the broker lost",
        cuts: &[Cut {
            file: "schema/src/catalog/relay.rs",
            text: "AND published_at <= now() - make_interval(secs => $3)",
            replacement: "AND false AND published_at <= now() - make_interval(secs => $3)",
        }],
        target: Target::Schema,
        tests: &["relay::what_the_broker_lost_is_published_again"],
    },
    Guard {
        promise: "P1",
        what: "the relay marks only what the broker has confirmed",
        cuts: &[Cut {
            file: "scheduler/src/relay.rs",
            text: "filter(|&(_, &outcome)| outcome == PublishOutcome::Confirmed)",
            replacement: "filter(|_| true)",
        }],
        target: Target::Scheduler,
        tests: &["relay::tests::only_what_the_broker_holds_is_marked"],
    },
    Guard {
        promise: "P1",
        what: "a batch is committed with all its jobs or not at all",
        cuts: &[Cut {
            file: "migrations/0005_jobs.sql",
            text: "IF written <> NEW.job_count THEN",
            replacement: "IF false THEN",
        }],
        target: Target::Schema,
        tests: &["constraints::a_batch_comes_with_all_its_jobs_and_no_later_ones"],
    },
    Guard {
        promise: "P1",
        what: "a claim waits for a row that the relay is marking",
        cuts: &[Cut {
            file: "schema/src/catalog/claims.rs",
            text: "ORDER BY job_id FOR NO KEY UPDATE\n            ), claimed AS (",
            replacement: "ORDER BY job_id FOR NO KEY UPDATE SKIP LOCKED\n            ), claimed AS (",
        }],
        target: Target::Schema,
        tests: &["claims::a_claim_waits_for_a_row_that_is_locked"],
    },
    Guard {
        promise: "P2",
        what: "the unique index on `images.job_id`",
        cuts: &[ONE_IMAGE],
        target: Target::Schema,
        tests: &["image_constraints::an_image_row_counts_and_stays"],
    },
    Guard {
        promise: "P2",
        what: "all that keeps twins of one lease apart: the state in `complete_if_leased`, the index, the final state, the ended attempt",
        cuts: &[
            Cut {
                file: "schema/src/catalog/completion.rs",
                text: "AND (jobs.state = 'running') IS TRUE\n        ORDER BY jobs.job_id FOR NO KEY UPDATE OF jobs",
                replacement: "ORDER BY jobs.job_id FOR NO KEY UPDATE OF jobs",
            },
            Cut {
                file: "schema/src/catalog/completion.rs",
                text: "AND (jobs.state = 'running') IS TRUE\n        RETURNING jobs.job_id, jobs.image_id",
                replacement: "RETURNING jobs.job_id, jobs.image_id",
            },
            ONE_IMAGE,
            FINAL_ABSORBS,
            Cut {
                file: "migrations/0006_attempts_and_images.sql",
                text: "FOR EACH ROW WHEN (OLD.ended_at IS NOT NULL)",
                replacement: "FOR EACH ROW WHEN (false)",
            },
            // Twins report one object, which this index would tell.
            Cut {
                file: "migrations/0006_attempts_and_images.sql",
                text: "object_key          text UNIQUE,",
                replacement: "object_key          text,",
            },
        ],
        target: Target::Schema,
        tests: &["completion::simultaneous_twins_make_one_image"],
    },
    Guard {
        promise: "P2",
        what: "an object's key is a function of the job and its bytes",
        cuts: &[Cut {
            file: "worker/src/completer.rs",
            text: "ObjectKey::new(picture.job.batch_id, picture.job.ordinal, &sha256)",
            replacement: "ObjectKey::new(picture.job.batch_id, picture.job.ordinal, \
                          &Sha256Digest::of(uuid::Uuid::new_v4().as_bytes()))",
        }],
        target: Target::WorkerInMemory,
        tests: &["order::a_job_that_runs_twice_finds_its_object_there"],
    },
    Guard {
        promise: "P3",
        what: "the completer records only what was stored",
        cuts: &[Cut {
            file: "worker/src/completer.rs",
            text: "Ok(Stored::AlreadyThere) => self.metrics.already_there.increment(),\n            \
                   Err(error) => return Err((picture, error.into())),",
            replacement: "Ok(Stored::AlreadyThere) => self.metrics.already_there.increment(),\n            Err(_) => {}",
        }],
        target: Target::WorkerInMemory,
        tests: &["failures::jobs_whose_pictures_cannot_be_stored_go_back_unharmed"],
    },
    Guard {
        promise: "P3",
        what: "the digest that is sent and recorded is that of the bytes",
        cuts: &[Cut {
            file: "worker/src/completer.rs",
            text: "let sha256 = Sha256Digest::of(&bytes);",
            replacement: "let sha256 = Sha256Digest::of(&bytes[1..]);",
        }],
        target: Target::WorkerInMemory,
        tests: &["order::each_job_is_stored_then_completed_then_acked"],
    },
    Guard {
        promise: "P3",
        what: "an image row is never changed",
        cuts: &[Cut {
            file: "migrations/0006_attempts_and_images.sql",
            text: "CREATE TRIGGER images_are_kept BEFORE UPDATE OR DELETE ON images",
            replacement: "CREATE TRIGGER images_are_kept BEFORE DELETE ON images",
        }],
        target: Target::Schema,
        tests: &["image_constraints::an_image_row_counts_and_stays"],
    },
    Guard {
        promise: "P4",
        what: "the fencing token in `complete_if_leased`",
        cuts: &[Cut {
            file: "schema/src/catalog/completion.rs",
            text: "FROM jobs JOIN given USING (job_id, lease_generation)",
            replacement: "FROM jobs JOIN given USING (job_id)",
        }],
        target: Target::Schema,
        tests: &[
            "claims::an_expired_lease_is_rescued_and_its_holder_told",
            "completion::a_lost_lease_does_not_spoil_its_neighbours",
            "interleavings::any_interleaving_agrees_with_the_model",
        ],
    },
    Guard {
        promise: "P4",
        what: "the trigger that lets nothing change a final job",
        cuts: &[FINAL_ABSORBS],
        target: Target::Schema,
        tests: &["transitions::nothing_changes_a_job_that_is_final"],
    },
    Guard {
        promise: "P4",
        what: "the trigger that knows the chart of moves",
        cuts: &[Cut {
            file: "migrations/0005_jobs.sql",
            text: "WHERE from_state = OLD.state AND to_state = NEW.state;",
            replacement: "WHERE true;",
        }],
        target: Target::Schema,
        tests: &["transitions::postgres_lets_through_what_the_chart_has_and_nothing_else"],
    },
    Guard {
        promise: "P4",
        what: "a claim takes available jobs alone (twice in the statement)",
        cuts: &[
            Cut {
                file: "schema/src/catalog/claims.rs",
                text: "WHERE job_id = ANY (ARRAY(SELECT unnest($1))) AND (state = 'available') IS TRUE",
                replacement: "WHERE job_id = ANY (ARRAY(SELECT unnest($1)))",
            },
            Cut {
                file: "schema/src/catalog/claims.rs",
                text: "AND (jobs.state = 'available') IS TRUE",
                replacement: "",
            },
        ],
        target: Target::Schema,
        tests: &["claims::what_is_not_available_is_left_out"],
    },
    Guard {
        promise: "P5",
        what: "the trigger that asks for a valid acceptance",
        cuts: &[VALID_ACCEPTANCE],
        target: Target::Schema,
        tests: &[
            "licences::the_tables_hold_the_licence_rule_by_themselves",
            "licences::a_submission_waits_for_a_revocation_in_progress",
        ],
    },
    Guard {
        promise: "P5",
        what: "the submission's question for a valid acceptance, and that trigger behind it",
        cuts: &[
            VALID_ACCEPTANCE,
            Cut {
                file: "schema/src/catalog/submission.rs",
                text: "AND acceptance.principal = $2 AND acceptance.revoked_at IS NULL",
                replacement: "AND acceptance.principal = $2",
            },
        ],
        target: Target::Schema,
        tests: &["licences::a_revoked_acceptance_does_not_count"],
    },
    Guard {
        promise: "P5",
        what: "the foreign key to an acceptance by the same principal, of the same licence",
        cuts: &[Cut {
            file: "migrations/0004_batches.sql",
            text: "FOREIGN KEY (acceptance_id, licence_id, principal)\n        \
                   REFERENCES licence_acceptances (acceptance_id, licence_id, principal)",
            replacement: "FOREIGN KEY (acceptance_id) REFERENCES licence_acceptances (acceptance_id)",
        }],
        target: Target::Schema,
        tests: &["licences::the_tables_hold_the_licence_rule_by_themselves"],
    },
    Guard {
        promise: "P5",
        what: "a revocation takes its time after it has the row",
        cuts: &[Cut {
            file: "schema/src/catalog/licences.rs",
            text: "AND revoked_at IS NULL\n                FOR NO KEY UPDATE",
            replacement: "AND revoked_at IS NULL",
        }],
        target: Target::Schema,
        tests: &["licences::a_revocation_that_waited_is_later_than_what_it_waited_for"],
    },
    Guard {
        promise: "P5",
        what: "a submission leans on no acceptance that is later than itself",
        cuts: &[Cut {
            file: "schema/src/catalog/submission.rs",
            text: "AND acceptance.accepted_at <= now()",
            replacement: "AND true",
        }],
        target: Target::Schema,
        tests: &["licences::a_submission_that_began_before_the_acceptance_does_not_lean_on_it"],
    },
    Guard {
        promise: "P7",
        what: "a microbatch is told of a lease that is gone",
        cuts: &[Cut {
            file: "worker/src/lease.rs",
            text: "                microbatch.control.lease_lost(lost.job_id);\n",
            replacement: "",
        }],
        target: Target::WorkerInMemory,
        tests: &["leases::a_cancelled_job_is_dropped_and_its_neighbors_go_on"],
    },
    Guard {
        promise: "P7",
        what: "the denoising loop drops a picture between two steps",
        cuts: &[Cut {
            file: "worker/src/diffusion/pipeline_stable_diffusion/denoising.rs",
            text: "StepControl::Drop(dropped) => self.drop_pictures(&dropped, step_index),",
            replacement: "StepControl::Drop(_) => {}",
        }],
        target: Target::WorkerPipeline,
        tests: &["dropped_pictures_stop_and_the_others_stay_the_same"],
    },
    Guard {
        promise: "P7",
        what: "a lease is extended only as it was given: its token, its state, its worker",
        cuts: &[
            Cut {
                file: "schema/src/catalog/claims.rs",
                text: "SELECT job_id, lease_generation,\n                       lease_expires_at <=",
                replacement: "SELECT jobs.job_id, jobs.lease_generation,\n                       lease_expires_at <=",
            },
            Cut {
                file: "schema/src/catalog/claims.rs",
                text: "AS given (job_id, lease_generation)\n                    USING (job_id, lease_generation)\n                WHERE job_id = ANY (ARRAY(SELECT unnest($1))) AND (state = 'running') IS TRUE AND leased_by = $3\n            ), due AS (",
                replacement: "AS given (job_id, given_generation)\n                    ON jobs.job_id = given.job_id\n            ), due AS (",
            },
            // A job that does not run has no end of its lease.
            Cut {
                file: "schema/src/catalog/claims.rs",
                text: "SELECT job_id FROM held WHERE NOT is_due UNION ALL",
                replacement: "SELECT job_id FROM held WHERE is_due IS NOT TRUE UNION ALL",
            },
        ],
        target: Target::Schema,
        tests: &["cancellation::a_batch_is_cancelled_except_for_what_is_final"],
    },
    Guard {
        promise: "P8",
        what: "each picture has a generator of its own",
        cuts: &[Cut {
            file: "worker/src/diffusion/pipeline_stable_diffusion/denoising.rs",
            text: "Generator::new(request.seed)",
            replacement: "Generator::new(request.seed + index as u64)",
        }],
        target: Target::WorkerPipeline,
        tests: &["a_microbatch_equals_single_calls_bit_for_bit"],
    },
    Guard {
        promise: "P8",
        what: "on the CPU the UNet sees each picture by itself",
        cuts: &[Cut {
            file: "worker/src/diffusion/pipeline_stable_diffusion/batching.rs",
            text: "ComputeDevice::Cpu => Self { size: BatchSize::Alone,",
            replacement: "ComputeDevice::Cpu => Self { size: BatchSize::AsGiven,",
        }],
        target: Target::WorkerPipeline,
        tests: &["a_microbatch_equals_single_calls_bit_for_bit"],
    },
    Guard {
        promise: "P8",
        what: "a picture by another recipe than its job's is not recorded",
        cuts: &[Cut {
            file: "migrations/0014_cheaper_guards.sql",
            text: "IF NOT is_by_its_recipe THEN",
            replacement: "IF false THEN",
        }],
        target: Target::Schema,
        tests: &["recipes::a_picture_by_another_recipe_than_its_jobs_is_refused"],
    },
    Guard {
        promise: "P8",
        what: "pictures that are computed together make a batch of one size",
        cuts: &[Cut {
            file: "worker/src/diffusion/pipeline_stable_diffusion/batching.rs",
            text: "BatchSize::Padded(size) => Some(size.max(num_pictures)),",
            replacement: "BatchSize::Padded(_) => Some(num_pictures),",
        }],
        target: Target::WorkerCompany,
        tests: &["in_every_place_of_a_batch_of_one_size_a_picture_has_the_same_bits"],
    },
    Guard {
        promise: "P8",
        what: "what waits to be decoded lies apart from what the next call writes to",
        cuts: &[Cut {
            file: "worker/src/diffusion/pipeline_stable_diffusion/denoising.rs",
            text: "Ok(if is_batched { copy_of(&picture.latents)? } else { picture.latents })",
            replacement: "Ok(if is_batched { picture.latents.shallow_clone() } else { picture.latents })",
        }],
        target: Target::WorkerCompany,
        tests: &["what_waits_to_be_decoded_is_not_touched_by_the_next_call"],
    },
];
