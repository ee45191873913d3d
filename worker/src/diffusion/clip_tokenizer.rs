//! CLIP's byte-level BPE, built from a vocabulary and merges as transformers' `CLIPTokenizer` builds it
//! (`models/clip/tokenization_clip.py`).

mod files;

use std::path::Path;

use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::{Lowercase, NFC, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer};

use self::files::TokenizerFiles;
use super::load_error::Fault;

/// What a token may be made from before BPE (the regex of transformers 5's `CLIPTokenizer`).
const TOKEN_REGEX: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
/// What marks the end of a word in the vocabulary.
const END_OF_WORD: &str = "</w>";

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

impl CLIPTokenizer {
    /// Reads the tokenizer's files in the folder `component` of the checkpoint: `tokenizer_config.json`, and the
    /// vocabulary from `vocab.json` and `merges.txt` or, where those are not, from `tokenizer.json`.
    pub fn from_pretrained(directory: &Path, component: &str) -> Result<Self, Vec<Fault>> {
        let files = TokenizerFiles::read(directory, component)?;
        let file = files.vocab_file.clone();
        Self::build(files).map_err(|reason| vec![Fault::Tokenizer { file, reason: reason.to_string() }])
    }

    fn build(files: TokenizerFiles) -> tokenizers::Result<Self> {
        let TokenizerFiles { vocab, merges, special_tokens, model_max_length, .. } = files;
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
