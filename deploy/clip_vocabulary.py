"""Writes vocab.json and merges.txt, the two files that a Stable Diffusion v1 checkpoint's tokenizer folder holds,
from OpenAI CLIP's bpe_simple_vocab_16e6.txt.gz: 256 byte symbols, the same at a word's end, 48,894 merges, two
special tokens.

usage: clip_vocabulary.py VOCABULARY.gz FOLDER
"""
import gzip
import json
import pathlib
import sys


def byte_symbols():
    """The printable character that stands for each byte, in the order that numbers the vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


def main(source, folder):
    lines = gzip.open(source, "rt", encoding="utf-8").read().split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]
    symbols = byte_symbols()
    tokens = symbols + [symbol + "</w>" for symbol in symbols] + ["".join(merge.split()) for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    assert len(tokens) == 49408, len(tokens)
    folder = pathlib.Path(folder)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


main(*sys.argv[1:])
