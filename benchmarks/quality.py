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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from judge import judge
from plant import plant
from quality_page import write_page

import featherbed
from featherbed.check.inspect import inspect_file
from featherbed.folder import Variant, graph_name, open_folder
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


def build(model: Model, checkpoint: Path, work: Path) -> tuple[Path, dict[str, float]]:
    """The model's folder with everything to be judged, and the seconds that each named recipe took."""
    folder = work / model.name.replace(" ", "_").replace(",", "")
    seconds: dict[str, float] = {}
    with bar() as progress:
        featherbed.build(checkpoint, folder, ["fp32"], check=False, progress=progress)
        opened = open_folder(folder)
        spec = opened.manifest.spec
        graph = read_graph(folder / graph_name(""))
        texts = calibration(shipped_calibration(), Tokenizer(folder, spec), spec, calibration_tokens(graph))
        wanted = {name: RECIPES[name] for name in (NAMED if model.tuned else FEW)}
        if not model.places:
            wanted |= {
                name: Recipe(name, f"_step{at}", Shelf.OURS, steps, "")
                for at, (name, steps) in enumerate(STEPS.items())
            }
        for name, recipe in wanted.items():
            started = time.perf_counter()
            written = Writer(folder, spec, texts, progress).variant(graph, recipe)
            seconds[name] = round(time.perf_counter() - started, 1)
            least = inspect_file(folder / graph_name(recipe.suffix)).least_onnxruntime
            opened = opened.adding(Variant(name, written.recipe, tuple(written.records), least, None))
    return folder, seconds


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


def measured(model: Model, checkpoint: Path, data: Path, work: Path) -> dict[str, Any]:
    """Everything that is said of one model."""
    if model.places:
        planted = work / "planted"
        shutil.rmtree(planted, ignore_errors=True)
        plant(checkpoint, planted, model.places, model.factor)
        checkpoint = planted
    folder, seconds = build(model, checkpoint, work)
    with bar() as progress:
        tuned = featherbed.tune(folder, minimum=[TUNED_MIN], trials=TRIALS, progress=progress) if model.tuned else None
        names = [name for name in open_folder(folder).manifest.variants if name != "fp32"]
        result = judge(folder, names, data, progress=progress, keep=work)
    for name in names:
        variant = result["variants"][name]
        variant["linear_bits"] = linear_bits(folder, name)
        if name in seconds:
            variant["build_seconds"] = seconds[name]
    trials = [] if tuned is None else [
        {**figures, "front": key in tuned.front, "winner": key == tuned.winner} for key, figures in tuned.trials.items()
    ]  # fmt: skip
    return {**result, "planted": {"places": list(model.places), "factor": model.factor}, "tune": trials}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "minilm", "tiny", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=None, help="names of models; all by default")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=True).stdout
    for model in MODELS:
        if asked.only and model.name not in asked.only:
            continue
        found = measured(model, getattr(asked, model.family), asked.data, asked.work)
        known = json.loads(RESULT.read_text("utf-8")) if RESULT.is_file() else {}
        known[model.name] = {"commit": commit.strip(), **found}
        RESULT.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", "utf-8")
        write_page(known)


if __name__ == "__main__":
    main()
