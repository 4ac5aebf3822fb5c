"""The demo: build, verify, measure, embed, ask. Every step is a command or a call that you can repeat.

python demo/demo.py CHECKPOINT_OR_HUB_ID
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from featherbed import Embedder

HERE = Path(os.path.relpath(Path(__file__).parent))  # short where it is shown
OUT = HERE / "out"
VARIANTS = "fp32,int8,int8-block,q4"
console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def featherbed(*words: str, gates: bool = False) -> Any:
    """Run a verb with --json, show it as one would type it, return its document."""
    console.print(f"\n[bold]$ featherbed {shlex.join(words)}[/bold]")
    command = [sys.executable, "-m", "featherbed.cli", *words, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in ({0, 1} if gates else {0}):
        sys.exit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def show(report: Any, speed: Any) -> None:
    """One table of everything that was measured."""
    probe = report["probe"]
    title = (
        f"{probe['texts']} texts and {probe['triplets']} triplets of the probe {probe['name']}; cosines against fp32"
    )
    table = Table(title=title, title_justify="left")
    names = ("variant", "MB", "cos worst", "cos mean", "invariance", "triplets", "tokens/s", "memory MiB", "gates")
    for at, name in enumerate(names):
        table.add_column(name, justify="right" if at else "left")
    failed = {g["variant"] for g in report["gates"] if not g["passed"]}
    for name, m in report["variants"].items():
        b = speed["variants"][name]
        table.add_row(
            name,
            f"{m['size_bytes'] / 1e6:.1f}",
            f"{m['cos_min']:.4f}",
            f"{m['cos_mean']:.5f}",
            f"{m['invariance_max']:.0e}",
            f"{m['triplets_correct']}/{m['triplets_total']}",
            f"{b['tokens_per_s']:.0f}",
            f"{b['rss_mib']:.0f}",
            "FAILED" if name in failed else "passed",
        )
    console.print()
    console.print(table)
    console.print(
        "invariance: largest 1 − cosine between a text's vector alone and in a batch of 64, padded left or right."
    )
    for gate in report["gates"]:
        if not gate["passed"]:
            console.print(
                f"{gate['variant']} fails its gate: {gate['metric']} {gate['value']:.4f}, bound {gate['bound']:g}. "
                "It is the recipe most q4 files ship; finding that out before your users do is what verify is for."
                if gate["variant"] == "q4"
                else f"{gate['variant']} fails its gate: {gate['metric']} {gate['value']:.4g}, bound {gate['bound']:g}."
            )


def ask(model: Embedder, vectors: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    """Answer the questions from the passages."""
    passages = [json.loads(line) for line in (HERE / "passages.jsonl").read_text("utf-8").splitlines()]
    questions = [json.loads(line) for line in (HERE / "questions.jsonl").read_text("utf-8").splitlines()]
    started = time.perf_counter()
    queries = model.encode_query([q["question"] for q in questions])
    scores = model.similarity(queries, vectors)
    milliseconds = 1000 * (time.perf_counter() - started)
    right = 0
    for question, row in zip(questions, scores, strict=True):
        best = passages[int(row.argmax())]
        right += best["pep"] == question["pep"]
        console.print(f"\n[bold]? {question['question']}[/bold]")
        text = " ".join(best["text"].split())
        console.print(f"  {row.max():.2f}  PEP {best['pep']}, {best['title']}: {text[:150]}…")
    console.print(
        f"\n{right} of {len(questions)} questions led to the PEP that answers them, among {len(passages)} passages; "
        f"all asked in {milliseconds:.0f} ms."
    )


def main(source: str) -> None:
    """The whole river."""
    folder = OUT / f"{Path(source.partition('@')[0]).name}-onnx"
    OUT.mkdir(exist_ok=True)
    featherbed("build", source, "-o", str(folder), "--variants", VARIANTS, "--no-verify")
    report = featherbed("verify", str(folder), "--save", gates=True)
    speed = featherbed("bench", str(folder), "--save")
    show(report, speed)
    vectors = OUT / "passages.npy"
    embedded = featherbed("embed", str(folder), str(HERE / "passages.jsonl"), "-o", str(vectors), "--variant", "int8")
    console.print(f"{embedded['texts']} passages embedded with int8 in {embedded['seconds']:.1f} s")
    ask(Embedder(folder, "int8"), np.load(vectors))
    console.print(f"\nThe model folder: {folder} (its README.md is the card, written from this evidence)")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
