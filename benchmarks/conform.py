"""Does every variant load unchanged elsewhere, and are the vectors ours? results/conform.json and docs/conform.md.

Run by Python that has featherbed and playwright: python benchmarks/conform.py --python PYTHON --node FOLDER
  --checkpoint NAME=FOLDER    built here with every recipe of ours, into --work; may be repeated
  --folder NAME=FOLDER        a model folder that is taken as it is; may be repeated
PYTHON is one that has sentence-transformers with optimum-onnx, and fastembed; FOLDER has node_modules with
@huggingface/transformers. Texts are conform_texts.json, each embedded alone; then all of them at once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
from conform_page import write_page
from runners import browser as runner

import featherbed
from featherbed.check import tries
from featherbed.check.facts import Facts, GraphFile, facts
from featherbed.folder import MANIFEST
from featherbed.recipe import RECIPES, REFERENCE
from featherbed.run.foreign import Foreign

Vectors = npt.NDArray[np.float64]
HERE = Path(__file__).parent
RESULT = HERE / "results" / "conform.json"
TEXTS = [(kind, text) for kind, text in json.loads((HERE / "conform_texts.json").read_text("utf-8"))]
NODE = "transformers.js Node"
BROWSER = {"transformers.js Chromium": "tried", "onnxruntime-web Chromium": "alone"}  # functions of embed.mjs
QUANTIZED = "sentence_embedding_quantized"
FLOATS_ONLY = {
    "sentence-transformers": "reads last_hidden_state",
    "fastembed": "normalizes what it reads, and codes have a zero point",
}
CELLS = ("onnxruntime", "sentence-transformers", "fastembed", NODE, *BROWSER)


class Peers:
    """Everyone who is asked, where they are, and Chromium as long as it is needed."""

    def __init__(self, python: Path, node: Path, stack: ExitStack) -> None:
        self.python, self.node = python, node
        found = runner.chromium()
        self.browser = stack.enter_context(runner.opened()) if found else None

    def answer(self, cell: str, told: dict[str, Any]) -> tries.Answer:
        if cell == NODE:
            return tries.in_node("node", self.node, told)
        if cell in BROWSER:
            if self.browser is None:
                return tries.Answer(missing="Chromium")
            packages = self.node / "node_modules"
            return tries.parsed(runner.answer(self.browser, BROWSER[cell], told, packages, tries.SCRIPTS))
        return tries.in_python(self.python, cell, told)


@dataclass(frozen=True)
class Asked:
    """One row: what everybody is told, our vectors (or why there are none), and those of fp32 on the same texts.

    ``back`` makes vectors of what the output gives, where that is codes.
    """

    name: str
    told: dict[str, Any]
    size_bytes: int
    mine: Vectors | None
    why: str
    exact: Vectors | None
    back: Callable[[Vectors], Vectors] | None = None


def rows(found: Facts, graph: GraphFile, exact: Vectors | None) -> Iterator[Asked]:
    """The row of a graph, and one more where it gives its vector in codes too."""
    told = tries.job(found, graph, TEXTS)
    size = graph.seen.size_bytes if graph.seen else 0
    mine, why = tries.own(found, graph, TEXTS)
    yield Asked(graph.variant, told, size, mine, why, exact)
    step = QUANTIZED in (graph.seen.outputs if graph.seen else ()) and chosen(found, graph.variant)
    if step:
        told, back = told | {"output": QUANTIZED}, partial(dequantized, step)
        yield Asked(f"{graph.variant}, its codes", told, size, coded(found.path, graph.file), "", exact, back)


def coded(folder: Path, file: str) -> Vectors:
    """Our reading of the codes: of a copy without manifest, since of our own folders we read the floats."""
    with TemporaryDirectory() as place:
        for path in (Path(file), *(p.relative_to(folder) for p in folder.rglob("*.json") if p.name != MANIFEST)):
            (Path(place) / path).parent.mkdir(exist_ok=True)
            shutil.copy(folder / path, Path(place) / path)
        model = featherbed.Embedder(Path(place) / file, foreign=Foreign(output=QUANTIZED))
        calls = {"query": model.encode_query, "document": model.encode_document}
        return np.stack([np.asarray(calls[kind](text), np.float64) for kind, text in TEXTS])


def chosen(found: Facts, variant: str) -> dict[str, Any] | None:
    """The manifest's scale and zero point of a variant's codes."""
    steps = json.loads((found.path / MANIFEST).read_text("utf-8"))["variants"][variant]["recipe"]["steps"]
    return next((step for step in steps if step["step"] == "QuantizedOutput"), None)


def dequantized(step: dict[str, Any], codes: Vectors) -> Vectors:
    return np.asarray((codes - step["zero_point"]) * step["scale"], np.float64)


def cells(asked: Asked, peers: Peers, versions: dict[str, str]) -> dict[str, Any]:
    """What everybody makes of one row: cosines to ours, or why there are none; ``kept`` is worst and mean to fp32."""
    result: dict[str, Any] = {"size_bytes": asked.size_bytes, "ours": asked.why or "runs"}
    result |= kept(asked.mine, asked.exact)
    for cell in CELLS:
        if asked.back and cell in FLOATS_ONLY:
            result[cell] = {"why": FLOATS_ONLY[cell], "asked": False}
            continue
        answer = peers.answer(cell, asked.told)
        versions |= answer.versions
        single, batched = answer.vectors, answer.batched
        if asked.back and single is not None and batched is not None:
            single, batched = asked.back(single), asked.back(batched)
        row = {"cosine": tries.cosine(single, asked.mine), "cosine_at_once": tries.cosine(batched, asked.mine)}
        reason = answer.error or (f"not installed: {answer.missing}" if answer.missing else "")
        result[cell] = {k: v for k, v in row.items() if v is not None} | kept(single, asked.exact)
        result[cell] |= {"why": reason} if reason else {}
        sys.stderr.write(f"{asked.name}: {cell}: {result[cell]}\n")
    return result


def kept(vectors: Vectors | None, exact: Vectors | None) -> dict[str, Any]:
    if vectors is None or exact is None or vectors.shape != exact.shape:
        return {}
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(exact, axis=1)
    cosines = np.sum(vectors * exact, axis=1) / np.where(lengths > 0, lengths, np.inf)
    return {"kept": [float(cosines.min()), float(cosines.mean())]}


def folder_of(kind: str, name: str, path: Path, work: Path) -> Path:
    """The model folder: as handed in, or built from a checkpoint."""
    if kind == "folder":
        return path
    out = work / f"{name}-onnx"
    featherbed.build(path, out, list(RECIPES), check=False)
    return out


def pair(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    return name, Path(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, default=Path(sys.executable))
    parser.add_argument("--node", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--checkpoint", type=pair, action="append", default=[])
    parser.add_argument("--folder", type=pair, action="append", default=[])
    parser.add_argument("--variants", default="", help="comma-separated; all of each folder otherwise")
    asked = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # of those who are started
    known = json.loads(RESULT.read_text("utf-8")) if RESULT.is_file() else {"models": {}}
    versions: dict[str, str] = {"featherbed": featherbed.__version__, "Python": platform.python_version()}
    wanted = [word for word in asked.variants.split(",") if word]
    with ExitStack() as stack:
        peers = Peers(asked.python, asked.node, stack)
        for kind in ("checkpoint", "folder"):
            for name, path in getattr(asked, kind):
                found = facts(folder_of(kind, name, path, asked.work), wanted or None)
                exact = tries.own(found, facts(found.path, [REFERENCE]).graphs[0], TEXTS)[0]
                every = (row for graph in found.graphs for row in rows(found, graph, exact))
                done = {row.name: cells(row, peers, versions) for row in every}
                before = known["models"].get(name, {}) if wanted else {}
                known["models"][name] = before | done
    known = {"versions": known.get("versions", {}) | versions, "texts": len(TEXTS), "models": known["models"]}
    RESULT.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", "utf-8")
    write_page(known)


if __name__ == "__main__":
    main()
