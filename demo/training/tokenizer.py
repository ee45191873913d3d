"""The tokenizer: byte-level CLIP BPE in four files, its merges learned from captions."""

import json
from collections import Counter
from pathlib import Path

from transformers import CLIPTokenizer

from training.captions import caption
from training.pictures import random_scene, rng_for

CAPTIONS = 20000
# Words that people type although no caption has them; whole tokens leave more room before the cut at 77.
OTHER_WORDS = "of and with the an in at is two shapes photo drawing painting draw please image by next under over"


def byte_symbols():
    """Bytes as printable characters, in CLIP's order: printable ones first, the rest from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + k) for k in range(len(rest))]


def learn_merges(counts):
    """Byte-pair encoding until each counted word is one symbol; ties go to the alphabetically first pair."""
    words = {word: (*word[:-1], word[-1] + "</w>") for word in counts}
    merges = []
    while True:
        pairs = Counter()
        for word, symbols in words.items():
            for pair in zip(symbols, symbols[1:]):
                pairs[pair] += counts[word]
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, symbols in words.items():
            words[word] = _merge(symbols, best)


def _merge(symbols, pair):
    merged, k = [], 0
    while k < len(symbols):
        together = symbols[k : k + 2] == pair
        merged.append("".join(pair) if together else symbols[k])
        k += 2 if together else 1
    return tuple(merged)


def train(rank, args):
    if rank:
        return
    rng = rng_for("tokenizer")
    counts = Counter()
    for _ in range(CAPTIONS):
        counts.update(caption(random_scene(rng), rng).replace(",", " ").replace("-", " ").split())
    counts.update(OTHER_WORDS.split())
    merges = learn_merges(counts)
    symbols = byte_symbols()
    vocabulary = symbols + [symbol + "</w>" for symbol in symbols] + ["".join(pair) for pair in merges]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder = Path(args.model) / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    ids = {symbol: index for index, symbol in enumerate(vocabulary)}
    assert len(ids) == len(vocabulary), "two merges made the same symbol"
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False) + "\n")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")

    def special(content, normalized):
        return dict(content=content, lstrip=False, normalized=normalized, rstrip=False, single_word=False)

    start, end = special("<|startoftext|>", True), special("<|endoftext|>", True)
    tokens = dict(bos_token=start, eos_token=end, unk_token=end, pad_token="<|endoftext|>")
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens, indent=2) + "\n")
    added = {str(ids[t]): special(t, True) | {"special": True} for t in ("<|startoftext|>", "<|endoftext|>")}
    config = dict(
        add_prefix_space=False,
        added_tokens_decoder=added,
        bos_token="<|startoftext|>",
        do_lower_case=True,
        eos_token="<|endoftext|>",
        errors="replace",
        model_max_length=77,
        pad_token="<|endoftext|>",
        tokenizer_class="CLIPTokenizer",
        unk_token="<|endoftext|>",
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"tokenizer {len(ids)} tokens, {len(merges)} merges", flush=True)


def encode(tokenizer, captions):
    """Token ids `(batch_size, 77)`, as the pipeline makes them."""
    return tokenizer(
        captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids


def load(args):
    return CLIPTokenizer.from_pretrained(f"{args.model}/tokenizer")
