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
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from conform_page import write_page
from runners import browser as runner

import featherbed
from featherbed.check import tries
from featherbed.check.facts import Facts, GraphFile, facts
from featherbed.recipe import RECIPES

HERE = Path(__file__).parent
RESULT = HERE / "results" / "conform.json"
TEXTS = [(kind, text) for kind, text in json.loads((HERE / "conform_texts.json").read_text("utf-8"))]
NODE = "transformers.js Node"
BROWSER = {"transformers.js Chromium": "tried", "onnxruntime-web Chromium": "alone"}  # functions of embed.mjs
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


def cells(found: Facts, graph: GraphFile, peers: Peers, versions: dict[str, str]) -> dict[str, Any]:
    """What everybody makes of one graph: cosines to ours, or why there are none."""
    mine, why = tries.own(found, graph, TEXTS)
    result: dict[str, Any] = {"size_bytes": graph.seen.size_bytes if graph.seen else 0, "ours": why or "runs"}
    told = tries.job(found, graph, TEXTS)
    for cell in CELLS:
        answer = peers.answer(cell, told)
        versions |= answer.versions
        row: dict[str, Any] = {"cosine": tries.cosine(answer.vectors, mine)}
        row["cosine_at_once"] = tries.cosine(answer.batched, mine)
        reason = answer.error or (f"not installed: {answer.missing}" if answer.missing else "")
        result[cell] = {k: v for k, v in row.items() if v is not None} | ({"why": reason} if reason else {})
        sys.stderr.write(f"{graph.variant}: {cell}: {result[cell]}\n")
    return result


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
                rows = {graph.variant: cells(found, graph, peers, versions) for graph in found.graphs}
                before = known["models"].get(name, {}) if wanted else {}
                known["models"][name] = before | rows
    known = {"versions": known.get("versions", {}) | versions, "texts": len(TEXTS), "models": known["models"]}
    RESULT.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", "utf-8")
    write_page(known)


if __name__ == "__main__":
    main()
