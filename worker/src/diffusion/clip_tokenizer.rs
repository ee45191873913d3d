//! CLIP's byte-level BPE, built from `vocab.json` and `merges.txt` as transformers' `CLIPTokenizer` builds it
//! (`models/clip/tokenization_clip.py`); v1 checkpoints ship no `tokenizer.json`.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use serde_json::Value;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::{Lowercase, NFC, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer};

use super::config::{ConfigFile, read_text};
use super::load_error::Fault;

/// What a token may be made from before BPE (the regex of transformers 5's `CLIPTokenizer`).
const TOKEN_REGEX: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
/// What marks the end of a word in the vocabulary.
const END_OF_WORD: &str = "</w>";
/// The longest prompt, in tokens, that any text encoder takes; a guard against absurd configs.
const MAX_LENGTH: i64 = 1 << 20;

/// A prompt as the text encoder wants it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenizedPrompt {
    /// Start token, prompt, end token, padding: `model_max_length` ids.
    pub ids: Vec<i64>,
    /// The end of the prompt that did not fit, decoded from its tokens (so in lower case) as diffusers' warning shows
    /// it; `None` if all of it fitted.
    pub truncated: Option<String>,
}

/// `CLIPTokenizer`.
#[derive(Debug)]
pub struct CLIPTokenizer {
    tokenizer: Tokenizer,
    bos_id: u32,
    eos_id: u32,
    pad_id: u32,
    model_max_length: usize,
}

/// Text that the tokenizers library refused.
#[derive(Debug, thiserror::Error)]
#[error("the prompt cannot be tokenized: {reason}")]
pub struct TokenizeError {
    reason: String,
}

/// The roles of special tokens, in the order in which transformers adds them, with CLIP's defaults.
const SPECIAL_TOKENS: [(&str, &str); 4] = [
    ("bos_token", "<|startoftext|>"),
    ("eos_token", "<|endoftext|>"),
    ("unk_token", "<|endoftext|>"),
    ("pad_token", "<|endoftext|>"),
];

impl CLIPTokenizer {
    /// Reads `vocab.json`, `merges.txt`, `tokenizer_config.json` and, if it is there, `special_tokens_map.json` from
    /// the folder `component` of the checkpoint.
    pub fn from_pretrained(directory: &Path, component: &str) -> Result<Self, Vec<Fault>> {
        let file = |name: &str| format!("{component}/{name}");
        let vocab = read_vocab(directory, &file("vocab.json"));
        let merges = read_merges(directory, &file("merges.txt"));
        let config = ConfigFile::read(directory, &file("tokenizer_config.json"));
        let special_tokens_map = match ConfigFile::read(directory, &file("special_tokens_map.json")) {
            Err(Fault::MissingFile { .. }) => Ok(None),
            read => read.map(Some),
        };
        let (vocab, merges, config, special_tokens_map) = match (vocab, merges, config, special_tokens_map) {
            (Ok(vocab), Ok(merges), Ok(config), Ok(map)) => (vocab, merges, config, map),
            (vocab, merges, config, map) => {
                let faults = [vocab.err(), merges.err(), config.err(), map.err()];
                return Err(faults.into_iter().flatten().collect());
            }
        };
        let special_tokens = SPECIAL_TOKENS.map(|(role, default)| {
            let value =
                config.get(role).or_else(|| special_tokens_map.as_ref().and_then(|map| map.get(role)));
            value.map_or_else(
                || special_token(default),
                |value| {
                    parse_special_token(value).unwrap_or_else(|| {
                        config.fault(role, "a string, or an object with a string `content`");
                        special_token(default)
                    })
                },
            )
        });
        // The start and end token take two places.
        let model_max_length = config.size("model_max_length", 0, MAX_LENGTH);
        if model_max_length < 3 {
            config.fault("model_max_length", "an integer of at least 3");
        }
        let model_max_length = usize::try_from(model_max_length).unwrap_or_default();
        config.into_result(())?;
        Self::build(vocab, merges, special_tokens, model_max_length)
            .map_err(|reason| vec![Fault::Tokenizer { file: file("vocab.json"), reason: reason.to_string() }])
    }

    fn build(
        vocab: Vocab,
        merges: Merges,
        special_tokens: [AddedToken; 4],
        model_max_length: usize,
    ) -> tokenizers::Result<Self> {
        let [bos, eos, unk, pad] = &special_tokens;
        let id = |token: &AddedToken| {
            vocab
                .get(&token.content)
                .copied()
                .ok_or_else(|| format!("has no special token `{}`", token.content))
        };
        let (bos_id, eos_id, pad_id) = (id(bos)?, id(eos)?, id(pad)?);
        let model = BPE::builder()
            .vocab_and_merges(vocab, merges)
            .continuing_subword_prefix(String::new())
            .end_of_word_suffix(END_OF_WORD.to_owned())
            .fuse_unk(false)
            .unk_token(unk.content.clone())
            .build()?;
        let mut tokenizer = Tokenizer::new(model);
        tokenizer.with_normalizer(Some(Normalizers::new(vec![
            NormalizerWrapper::NFC(NFC),
            NormalizerWrapper::Replace(Replace::new(
                tokenizers::normalizers::replace::ReplacePattern::Regex(r"\s+".to_owned()),
                " ",
            )?),
            NormalizerWrapper::Lowercase(Lowercase),
        ])));
        let split =
            Split::new(SplitPattern::Regex(TOKEN_REGEX.to_owned()), SplitDelimiterBehavior::Removed, true)?;
        let byte_level = ByteLevel::default().add_prefix_space(false);
        tokenizer.with_pre_tokenizer(Some(PreTokenizers::new(vec![
            PreTokenizerWrapper::Split(split),
            PreTokenizerWrapper::ByteLevel(byte_level),
        ])));
        tokenizer.with_decoder(Some(ByteLevel::default()));
        // Roles often share a token; the last one's flags count.
        let mut added: Vec<AddedToken> = Vec::new();
        for token in special_tokens {
            added.retain(|earlier| earlier.content != token.content);
            added.push(token);
        }
        tokenizer.add_special_tokens(&added);
        Ok(Self { tokenizer, bos_id, eos_id, pad_id, model_max_length })
    }

    /// Tokens that the text encoder takes, padding included.
    pub fn model_max_length(&self) -> usize {
        self.model_max_length
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        let largest = self.tokenizer.get_vocab(true).into_values().max();
        largest.map_or(0, |id| id as usize + 1)
    }

    /// Tokenizes a prompt, cutting and padding it to `model_max_length`.
    pub fn tokenize(&self, prompt: &str) -> Result<TokenizedPrompt, TokenizeError> {
        let refused = |error: tokenizers::Error| TokenizeError { reason: error.to_string() };
        let encoding = self.tokenizer.encode_fast(prompt, false).map_err(refused)?;
        let (fitting, rest) = encoding.get_ids().split_at(encoding.len().min(self.model_max_length - 2));
        let truncated = match rest {
            [] => None,
            rest => {
                let decoded = self.tokenizer.decode(rest, false).map_err(refused)?;
                Some(decoded.replace(END_OF_WORD, " ").trim().to_owned())
            }
        };
        let mut ids = Vec::with_capacity(self.model_max_length);
        ids.push(i64::from(self.bos_id));
        ids.extend(fitting.iter().copied().map(i64::from));
        ids.push(i64::from(self.eos_id));
        ids.resize(self.model_max_length, i64::from(self.pad_id));
        Ok(TokenizedPrompt { ids, truncated })
    }
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
        let (first, second) = line
            .split_once(' ')
            .ok_or_else(|| fault(format!("line {} must be two tokens and a space", index + 1)))?;
        merges.push((first.to_owned(), second.to_owned()));
    }
    Ok(merges)
}
