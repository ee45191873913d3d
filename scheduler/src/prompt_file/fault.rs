//! What can be wrong with a prompt file, said so that the line can be mended without looking anything up.
use std::fmt;

use schema::SpecFault;
use serde::ser::{Serialize, SerializeStruct, Serializer};

use super::field_name;

/// The longest message about one fault: a value may be a whole file in the wrong format.
const MAX_MESSAGE_CHARS: usize = 300;

/// One thing wrong with one line.
#[derive(Clone, Debug, PartialEq)]
pub struct InputFault {
    /// Counted from 1.
    pub line: u32,
    /// What is wrong.
    pub trouble: Trouble,
}

/// What is wrong with a line.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Trouble {
    /// A value breaks its field's rule.
    #[error(transparent)]
    Value(#[from] SpecFault),
    /// A column or key that no job has.
    #[error("no job has a field {name:?}{}", suggestion(name))]
    UnknownField {
        /// The column's or key's name as written.
        name: String,
    },
    /// The same field twice, perhaps by two of its names.
    #[error("the field `{field}` comes twice, the second time as {name:?}")]
    RepeatedField {
        /// The field.
        field: &'static str,
        /// Its second name as written.
        name: String,
    },
    /// The header of a CSV file names no prompt.
    #[error(
        "a column `prompt` has to be in the first line, but it has {columns}; for one prompt a line without a header \
         use --format text"
    )]
    NoPromptColumn {
        /// The columns that are there.
        columns: String,
    },
    /// A CSV line with more or fewer cells than the header.
    #[error("a line has to have {expected} cells like the first line, but this one has {found}")]
    CellCount {
        /// Cells in the header.
        expected: usize,
        /// Cells in the line.
        found: usize,
    },
    /// Bytes that are not UTF-8.
    #[error("text has to be UTF-8, but byte {position} of {place} is {byte:#04x}")]
    NotUtf8 {
        /// Where the bytes are: the line, a column's name, a field.
        place: String,
        /// Counted from 1 within the place.
        position: usize,
        /// The byte.
        byte: u8,
    },
    /// A line that is not a JSON object.
    #[error("a line has to be one JSON object, but {reason}")]
    NotAnObject {
        /// What is there instead.
        reason: String,
    },
    /// Nothing to draw in the whole file.
    #[error("a prompt file has to have at least one prompt, but this one has none")]
    NoPrompts,
}

impl Trouble {
    pub(super) fn not_utf8(place: impl fmt::Display, bytes: &[u8], error: std::str::Utf8Error) -> Self {
        let position = error.valid_up_to();
        let byte = bytes.get(position).copied().unwrap_or_default();
        Self::NotUtf8 { place: place.to_string(), position: position + 1, byte }
    }
}

impl Trouble {
    /// The field if it is about one, the rule, and the value if there is one: the same as the text, for programs.
    fn parts(&self) -> (Option<String>, String, Option<String>) {
        let owned = |text: &str| Some(text.to_owned());
        match self {
            Self::Value(SpecFault { field, rule, value }) => (owned(field), rule.clone(), owned(value)),
            Self::UnknownField { name } => {
                (owned(name), format!("one of {}", field_name::known()), owned(name))
            }
            Self::RepeatedField { field, name } => (owned(field), "given once".to_owned(), owned(name)),
            Self::NoPromptColumn { columns } => {
                (owned("prompt"), "in the first line".to_owned(), owned(columns))
            }
            Self::CellCount { expected, found } => {
                (None, format!("{expected} cells"), Some(found.to_string()))
            }
            Self::NotUtf8 { place, byte, .. } => {
                (owned(place), "UTF-8".to_owned(), Some(format!("{byte:#04x}")))
            }
            Self::NotAnObject { reason } => (None, "one JSON object".to_owned(), owned(reason)),
            Self::NoPrompts => (None, "at least one prompt".to_owned(), None),
        }
    }
}

fn suggestion(name: &str) -> String {
    match field_name::closest(name) {
        Some(closest) => format!("; did you mean `{closest}`?"),
        None => format!("; the fields are {}", field_name::known()),
    }
}

/// `text`, cut after `max_chars` characters.
pub fn shortened(text: &str, max_chars: usize) -> String {
    match text.char_indices().nth(max_chars) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

impl fmt::Display for InputFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.line, shortened(&self.trouble.to_string(), MAX_MESSAGE_CHARS))
    }
}

impl Serialize for InputFault {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let short = |text: String| shortened(&text, MAX_MESSAGE_CHARS);
        let (field, rule, value) = self.trouble.parts();
        let mut fault = serializer.serialize_struct("InputFault", 5)?;
        fault.serialize_field("line", &self.line)?;
        fault.serialize_field("field", &field.map(short))?;
        fault.serialize_field("rule", &short(rule))?;
        fault.serialize_field("value", &value.map(short))?;
        fault.serialize_field("message", &short(self.trouble.to_string()))?;
        fault.end()
    }
}

#[cfg(test)]
mod tests {
    use super::super::PromptFormat;

    #[test]
    fn programs_get_line_field_rule_and_value_of_each_fault() {
        let file = PromptFormat::Csv.read(b"prompt,width\na,wide\nb\n");
        let faults: Vec<_> = file.faults.iter().map(|fault| serde_json::to_string(fault).unwrap()).collect();
        insta::assert_snapshot!(faults.join("\n"), @r#"
        {"line":2,"field":"width","rule":"a multiple of 8, from 64 to 2048","value":"\"wide\"","message":"`width` has to be a multiple of 8, from 64 to 2048, but is \"wide\""}
        {"line":3,"field":null,"rule":"2 cells","value":"1","message":"a line has to have 2 cells like the first line, but this one has 1"}
        "#);
        let file = PromptFormat::Csv.read(b"prompt,promt\n");
        insta::assert_snapshot!(serde_json::to_string(&file.faults[0]).unwrap(), @r#"{"line":1,"field":"promt","rule":"one of prompt, negative_prompt, seed, num_inference_steps, guidance_scale, width, height, scheduler, guidance_start, guidance_stop, cache_interval, client_ref","value":"promt","message":"no job has a field \"promt\"; did you mean `prompt`?"}"#);
    }
}
