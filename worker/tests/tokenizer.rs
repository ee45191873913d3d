//! `CLIPTokenizer` against transformers: the golden checkpoints' small vocabularies, and CLIP's own.
#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in test functions; this is for their helpers")]

#[path = "support/golden.rs"]
mod golden;

use std::fs;
use std::path::{Path, PathBuf};

use golden::{CHECKPOINTS, golden as golden_path};
use serde::Deserialize;
use worker::diffusion::clip_tokenizer::CLIPTokenizer;

/// One prompt in `<checkpoint>-stages/tokens.json`.
#[derive(Deserialize)]
struct Tokens {
    prompt: String,
    input_ids: Vec<i64>,
    removed: String,
}

#[test]
fn ids_and_cut_text_equal_transformers() {
    for checkpoint in CHECKPOINTS {
        let tokenizer = CLIPTokenizer::from_pretrained(&golden_path(checkpoint), "tokenizer").unwrap();
        let path = golden_path(&format!("{checkpoint}-stages/tokens.json"));
        let expected: Vec<Tokens> = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
        assert!(expected.iter().any(|tokens| !tokens.removed.is_empty()));
        for expected in expected {
            let tokens = tokenizer.tokenize(&expected.prompt).unwrap();
            assert_eq!(tokens.ids, expected.input_ids, "{checkpoint} {:?}", expected.prompt);
            let truncated = tokens.truncated.unwrap_or_default();
            assert_eq!(truncated, expected.removed, "{checkpoint} {:?}", expected.prompt);
        }
    }
}

/// A tokenizer folder with CLIP's real vocabulary, which `deploy/install-dependencies.sh` fetches, and v1-5's config.
fn clip_tokenizer(special_tokens_are_normalized: bool) -> CLIPTokenizer {
    let fetched = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.deps/clip");
    let fetched = std::env::var_os("DARKROOM_CLIP_VOCABULARY").map_or(fetched, PathBuf::from);
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("tokenizer");
    fs::create_dir(&to).unwrap();
    for name in ["vocab.json", "merges.txt"] {
        fs::copy(fetched.join(name), to.join(name)).expect("`make deps` fetches CLIP's vocabulary");
    }
    let token = |content: &str| {
        serde_json::json!({
            "content": content, "lstrip": false, "normalized": special_tokens_are_normalized, "rstrip": false,
            "single_word": false,
        })
    };
    let config = serde_json::json!({
        "bos_token": token("<|startoftext|>"), "eos_token": token("<|endoftext|>"), "model_max_length": 77,
        "unk_token": token("<|endoftext|>"), "pad_token": "<|endoftext|>", "do_lower_case": true,
    });
    fs::write(to.join("tokenizer_config.json"), config.to_string()).unwrap();
    CLIPTokenizer::from_pretrained(folder.path(), "tokenizer").unwrap()
}

/// What transformers 5.23 gives with this vocabulary; the end token follows, and fills up to 77.
const CLIP_VECTORS: [(&str, &[i64]); 21] = [
    ("a photograph of an astronaut riding a horse", &[320, 8853, 539, 550, 18376, 6765, 320, 4558]),
    ("", &[]),
    ("A painting of a squirrel eating a burger", &[320, 3086, 539, 320, 14004, 4371, 320, 6548]),
    ("Hello,   World!!  It's 2022", &[3306, 267, 1002, 748, 585, 568, 273, 271, 273, 273]),
    (
        "naïve café — “quotes” 漢字 🙂",
        &[1097, 35689, 563, 15304, 2005, 728, 506, 5808, 728, 507, 162, 120, 95, 35751, 501, 14860],
    ),
    ("&lt;b&gt; &amp;", &[261, 3333, 282, 321, 261, 4725, 282, 261, 6259, 282]),
    ("a<|endoftext|>b", &[320, 49407, 321]),
    ("a<|EndOfText|>b", &[320, 27, 347, 40786, 4160, 91, 285, 321]),
    ("a <|startoftext|> b", &[320, 49406, 321]),
    ("<|endoftext|>", &[49407]),
    ("a <|endoftext|> b", &[320, 49407, 321]),
    ("  lead trail  ", &[2784, 4921]),
    ("a\tb\n\nc", &[320, 321, 322]),
    ("\u{212b}ngstr\u{f6}m e\u{301}", &[23176, 10352, 807, 7255, 332, 4166]),
    ("don't I'LL", &[847, 713, 328, 1342]),
    ("#$%^ 12 3.5", &[2, 3, 4, 317, 272, 273, 274, 269, 276]),
    ("\u{0} \u{1}", &[444, 445]),
    ("\u{3000}x\u{a0}y", &[343, 344]),
    ("x</w>y", &[343, 34308, 342, 285, 344]),
    ("ﬁ İ ß ẞ", &[171, 105, 479, 328, 16384, 127, 509, 127, 509]),
    (" ", &[]),
];

#[test]
fn clips_own_vocabulary_gives_transformers_ids() {
    for special_tokens_are_normalized in [true, false] {
        let tokenizer = clip_tokenizer(special_tokens_are_normalized);
        assert_eq!(tokenizer.model_max_length(), 77);
        assert_eq!(tokenizer.vocab_size(), 49408);
        for (prompt, ids) in CLIP_VECTORS {
            let mut expected = vec![49406];
            expected.extend(ids);
            expected.resize(77, 49407);
            assert_eq!(tokenizer.tokenize(prompt).unwrap().ids, expected, "{prompt:?}");
        }
        // Where the token's flags make a difference: a normalized one is also found in lowered text.
        let ids = tokenizer.tokenize("A<|STARTOFTEXT|>").unwrap().ids;
        let expected: &[i64] = if special_tokens_are_normalized {
            &[49406, 320, 49406, 49407]
        } else {
            &[49406, 320, 27, 347, 993, 6659, 4160, 91, 285, 49407]
        };
        assert_eq!(&ids[..expected.len()], expected);
    }
}

/// transformers 5 saves the vocabulary in `tokenizer.json`, and lists the special tokens' flags.
#[test]
fn transformers_newer_files_give_the_same_ids() {
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("tokenizer");
    fs::create_dir(&to).unwrap();
    let from = golden_path("small").join("tokenizer");
    let read = |name: &str| fs::read_to_string(from.join(name)).unwrap();
    let vocab: serde_json::Value = serde_json::from_str(&read("vocab.json")).unwrap();
    let lines: Vec<String> = read("merges.txt").lines().skip(1).map(str::to_owned).collect();
    let pairs: Vec<Vec<&str>> = lines.iter().map(|line| line.split(' ').collect()).collect();
    let token = |content: &str| serde_json::json!({"content": content, "normalized": true, "special": true});
    let config = serde_json::json!({
        "model_max_length": 77,
        "added_tokens_decoder": {"998": token("<|startoftext|>"), "999": token("<|endoftext|>")},
    });
    fs::write(to.join("tokenizer_config.json"), config.to_string()).unwrap();
    let old = CLIPTokenizer::from_pretrained(&golden_path("small"), "tokenizer").unwrap();
    for merges in [serde_json::json!(pairs), serde_json::json!(lines)] {
        let json = serde_json::json!({"model": {"type": "BPE", "vocab": vocab, "merges": merges}});
        fs::write(to.join("tokenizer.json"), json.to_string()).unwrap();
        let new = CLIPTokenizer::from_pretrained(folder.path(), "tokenizer").unwrap();
        for prompt in ["a red circle, don't!", "a<|endoftext|>b", "ΑΣ straße"] {
            assert_eq!(new.tokenize(prompt).unwrap(), old.tokenize(prompt).unwrap(), "{prompt}");
        }
        // Listed as normalized, the end token is also found in lowered text.
        assert_eq!(new.tokenize("a<|EndOfText|>b").unwrap().ids[..5], [998, 320, 999, 321, 999]);
        assert_eq!(old.tokenize("a<|EndOfText|>b").unwrap().ids[..4], [998, 320, 27, 347]);
    }
}

#[test]
fn prompts_are_cut_at_77_tokens_and_not_before() {
    let tokenizer = clip_tokenizer(true);
    let fitting = tokenizer.tokenize(&"horse ".repeat(75)).unwrap();
    assert_eq!(fitting.truncated, None);
    assert_eq!((fitting.ids[0], fitting.ids[75], fitting.ids[76]), (49406, 4558, 49407));
    let long = tokenizer.tokenize(&("horse ".repeat(75) + "On The Moon!")).unwrap();
    assert_eq!(long.ids, fitting.ids);
    assert_eq!(long.truncated.as_deref(), Some("on the moon !"));
}

#[test]
fn a_broken_tokenizer_folder_is_refused_with_all_its_faults() {
    let folder = tempfile::tempdir().unwrap();
    let faults = CLIPTokenizer::from_pretrained(folder.path(), "tokenizer").unwrap_err();
    let faults: Vec<String> = faults.iter().map(ToString::to_string).collect();
    let missing = |name: &str| format!("tokenizer/{name}: there is no such file");
    assert_eq!(faults, ["vocab.json", "merges.txt", "tokenizer_config.json"].map(missing));

    let to = folder.path().join("tokenizer");
    fs::create_dir(&to).unwrap();
    let write = |name: &str, text: &str| fs::write(to.join(name), text).unwrap();
    let first_fault = || {
        let faults = CLIPTokenizer::from_pretrained(folder.path(), "tokenizer").unwrap_err();
        faults[0].to_string()
    };
    write("vocab.json", r#"{"a</w>": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}"#);
    write("merges.txt", "#version: 0.2\n");
    write("tokenizer_config.json", r#"{"model_max_length": 2}"#);
    assert_eq!(
        first_fault(),
        "tokenizer/tokenizer_config.json: `model_max_length` must be an integer of at least 3 but is 2"
    );
    write("tokenizer_config.json", r#"{"model_max_length": 8, "bos_token": 5}"#);
    assert!(first_fault().contains("`bos_token` must be a string"), "{}", first_fault());
    write("tokenizer_config.json", r#"{"model_max_length": 8, "bos_token": "<s>"}"#);
    assert_eq!(first_fault(), "tokenizer/vocab.json: has no special token `<s>`");
    write("tokenizer_config.json", r#"{"model_max_length": 8}"#);
    assert!(CLIPTokenizer::from_pretrained(folder.path(), "tokenizer").is_ok());
    write("merges.txt", "#version: 0.2\na b\n");
    assert!(first_fault().starts_with("tokenizer/vocab.json: "), "{}", first_fault());
    write("merges.txt", "ab\n");
    assert_eq!(first_fault(), "tokenizer/merges.txt: line 1 must be two tokens and a space");
    write("merges.txt", "");
    write("vocab.json", r#"{"a": "x"}"#);
    assert!(
        first_fault().starts_with("tokenizer/vocab.json: is not a JSON object: of token ids"),
        "{}",
        first_fault()
    );
}
