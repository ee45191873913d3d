//! The ids: one type each, so that a batch's id cannot stand where a job's belongs.
//!
//! Ids that a process draws are UUIDs of version 7, which sort by time and keep index pages warm. A job's id is
//! derived from its batch and ordinal (version 5), so writing the same batch again names the same jobs.

use uuid::Uuid;

macro_rules! uuid_newtype {
    ($(#[$meta:meta])* $name:ident) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[derive(serde::Serialize, serde::Deserialize, sqlx::Type)]
        #[serde(transparent)]
        #[sqlx(transparent)]
        pub struct $name(Uuid);

        impl $name {
            /// The id as a plain UUID.
            pub const fn as_uuid(self) -> Uuid {
                self.0
            }
        }

        impl From<Uuid> for $name {
            fn from(uuid: Uuid) -> Self {
                Self(uuid)
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }

        impl std::str::FromStr for $name {
            type Err = uuid::Error;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                Uuid::parse_str(text).map(Self)
            }
        }
    };
}

macro_rules! drawn_id {
    ($($(#[$meta:meta])* $name:ident,)+) => {
        $(
            uuid_newtype! { $(#[$meta])* $name }

            impl $name {
                /// A new id: a UUID of version 7, so ids sort by when they were drawn.
                pub fn generate() -> Self {
                    Self(Uuid::now_v7())
                }
            }
        )+
    };
}

drawn_id! {
    /// Names one batch.
    BatchId,
    /// Names one registered model.
    ModelId,
    /// Names one licence text.
    LicenceId,
    /// Names one principal's acceptance of one licence.
    AcceptanceId,
    /// Names one image row.
    ImageId,
    /// Names one run of one worker process.
    WorkerId,
    /// Names the jobs that shared one forward pass.
    MicrobatchId,
}

uuid_newtype! {
    /// Names one job. Derived from the batch and the job's place in it.
    JobId
}

impl JobId {
    /// The id of the job at `ordinal` (from 0) of batch `batch_id`: always the same for the same two.
    pub fn of(batch_id: BatchId, ordinal: u32) -> Self {
        Self(Uuid::new_v5(&batch_id.0, &ordinal.to_be_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_id_is_a_function_of_batch_and_ordinal() {
        let batch_id: BatchId = "0190f5fe-7c00-7a00-8000-000000000001".parse().unwrap();
        insta::assert_snapshot!(JobId::of(batch_id, 0), @"18e2d600-1338-5e33-8ec4-383ff772c9ab");
        assert_eq!(JobId::of(batch_id, 7), JobId::of(batch_id, 7));
        assert_ne!(JobId::of(batch_id, 7), JobId::of(batch_id, 8));
        assert_ne!(JobId::of(batch_id, 7), JobId::of(BatchId::generate(), 7));
        assert_eq!(JobId::of(batch_id, 7).as_uuid().get_version_num(), 5);
    }

    #[test]
    fn drawn_ids_sort_by_time() {
        let ids: Vec<BatchId> = (0..100).map(|_| BatchId::generate()).collect();
        assert!(ids.is_sorted());
    }
}
