//! The files that a tokenizer comes in.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;
use tokenizers::AddedToken;
use tokenizers::models::bpe::{Merges, Vocab};

use super::super::config::{ConfigFile, read_text};
use super::super::load_error::Fault;

/// The longest prompt, in tokens, that any text encoder takes; a guard against absurd configs.
const MAX_LENGTH: i64 = 1 << 20;

/// The roles of special tokens, in the order in which transformers adds them, with CLIP's defaults.
const SPECIAL_TOKENS: [(&str, &str); 4] = [
    ("bos_token", "<|startoftext|>"),
    ("eos_token", "<|endoftext|>"),
    ("unk_token", "<|endoftext|>"),
    ("pad_token", "<|endoftext|>"),
];

/// What the files of a tokenizer say.
pub(super) struct TokenizerFiles {
    /// The file that the vocabulary is from.
    pub vocab_file: String,
    pub vocab: Vocab,
    pub merges: Merges,
    /// In the order of [`SPECIAL_TOKENS`].
    pub special_tokens: [AddedToken; 4],
    pub model_max_length: usize,
}

impl TokenizerFiles {
    pub(super) fn read(directory: &Path, component: &str) -> Result<Self, Vec<Fault>> {
        let file = |name: &str| format!("{component}/{name}");
        let config = ConfigFile::read(directory, &file("tokenizer_config.json"));
        let special_tokens_map = match ConfigFile::read(directory, &file("special_tokens_map.json")) {
            Err(Fault::MissingFile { .. }) => Ok(None),
            read => read.map(Some),
        };
        let vocabulary = Vocabulary::read(directory, &file);
        let (vocabulary, config, special_tokens_map) = match (vocabulary, config, special_tokens_map) {
            (Ok(vocabulary), Ok(config), Ok(map)) => (vocabulary, config, map),
            (vocabulary, config, map) => {
                let mut faults = vocabulary.err().unwrap_or_default();
                faults.extend([config.err(), map.err()].into_iter().flatten());
                return Err(faults);
            }
        };
        let listed = listed_tokens(&config);
        let special_tokens = SPECIAL_TOKENS.map(|(role, default)| {
            let map = special_tokens_map.as_ref();
            let value = config.get(role).or_else(|| map.and_then(|map| map.get(role)));
            let token = value.map_or_else(
                || special_token(default),
                |value| {
                    parse_special_token(value).unwrap_or_else(|| {
                        config.fault(role, "a string, or an object with a string `content`");
                        special_token(default)
                    })
                },
            );
            listed.iter().find(|listed| listed.content == token.content).cloned().unwrap_or(token)
        });
        // The start and end token take two places.
        let model_max_length = config.size("model_max_length", 0, MAX_LENGTH);
        if model_max_length < 3 {
            config.fault("model_max_length", "an integer of at least 3");
        }
        let model_max_length = usize::try_from(model_max_length).unwrap_or_default();
        let Vocabulary { vocab_file, vocab, merges } = vocabulary;
        config.into_result(Self { vocab_file, vocab, merges, special_tokens, model_max_length })
    }
}

/// The tokens in `added_tokens_decoder`, whose flags count more than those in the roles.
fn listed_tokens(config: &ConfigFile) -> Vec<AddedToken> {
    let listed = config.get("added_tokens_decoder").and_then(Value::as_object);
    listed.into_iter().flat_map(|listed| listed.values()).filter_map(parse_special_token).collect()
}

/// A special token given as a plain string: matched in the text as typed, not in the normalized text.
fn special_token(content: &str) -> AddedToken {
    AddedToken::from(content, true)
}

/// A special token as JSON: a string, or an object with flags.
fn parse_special_token(value: &Value) -> Option<AddedToken> {
    if let Some(content) = value.as_str() {
        return Some(special_token(content));
    }
    let flag = |name: &str| value.get(name).and_then(Value::as_bool).unwrap_or(false);
    let token = special_token(value.get("content")?.as_str()?)
        .single_word(flag("single_word"))
        .lstrip(flag("lstrip"))
        .rstrip(flag("rstrip"))
        .normalized(flag("normalized"));
    Some(token)
}

/// Tokens, and which pairs of them become one.
struct Vocabulary {
    vocab_file: String,
    vocab: Vocab,
    merges: Merges,
}

/// The part of `tokenizer.json` that is not the same for all of CLIP's tokenizers.
#[derive(Deserialize)]
struct TokenizerJson {
    model: BpeJson,
}

#[derive(Deserialize)]
struct BpeJson {
    vocab: Vocab,
    merges: Vec<MergeJson>,
}

/// A pair of tokens, in the two forms that the tokenizers library has written.
#[derive(Deserialize)]
#[serde(untagged)]
enum MergeJson {
    Pair(String, String),
    Line(String),
}

impl Vocabulary {
    /// From `vocab.json` and `merges.txt`, as v1 checkpoints have them, or from `tokenizer.json`, which transformers 5
    /// saves in their place.
    fn read(directory: &Path, file: &dyn Fn(&str) -> String) -> Result<Self, Vec<Fault>> {
        let (vocab_file, merges_file, one_file) =
            (file("vocab.json"), file("merges.txt"), file("tokenizer.json"));
        let exists = |file: &str| directory.join(file).exists();
        if !exists(&vocab_file) && !exists(&merges_file) && exists(&one_file) {
            return Self::read_tokenizer_json(directory, one_file).map_err(|fault| vec![fault]);
        }
        match (read_vocab(directory, &vocab_file), read_merges(directory, &merges_file)) {
            (Ok(vocab), Ok(merges)) => Ok(Self { vocab_file, vocab, merges }),
            (vocab, merges) => Err([vocab.err(), merges.err()].into_iter().flatten().collect()),
        }
    }

    fn read_tokenizer_json(directory: &Path, file: String) -> Result<Self, Fault> {
        let text = read_text(directory, &file)?;
        let json: TokenizerJson = serde_json::from_str(&text).map_err(|error| Fault::Json {
            file: file.clone(),
            reason: format!("of a BPE tokenizer: {error}"),
        })?;
        let merges = json.model.merges.into_iter().map(|merge| match merge {
            MergeJson::Pair(first, second) => Ok((first, second)),
            MergeJson::Line(line) => parse_merge(&line).ok_or_else(|| Fault::Tokenizer {
                file: file.clone(),
                reason: format!("the merge `{line}` must be two tokens and a space"),
            }),
        });
        Ok(Self { merges: merges.collect::<Result<_, _>>()?, vocab: json.model.vocab, vocab_file: file })
    }
}

/// `first second`
fn parse_merge(line: &str) -> Option<(String, String)> {
    let (first, second) = line.split_once(' ')?;
    Some((first.to_owned(), second.to_owned()))
}

/// `vocab.json`: an object from token to id.
fn read_vocab(directory: &Path, file: &str) -> Result<Vocab, Fault> {
    let text = read_text(directory, file)?;
    serde_json::from_str(&text)
        .map_err(|error| Fault::Json { file: file.to_owned(), reason: format!("of token ids: {error}") })
}

/// `merges.txt`: a pair of tokens a line, most important first, after an optional `#version` line.
fn read_merges(directory: &Path, file: &str) -> Result<Merges, Fault> {
    let fault = |reason: String| Fault::Tokenizer { file: file.to_owned(), reason };
    let handle = File::open(directory.join(file)).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => Fault::MissingFile { file: file.to_owned() },
        _ => Fault::Unreadable { file: file.to_owned(), error },
    })?;
    let mut merges = Merges::new();
    for (index, line) in BufReader::new(handle).lines().enumerate() {
        let line = line.map_err(|error| Fault::Unreadable { file: file.to_owned(), error })?;
        if line.starts_with("#version") || line.is_empty() {
            continue;
        }
        let merge = parse_merge(&line);
        merges
            .push(merge.ok_or_else(|| fault(format!("line {} must be two tokens and a space", index + 1)))?);
    }
    Ok(merges)
}
