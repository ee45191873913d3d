//! Reads a component's JSON field by field, so that each fault can name its file, field, rule and value, and all
//! faults of a file are found in one reading.

use std::cell::RefCell;
use std::fs;
use std::path::Path;

use serde_json::{Map, Value};

use super::load_error::Fault;

/// One JSON object of a checkpoint, with the faults found in it so far.
///
/// The accessors take diffusers' default for an absent or null field. After a fault they return that default, so that
/// reading goes on; [`ConfigFile::into_result`] tells in the end.
#[derive(Debug)]
pub struct ConfigFile {
    file: String,
    path: String,
    fields: Map<String, Value>,
    faults: RefCell<Vec<Fault>>,
}

impl ConfigFile {
    /// Reads `file`, a path relative to the checkpoint's folder.
    pub fn read(directory: &Path, file: &str) -> Result<Self, Fault> {
        let text = read_text(directory, file)?;
        let not_an_object = |reason: String| Fault::Json { file: file.to_owned(), reason };
        match serde_json::from_str(&text) {
            Ok(Value::Object(fields)) => Ok(Self::from_fields(file, fields)),
            Ok(_) => Err(not_an_object("it is JSON of another type".to_owned())),
            Err(error) => Err(not_an_object(error.to_string())),
        }
    }

    /// Takes fields that were read elsewhere; `file` is for messages only.
    pub fn from_fields(file: &str, fields: Map<String, Value>) -> Self {
        Self { file: file.to_owned(), path: String::new(), fields, faults: RefCell::default() }
    }

    /// The object in a field, for files that hold one in another. The section collects its own faults.
    pub fn section(&self, field: &str) -> Option<Self> {
        let Value::Object(fields) = self.fields.get(field)? else { return None };
        let path = format!("{}{field}.", self.path);
        Some(Self { file: self.file.clone(), path, fields: fields.clone(), faults: RefCell::default() })
    }

    /// The field's value; `None` where it is absent or null.
    pub fn get(&self, field: &str) -> Option<&Value> {
        self.fields.get(field).filter(|value| !value.is_null())
    }

    /// The names of all fields.
    pub fn fields(&self) -> impl Iterator<Item = &str> {
        self.fields.keys().map(String::as_str)
    }

    /// Records that `field` breaks `rule`.
    pub fn fault(&self, field: &str, rule: impl Into<String>) {
        let value = self.fields.get(field).map_or_else(|| "absent".to_owned(), Value::to_string);
        self.faults.borrow_mut().push(Fault::Config {
            file: self.file.clone(),
            field: format!("{}{field}", self.path),
            rule: rule.into(),
            value,
        });
    }

    /// A count or size in `1..=max`.
    pub fn size(&self, field: &str, default: i64, max: i64) -> i64 {
        let Some(value) = self.get(field) else { return default };
        match value.as_i64() {
            Some(size) if (1..=max).contains(&size) => size,
            _ => {
                self.fault(field, format!("an integer from 1 to {max}"));
                default
            }
        }
    }

    /// A list of counts or sizes in `1..=max`, at least one of them.
    pub fn sizes(&self, field: &str, default: &[i64], max: i64) -> Vec<i64> {
        let Some(value) = self.get(field) else { return default.to_vec() };
        let sizes =
            value.as_array().and_then(|items| items.iter().map(Value::as_i64).collect::<Option<Vec<_>>>());
        match sizes {
            Some(sizes) if !sizes.is_empty() && sizes.iter().all(|size| (1..=max).contains(size)) => sizes,
            _ => {
                self.fault(field, format!("a list of integers from 1 to {max}"));
                default.to_vec()
            }
        }
    }

    /// One size for each of `count` blocks: a list of that length, or one integer for all.
    pub fn size_per_block(&self, field: &str, default: i64, max: i64, count: usize) -> Vec<i64> {
        if !self.get(field).is_some_and(Value::is_array) {
            return vec![self.size(field, default, max); count];
        }
        let sizes = self.sizes(field, &[default], max);
        if sizes.len() == count {
            return sizes;
        }
        self.fault(field, format!("one integer, or a list of {count} as there are blocks"));
        vec![default; count]
    }

    /// A finite number above zero.
    pub fn positive(&self, field: &str, default: f64) -> f64 {
        let Some(value) = self.get(field) else { return default };
        match value.as_f64() {
            Some(number) if number > 0.0 && number.is_finite() => number,
            _ => {
                self.fault(field, "a number above 0");
                default
            }
        }
    }

    /// A finite number.
    pub fn number(&self, field: &str, default: f64) -> f64 {
        let Some(value) = self.get(field) else { return default };
        match value.as_f64() {
            Some(number) if number.is_finite() => number,
            _ => {
                self.fault(field, "a number");
                default
            }
        }
    }

    /// `true` or `false`.
    pub fn flag(&self, field: &str, default: bool) -> bool {
        let Some(value) = self.get(field) else { return default };
        value.as_bool().unwrap_or_else(|| {
            self.fault(field, "true or false");
            default
        })
    }

    /// A string that `parse` understands; `choices` tells which those are.
    pub fn choice<T: Copy>(&self, field: &str, default: T, choices: &str, parse: fn(&str) -> Option<T>) -> T {
        let Some(value) = self.get(field) else { return default };
        value.as_str().and_then(parse).unwrap_or_else(|| {
            self.fault(field, choices);
            default
        })
    }

    /// A list of strings that `parse` understands.
    pub fn choices<T: Copy>(
        &self,
        field: &str,
        default: &[T],
        choices: &str,
        parse: fn(&str) -> Option<T>,
    ) -> Vec<T> {
        let Some(value) = self.get(field) else { return default.to_vec() };
        let parsed = value.as_array().and_then(|items| {
            items.iter().map(|item| item.as_str().and_then(parse)).collect::<Option<Vec<_>>>()
        });
        parsed.filter(|items| !items.is_empty()).unwrap_or_else(|| {
            self.fault(field, format!("a list of {choices}"));
            default.to_vec()
        })
    }

    /// Refuses any value of `field` but `supported`: settings of diffusers' classes that v1 checkpoints do not use.
    /// An absent or null field is diffusers' default and passes.
    pub fn only(&self, field: &str, supported: impl Into<Value>) {
        let supported = supported.into();
        if self.get(field).is_some_and(|value| !same_value(value, &supported)) {
            self.fault(field, format!("{supported}, the only value supported"));
        }
    }

    /// Refuses any value of `field` but null: parts of diffusers' classes that v1 checkpoints do not have.
    pub fn absent(&self, field: &str) {
        if self.get(field).is_some() {
            self.fault(field, "null, the only value supported");
        }
    }

    /// `value` if the file had no fault, else all its faults.
    pub fn into_result<T>(self, value: T) -> Result<T, Vec<Fault>> {
        let faults = self.faults.into_inner();
        if faults.is_empty() { Ok(value) } else { Err(faults) }
    }

    /// Hands a section's faults to the file.
    pub fn absorb(&self, section: Self) {
        self.faults.borrow_mut().extend(section.faults.into_inner());
    }
}

/// JSON equality that does not tell `1` from `1.0`, as Python does not.
fn same_value(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}

/// The text of `file`, a path relative to `directory`.
pub fn read_text(directory: &Path, file: &str) -> Result<String, Fault> {
    fs::read_to_string(directory.join(file)).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => Fault::MissingFile { file: file.to_owned() },
        _ => Fault::Unreadable { file: file.to_owned(), error },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(json: &str) -> ConfigFile {
        ConfigFile::from_fields("unet/config.json", serde_json::from_str(json).unwrap())
    }

    fn faults(config: ConfigFile) -> Vec<String> {
        config.into_result(()).unwrap_err().iter().map(Fault::to_string).collect()
    }

    #[test]
    fn absent_and_null_fields_take_the_default() {
        let config = config(r#"{"a": null}"#);
        assert_eq!(config.size("a", 4, 8), 4);
        assert_eq!(config.sizes("b", &[1, 2], 8), [1, 2]);
        assert_eq!(config.positive("c", 0.5), 0.5);
        assert!(config.flag("d", true));
        config.only("e", "silu");
        config.absent("a");
        assert!(config.into_result(()).is_ok());
    }

    #[test]
    fn all_faults_of_a_file_are_named() {
        let config = config(
            r#"{"in_channels": -4, "block_out_channels": [32, "x"], "norm_eps": 0, "act_fn": "gelu",
                "attention_head_dim": [2, 2], "flip_sin_to_cos": "yes", "class_embed_type": "timestep"}"#,
        );
        config.size("in_channels", 4, 100);
        config.sizes("block_out_channels", &[32], 1000);
        config.positive("norm_eps", 1e-5);
        config.only("act_fn", "silu");
        config.size_per_block("attention_head_dim", 8, 100, 3);
        config.flag("flip_sin_to_cos", true);
        config.absent("class_embed_type");
        assert_eq!(
            faults(config),
            [
                "unet/config.json: `in_channels` must be an integer from 1 to 100 but is -4",
                "unet/config.json: `block_out_channels` must be a list of integers from 1 to 1000 but is [32,\"x\"]",
                "unet/config.json: `norm_eps` must be a number above 0 but is 0",
                "unet/config.json: `act_fn` must be \"silu\", the only value supported but is \"gelu\"",
                "unet/config.json: `attention_head_dim` must be one integer, or a list of 3 as there are blocks but is [2,2]",
                "unet/config.json: `flip_sin_to_cos` must be true or false but is \"yes\"",
                "unet/config.json: `class_embed_type` must be null, the only value supported but is \"timestep\"",
            ]
        );
    }

    #[test]
    fn only_compares_numbers_as_numbers() {
        let config = config(r#"{"mid_block_scale_factor": 1}"#);
        config.only("mid_block_scale_factor", 1.0);
        assert!(config.into_result(()).is_ok());
    }

    #[test]
    fn a_section_names_its_path() {
        let file = config(r#"{"vision_config": {"hidden_size": 0}}"#);
        let section = file.section("vision_config").unwrap();
        section.size("hidden_size", 768, 10_000);
        file.absorb(section);
        assert_eq!(
            faults(file),
            ["unet/config.json: `vision_config.hidden_size` must be an integer from 1 to 10000 but is 0"]
        );
    }
}
