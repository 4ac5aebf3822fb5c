"""What is run: rows of token ids, the same for every runner."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from featherbed.run.tokens import Tokenizer
from featherbed.spec import read_spec

Rows = list[list[int]]
SHAPES = {"8x128": (8, 128), "1x16": (1, 16), "1x128": (1, 128), "1x512": (1, 512)}
MIXED = "mixed"
WARM = "warm"  # its first texts, unmeasured
SANITY = "sanity"  # one short row, to hold vectors against each other
TEXT_KEYS = ("text", "sentence1")
SEED = 20261121


def fixed(vocabulary: int, names: Sequence[str]) -> dict[str, Rows]:
    """Random ids of the whole vocabulary, every token real; and the row for the sanity check."""
    rng = np.random.default_rng(SEED)
    shapes = {SANITY: (1, 12), **{name: SHAPES[name] for name in names}}
    return {name: rng.integers(0, vocabulary, shape).tolist() for name, shape in shapes.items()}


def mixed(checkpoint: Path, files: Sequence[Path], count: int) -> Rows:
    """``count`` texts, as many of each file, shuffled, tokenized with the model's end token and cut at its longest."""
    rng = np.random.default_rng(SEED)
    chosen: list[str] = []
    for path in files:
        texts = [text(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
        places = rng.choice(len(texts), min(len(texts), count // len(files)), replace=False)
        chosen += [texts[place] for place in places]
    order = rng.permutation(len(chosen))
    return Tokenizer(checkpoint, read_spec(checkpoint)).encode([chosen[place] for place in order]).ids


def text(line: str) -> str:
    """The text of one line of JSON."""
    row = json.loads(line)
    for key in TEXT_KEYS:
        if key in row:
            return str(row[key])
    raise SystemExit(f"--texts: expected a key {' or '.join(TEXT_KEYS)} in every line, found {', '.join(row)}")
