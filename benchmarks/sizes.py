"""Sizes of every variant of the 0.6B shape beside those that are published for Qwen3-Embedding-0.6B.

    python benchmarks/sizes.py --tokenizer FOLDER [--work FOLDER] [--variants A,B]

Only sizes: the recipes that look at texts are shown the few of tests/fixtures, which changes codes and no byte count.
Writes benchmarks/results/sizes.json and the table in docs/sizes.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint import make
from processes import HERE, FailedError, commit, watched
from tables import markdown

from featherbed.folder import open_folder

GB, MIB = 10**9, 2**20
PAGE = HERE.parent / "docs" / "sizes.md"
FEW = HERE.parent / "tests" / "fixtures" / "calibration.jsonl"
POSITIONS, HEAD = 32_768, 128  # what published graphs store cosines and sines for


@dataclass(frozen=True)
class Published:
    """What others say about their file of a kind: as they say it, and as a range of bytes as wide as its digits."""

    said: str
    low: float
    high: float


def _said(text: str, value: float, unit: float, half: float) -> Published:
    """A figure that was rounded to ``half`` of its last digit."""
    return Published(text, (value - half) * unit, (value + half) * unit)


PUBLISHED = {
    "fp32": _said("2.3 GB", 2.3, GB, 0.05),
    "fp16": _said("1.1 GB", 1.1, GB, 0.05),
    "int8-dynamic": Published("1.06–1.1 GB", 1.055 * GB, 1.15 * GB),
    "int8-full": _said("0.6 GB", 0.6, GB, 0.05),
    "uint8": _said("585 MB", 585, MIB, 0.5),  # MiB: with the rotary tables ours has exactly as many
    "q4": _said("871 MiB", 871, MIB, 0.5),
    "q4f16": _said("540 MiB", 540, MIB, 0.5),
    "bnb4": _said("845 MiB", 845, MIB, 0.5),
}


def off(size: float, published: Published) -> float:
    """By how much of it a size is outside what was published; 0 inside the rounding of its digits."""
    if published.low <= size <= published.high:
        return 0.0
    bound = published.low if size < published.low else published.high
    return size / bound - 1


def rotary(variant: str) -> int:
    """Bytes of the cosines and sines that published graphs store: two tables, half a head wide, of every position."""
    return 2 * POSITIONS * HEAD // 2 * (2 if variant in ("fp16", "q4f16") else 4)


def page(result: dict[str, Any]) -> str:
    """The table."""
    rows = []
    for name, size in result["variants"].items():
        known = PUBLISHED.get(name)
        row = [f"`{name}`", f"{size / 1e6:.0f}", f"{size / MIB:.0f}"]
        if known is None:
            rows.append([*row, "", "", ""])
            continue
        both = size + rotary(name)
        rows.append([*row, known.said, f"{off(size, known):+.1%}", f"{off(both, known):+.1%}"])
    return markdown(["variant", "MB", "MiB", "published", "difference", "with their rotary tables"], rows)


def main() -> None:
    """Build, weigh, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", type=Path, default=sys.executable, help="a Python with featherbed")
    parser.add_argument("--tokenizer", required=True, type=Path, help="config.json and tokenizer.json of the model")
    parser.add_argument("--work", type=Path, help="where 16 GB fit; kept when given")
    parser.add_argument("--variants", default=",".join(PUBLISHED), help="all builds the calibrated ones too: an hour")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "sizes.json")
    options = parser.parse_args()
    work = (options.work or Path(tempfile.mkdtemp(prefix="featherbed-sizes-"))).absolute()
    make(options.tokenizer, work / "qwen3-0.6b")
    shutil.rmtree(work / "sizes", ignore_errors=True)
    verb = [str(options.ours.absolute()), "-m", "featherbed.cli", "build", str(work / "qwen3-0.6b"), "--no-verify"]
    words = [*verb, "-o", str(work / "sizes"), "--variants", options.variants, "--calibration", str(FEW)]
    try:
        cost = watched(words)
    except FailedError as error:
        sys.exit(f"the build failed: {error}")
    manifest = open_folder(work / "sizes").manifest
    sizes = {name: manifest.size_bytes(name) for name in manifest.variants}
    result = {"commit": commit(), "build": cost, "variants": dict(sorted(sizes.items(), key=lambda one: -one[1]))}
    options.out.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    before, _, rest = PAGE.read_text("utf-8").partition("<!-- sizes -->\n")
    PAGE.write_text(f"{before}<!-- sizes -->\n{page(result)}\n<!-- end -->{rest.partition('<!-- end -->')[2]}", "utf-8")
    print(page(result))
    if not options.work:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
