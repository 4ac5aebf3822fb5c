"""What each way of rounding keeps of the embedding, on real text and on models with planted outliers.

    python benchmarks/quality.py --data DATA --minilm CHECKPOINT --tiny CHECKPOINT --work WORK [--only NAME …]

Each model is built with every recipe and with the steps of int8 and int4 one by one, tuned, and judged (judge.py).
Results are kept model by model in results/quality.json; docs/quality.md is made from them.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from judge import judge
from plant import plant
from quality_page import write_page

import featherbed
from featherbed.check.inspect import inspect_file
from featherbed.folder import MANIFEST, REPORTS, Variant, dump, graph_name, open_folder, write_text
from featherbed.make.calibrate.texts import calibration
from featherbed.make.read import read_graph
from featherbed.make.tune import weight_bytes
from featherbed.pipeline.variants import Writer, calibration_tokens
from featherbed.probe import shipped_calibration
from featherbed.progress import bar
from featherbed.recipe import (
    RECIPES,
    BlockwiseLinear,
    BlockwiseTable,
    Explicit,
    LinearStep,
    MixedLinear,
    PerTokenLinear,
    Recipe,
    Shelf,
    Smooth,
    Step,
    recorded,
)
from featherbed.run.tokens import Tokenizer

HERE = Path(__file__).parent
RESULT = HERE / "results" / "quality.json"
NAMED = ("int8-dynamic", "int8-smooth", "int8", "int8-block", "q4", "int4", "int4-small")
FEW = ("int8-dynamic", "int8", "int8-block", "int4")  # of the models that are variations of another
TUNED_MIN, TRIALS = "cos_min=0.98", 7
TABLE = BlockwiseTable()
FOUR = BlockwiseLinear(bits=4, block=32, accuracy_level=None, searched=True, gptq=True)
STEPS: dict[str, tuple[Step, ...]] = {  # one step more each, up to the recipe
    "int8: nearest": (PerTokenLinear(), TABLE),
    "int8: + smooth": (Smooth(explicit=Explicit.NOT_GELU), PerTokenLinear(), TABLE),
    "int4: searched": (BlockwiseLinear(bits=4, block=32, accuracy_level=None, searched=True), TABLE),
    "int4: + GPTQ": (FOUR, TABLE),
}


@dataclass(frozen=True)
class Model:
    """A checkpoint to judge by; ``places`` are where outliers were planted, by ``factor``."""

    name: str
    family: str  # minilm or tiny
    places: tuple[str, ...] = ()
    factor: float = 1.0
    tuned: bool = True


MODELS = (
    Model("all-MiniLM-L6-v2", "minilm"),
    Model("tiny-qwen3-embedding", "tiny"),
    Model("tiny-qwen3-embedding, norms and down_proj × 100", "tiny", ("norms", "down"), 100),
    Model("tiny-qwen3-embedding, norms and down_proj × 30", "tiny", ("norms", "down"), 30, tuned=False),
    Model("all-MiniLM-L6-v2, values × 100", "minilm", ("values",), 100, tuned=False),
    Model("all-MiniLM-L6-v2, values × 30", "minilm", ("values",), 30, tuned=False),
)


def wanted(model: Model) -> dict[str, Recipe]:
    """What is made of a model beside fp32 and tuned."""
    found = {name: RECIPES[name] for name in (NAMED if model.tuned else FEW)}
    if not model.places:
        found |= {
            name: Recipe(name, f"_step{at}", Shelf.OURS, steps, "") for at, (name, steps) in enumerate(STEPS.items())
        }
    return found


def write(folder: Path, recipes: dict[str, Recipe]) -> dict[str, float]:
    """Variants of a folder, made from its fp32 anew; the seconds that each took."""
    seconds: dict[str, float] = {}
    opened = open_folder(folder)
    spec = opened.manifest.spec
    graph = read_graph(folder / graph_name(""))
    texts = calibration(shipped_calibration(), Tokenizer(folder, spec), spec, calibration_tokens(graph))
    with bar() as progress:
        for name, recipe in recipes.items():
            started = time.perf_counter()
            written = Writer(folder, spec, texts, progress).variant(graph, recipe)
            seconds[name] = round(time.perf_counter() - started, 1)
            least = inspect_file(folder / graph_name(recipe.suffix)).least_onnxruntime
            opened = opened.adding(Variant(name, written.recipe, tuple(written.records), least, None))
    return seconds


def linear_bits(folder: Path, variant: str) -> float:
    """Bits a weight of the linear layers, scales and zero points among them."""
    graph = read_graph(folder / graph_name(""))
    names = sorted(set(graph.linear_names()))
    step = next(
        (s for s in recorded(open_folder(folder).manifest.variants[variant].recipe).steps
         if isinstance(s, LinearStep | MixedLinear)), None,
    )  # fmt: skip
    of = dict(step.layers) if isinstance(step, MixedLinear) else dict.fromkeys(names, step)
    count = sum(math.prod(graph.weights[name].shape) for name in names)
    return round(8 * sum(weight_bytes(graph.weights[name], of[name]) for name in names) / count, 3)


def measured(model: Model, asked: argparse.Namespace) -> dict[str, Any]:
    """Everything that is said of one model, or of those of its variants that are made ``again`` in its folder."""
    folder = asked.work / model.name.replace(" ", "_").replace(",", "")
    recipes = {name: recipe for name, recipe in wanted(model).items() if not asked.again or name in asked.again}
    if not asked.again:
        checkpoint = getattr(asked, model.family)
        if model.places:
            planted = asked.work / "planted"
            shutil.rmtree(planted, ignore_errors=True)
            plant(checkpoint, planted, model.places, model.factor)
            checkpoint = planted
        featherbed.build(checkpoint, folder, ["fp32"], check=False)
    seconds, names = write(folder, recipes), list(recipes)
    with bar() as progress:
        tuned = None
        if model.tuned and (not asked.again or "tuned" in asked.again):
            forget_reports(folder)  # or the search would go on from what it found last time
            tuned = featherbed.tune(folder, minimum=[TUNED_MIN], trials=TRIALS, progress=progress)
            names += ["tuned"] if tuned.winner else []
        result = judge(folder, names, asked.data, progress=progress, keep=asked.work)
    for name in names:
        result["variants"][name] |= {"linear_bits": linear_bits(folder, name), "commit": commit()}
        if name in seconds:
            result["variants"][name]["build_seconds"] = seconds[name]
    if tuned is not None:
        result["tune"] = [
            {**figures, "front": key in tuned.front, "winner": key == tuned.winner}
            for key, figures in tuned.trials.items()
        ]
    return {"planted": {"places": list(model.places), "factor": model.factor}, "tune": [], **result}


def forget_reports(folder: Path) -> None:
    """Take the evidence out of a folder and its manifest."""
    manifest = open_folder(folder).manifest
    files = {name: record for name, record in manifest.files.items() if not name.startswith(f"{REPORTS}/")}
    write_text(folder / MANIFEST, dump(replace(manifest, files=files).to_json()))
    shutil.rmtree(folder / REPORTS, ignore_errors=True)


def commit() -> str:
    """Of the code that is running."""
    words = ["git", "rev-parse", "HEAD"]
    return subprocess.run(words, cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()


def keep(name: str, found: dict[str, Any], again: bool) -> None:
    """Put a model's result into the file and make the page; variants made ``again`` take their namesakes' places."""
    known = json.loads(RESULT.read_text("utf-8")) if RESULT.is_file() else {}
    if again:
        before = known[name]
        variants = {key: found["variants"].pop(key, value) for key, value in before["variants"].items()}
        found = before | {"variants": variants | found["variants"], "tune": found["tune"] or before["tune"]}
    known[name] = found
    known = {model.name: known[model.name] for model in MODELS if model.name in known}
    RESULT.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", "utf-8")
    write_page(known)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "minilm", "tiny", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=None, help="names of models; all by default")
    parser.add_argument("--again", nargs="*", help="variants to make again in the folders of --work; all otherwise")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    for model in MODELS:
        if not asked.only or model.name in asked.only:
            keep(model.name, measured(model, asked), bool(asked.again))


if __name__ == "__main__":
    main()
