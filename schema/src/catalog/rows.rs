//! Reading rows: our text types as SQL text, and a job's spec from its columns.

use sqlx::encode::IsNull;
use sqlx::error::BoxDynError;
use sqlx::postgres::{PgArgumentBuffer, PgTypeInfo, PgValueRef};
use sqlx::{Decode, Encode, Postgres, Type};

use super::error::CatalogError;
use crate::id::JobId;
use crate::job_spec::valid::{UncheckedSpec, ValidJobSpec};
use crate::model_name::ModelName;
use crate::object_key::ObjectKey;
use crate::recipe::Recipe;
use crate::sha256::Sha256Digest;
use crate::state::NoiseScheduler;

macro_rules! as_sql_text {
    ($($name:ty),+) => {
        $(
            impl Type<Postgres> for $name {
                fn type_info() -> PgTypeInfo {
                    <String as Type<Postgres>>::type_info()
                }

                fn compatible(info: &PgTypeInfo) -> bool {
                    <String as Type<Postgres>>::compatible(info)
                }
            }

            impl Encode<'_, Postgres> for $name {
                fn encode_by_ref(&self, buffer: &mut PgArgumentBuffer) -> Result<IsNull, BoxDynError> {
                    <String as Encode<Postgres>>::encode(self.to_string(), buffer)
                }
            }

            impl<'r> Decode<'r, Postgres> for $name {
                fn decode(value: PgValueRef<'r>) -> Result<Self, BoxDynError> {
                    Ok(<&str as Decode<Postgres>>::decode(value)?.parse()?)
                }
            }
        )+
    };
}
as_sql_text!(ModelName, ObjectKey, Sha256Digest);

/// The columns of `jobs` that hold its spec.
#[derive(sqlx::FromRow)]
pub(super) struct SpecColumns {
    prompt: String,
    negative_prompt: String,
    seed: i64,
    num_inference_steps: i32,
    guidance_scale: f32,
    width: i32,
    height: i32,
    noise_scheduler: NoiseScheduler,
    #[sqlx(flatten)]
    recipe: Recipe,
    client_ref: Option<String>,
}

impl SpecColumns {
    /// The spec in these columns of job `job_id`. The table's CHECKs keep the same rules, so it is valid.
    pub(super) fn into_spec(self, job_id: JobId) -> Result<ValidJobSpec, CatalogError> {
        // A number out of range becomes one that the rules refuse.
        let number = |number: i32| u32::try_from(number).unwrap_or(u32::MAX);
        let unchecked = UncheckedSpec {
            prompt: self.prompt,
            negative_prompt: self.negative_prompt,
            seed: u64::try_from(self.seed).unwrap_or(u64::MAX),
            num_inference_steps: number(self.num_inference_steps),
            guidance_scale: self.guidance_scale,
            width: number(self.width),
            height: number(self.height),
            noise_scheduler: self.noise_scheduler,
            recipe: self.recipe,
            client_ref: self.client_ref,
        };
        ValidJobSpec::try_from(unchecked).map_err(|faults| CatalogError::Unreadable {
            what: format!("the spec of job `{job_id}`"),
            source: faults.into(),
        })
    }
}
