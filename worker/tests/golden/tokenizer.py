"""The goldens' tokenizer: CLIP's byte-level BPE with a vocabulary of 1000, trained here on a few captions.

vocab.json is laid out as CLIP's: 256 bytes, the same 256 at the end of a word, one entry per merge, two special tokens.
"""

import json
import re
from collections import Counter
from pathlib import Path

VOCAB_SIZE = 1000
BOS, EOS = "<|startoftext|>", "<|endoftext|>"

CAPTIONS = """
a photograph of an astronaut riding a horse on the moon
a painting of a squirrel eating a burger in the style of van gogh
portrait of an old fisherman, oil on canvas, dramatic light, highly detailed
a small red circle on a blue background, a large green square in the top left corner
two yellow triangles beside a purple star, centered, flat colors
a cozy cabin in a snowy forest at night, warm windows, northern lights
hello world, it's a test; they've said we'll see what you're making, i'm sure he'd don't
macro shot of a dewdrop on a leaf, shallow depth of field, bokeh, 35mm photography
watercolor illustration of a fox sleeping under autumn trees, soft pastel palette
isometric render of a tiny kitchen, octane, ambient occlusion, studio lighting
blurry, low quality, deformed hands, extra fingers, watermark, text, jpeg artifacts
concept art of a floating castle above the clouds at sunrise, matte painting, trending
a bowl of ramen with egg and noodles on a wooden table, food photography, steam rising
pencil sketch of a bicycle leaning against a brick wall, cross hatching, monochrome
an aerial view of a winding river through the jungle, mist, golden hour, wide angle
a vintage poster for a circus with elephants and acrobats, bold typography, cream paper
"""


def bytes_to_unicode() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in kept]
    return {byte: chr(byte) for byte in kept} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def train_merges(count: int) -> list[tuple[str, str]]:
    """Byte-pair merges of the captions, the most frequent pair first, ties broken by the alphabet."""
    letters = bytes_to_unicode()
    words = Counter()
    for word in re.findall(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|[^\s\w]+", CAPTIONS.lower()):
        symbols = [letters[byte] for byte in word.encode()]
        words[(*symbols[:-1], symbols[-1] + "</w>")] += 1
    merges = []
    while len(merges) < count:
        pairs = Counter()
        for symbols, frequency in words.items():
            for pair in zip(symbols, symbols[1:]):
                pairs[pair] += frequency
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        merged = Counter()
        for symbols, frequency in words.items():
            joined, i = [], 0
            while i < len(symbols):
                width = 2 if tuple(symbols[i : i + 2]) == best else 1
                joined.append("".join(symbols[i : i + width]))
                i += width
            merged[tuple(joined)] += frequency
        words = merged
    return merges


def write_tokenizer(folder: Path) -> None:
    """Writes the four files that Stable Diffusion v1 checkpoints have; there is no tokenizer.json among them."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = list(bytes_to_unicode().values())
    merges = train_merges(VOCAB_SIZE - 2 * len(letters) - 2)
    entries = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), BOS, EOS]
    assert len(set(entries)) == VOCAB_SIZE
    dump = lambda name, value: (folder / name).write_text(json.dumps(value, ensure_ascii=False, indent=0) + "\n")
    dump("vocab.json", {entry: i for i, entry in enumerate(entries)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    special = lambda content, normalized: {
        "content": content, "lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False
    }
    tokens = {"bos_token": special(BOS, True), "eos_token": special(EOS, True), "unk_token": special(EOS, True)}
    dump("special_tokens_map.json", tokens | {"pad_token": EOS})
    typed = {key: {"__type": "AddedToken"} | value for key, value in tokens.items()}
    dump("tokenizer_config.json", typed | {
        "add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": 77,
        "pad_token": EOS, "tokenizer_class": "CLIPTokenizer",
    })
