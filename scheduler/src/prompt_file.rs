//! Prompt files: one prompt a line, CSV with a header, or one JSON object a line.
//!
//! A reader goes through the whole file and collects every fault with its line, because a person who mends a file of
//! a million prompts wants to do it once. Nothing here knows the catalog: what comes out is [`JobSpec`]s as written,
//! to be filled in and validated by [`crate::submission`].
mod fault;
mod field_name;
mod jsonl;
mod table;
mod text;

use std::collections::HashMap;
use std::path::Path;

use schema::{JobSpec, Sha256Digest};

pub use fault::{InputFault, Trouble, shortened};

/// How a prompt file is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum PromptFormat {
    /// One prompt a line; blank lines are skipped.
    Text,
    /// Comma-separated values; the first line names the columns.
    Csv,
    /// One JSON object a line.
    Jsonl,
}

/// One prompt with its settings, and the line it begins on.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptLine {
    /// Counted from 1.
    pub line: u32,
    /// What the line says.
    pub spec: JobSpec,
}

/// What a file holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PromptFile {
    /// The lines that could be read, in order.
    pub lines: Vec<PromptLine>,
    /// Everything that could not. With any fault, nothing may be submitted.
    pub faults: Vec<InputFault>,
    /// Lines with a fault, as far as they could be read: their other fields have rules to keep too, and a person
    /// wants to hear of everything at once.
    pub faulty_lines: Vec<PromptLine>,
}

/// Two lines that ask for the same thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Repetition {
    /// The later line.
    pub line: u32,
    /// The earlier line.
    pub first: u32,
}

impl PromptFormat {
    /// The format that the name's ending tells; text where it tells none, as for standard input.
    pub fn of_name(name: &Path) -> Self {
        let extension =
            name.extension().and_then(|extension| extension.to_str()).map(str::to_ascii_lowercase);
        match extension.as_deref() {
            Some("csv") => Self::Csv,
            Some("jsonl" | "ndjson") => Self::Jsonl,
            _ => Self::Text,
        }
    }

    /// Reads `bytes`, which may begin with a UTF-8 byte order mark. Never panics, whatever they are.
    pub fn read(self, bytes: &[u8]) -> PromptFile {
        let bytes = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes);
        let mut file = match self {
            Self::Text => text::read(bytes),
            Self::Csv => table::read(bytes),
            Self::Jsonl => jsonl::read(bytes),
        };
        if file.lines.is_empty() && file.faults.is_empty() {
            file.faults.push(InputFault { line: 1, trouble: Trouble::NoPrompts });
        }
        file
    }
}

impl PromptFile {
    /// Takes in what was read of a line.
    fn push(&mut self, line: u32, spec: JobSpec, troubles: Vec<Trouble>) {
        if troubles.is_empty() {
            self.lines.push(PromptLine { line, spec });
            return;
        }
        self.faults.extend(troubles.into_iter().map(|trouble| InputFault { line, trouble }));
        // Without a prompt, the line is so far from a job that further faults would be noise.
        if !spec.prompt.is_empty() {
            self.faulty_lines.push(PromptLine { line, spec });
        }
    }

    /// Lines whose prompt and settings equal an earlier line's. Often a slip, never an error.
    pub fn repetitions(&self) -> Vec<Repetition> {
        let mut seen: HashMap<Sha256Digest, u32> = HashMap::new();
        let mut repetitions = Vec::new();
        for PromptLine { line, spec } in &self.lines {
            // The submitter's own name for a job does not make it another picture.
            let spec = JobSpec { client_ref: None, ..spec.clone() };
            let text = serde_json::to_vec(&spec).expect("text and numbers always serialize");
            match seen.entry(Sha256Digest::of(&text)) {
                std::collections::hash_map::Entry::Occupied(first) => {
                    repetitions.push(Repetition { line: *line, first: *first.get() });
                }
                std::collections::hash_map::Entry::Vacant(place) => {
                    place.insert(*line);
                }
            }
        }
        repetitions
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FORMATS: [PromptFormat; 3] = [PromptFormat::Text, PromptFormat::Csv, PromptFormat::Jsonl];

    #[test]
    fn the_ending_tells_the_format() {
        for (name, format) in [
            ("a.csv", PromptFormat::Csv),
            ("a.CSV", PromptFormat::Csv),
            ("a.jsonl", PromptFormat::Jsonl),
            ("a.ndjson", PromptFormat::Jsonl),
            ("a.txt", PromptFormat::Text),
            ("-", PromptFormat::Text),
            ("csv", PromptFormat::Text),
        ] {
            assert_eq!(PromptFormat::of_name(Path::new(name)), format, "{name}");
        }
    }

    #[test]
    fn a_file_without_prompts_is_a_fault_in_every_format() {
        for format in FORMATS {
            for bytes in [&b""[..], b"\xEF\xBB\xBF", b"\n \n\r\n"] {
                let file = format.read(bytes);
                assert!(file.lines.is_empty());
                assert!(!file.faults.is_empty(), "{format:?} {bytes:?}");
            }
        }
        assert_eq!(PromptFormat::Csv.read(b"prompt\n").faults[0].trouble, Trouble::NoPrompts);
    }

    #[test]
    fn repetitions_look_at_everything_but_the_name() {
        let file = PromptFormat::Csv.read(b"prompt,seed,id\na,1,x\na,2,y\na,1,z\nb,1,\na,1,w\n");
        assert_eq!(file.faults, []);
        assert_eq!(file.repetitions(), [Repetition { line: 4, first: 2 }, Repetition { line: 6, first: 2 }]);
    }

    proptest! {
        #[test]
        fn no_bytes_make_a_reader_panic(bytes: Vec<u8>) {
            for format in FORMATS {
                let file = format.read(&bytes);
                prop_assert!(!file.lines.is_empty() || !file.faults.is_empty());
            }
        }

        #[test]
        fn no_text_makes_a_reader_panic(text in "(prompt|seed|width|,|\"|\n|\r|\\{|\\}|:|[a-z0-9]| |é|\u{0}){0,80}") {
            for format in FORMATS {
                let file = format.read(text.as_bytes());
                prop_assert!(!file.lines.is_empty() || !file.faults.is_empty());
            }
        }

        #[test]
        fn every_line_of_text_keeps_its_number(prompts in proptest::collection::vec("[a-z ]{0,12}", 0..20)) {
            let file = PromptFormat::Text.read(prompts.join("\r\n").as_bytes());
            for PromptLine { line, spec } in &file.lines {
                prop_assert_eq!(&spec.prompt, &prompts[*line as usize - 1]);
            }
            let expected = prompts.iter().filter(|prompt| !prompt.trim().is_empty()).count();
            prop_assert_eq!(file.lines.len(), expected);
        }
    }
}
