"""The engine against its peers, on the shape of Qwen3-Embedding-0.6B and on all-MiniLM-L6-v2, in one run.

    python benchmarks/engine.py --ours PYTHON --stock PYTHON --tokenizer FOLDER [--minilm FOLDER] [--texts FILE …]
        [--openvino PYTHON] [--llama PYTHON] [--sentence-transformers PYTHON] [--fastembed PYTHON]

Makes every contender's file (those in --work are used again unless --fresh), then runs all of them in turn, each in
a process of its own. A peer without a Python is left out, and the result says so. Writes
benchmarks/results/engine.json. Run it with the Python of --ours.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint import make
from contenders import MINILM_SHAPES, OURS, PEERS, STOCK, Contender, lay_beside, minilm, qwen3
from costs import Costs
from processes import HERE, FailedError, commit, watched
from race import race
from ratios import ratios, tokens_per_s
from wall import operations_per_token
from workloads import MIXED, SHAPES, WARM, Rows, fixed, mixed, text

from featherbed.check.machine import machine
from featherbed.folder import open_folder

VARIANTS = "fp32,int8,int8-block,int4,int4-small,q4"
QWEN3, MINILM = "qwen3-0.6b", "all-MiniLM-L6-v2"
NOT_GIVEN: dict[str, Any] = {"not_run": "no --minilm given", "results": {}}
MINILM_ROUNDS = 4  # times those of the large one: its runs are short


def place(text: str) -> Path:
    """A path that means the same in every folder; a Python's link is not followed, it is what makes it a venv's."""
    return Path(text).absolute()


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", type=place, default=sys.executable, help="a Python with featherbed")
    parser.add_argument("--stock", type=place, required=True, help="a Python with torch, transformers, onnxscript")
    for peer in PEERS:
        parser.add_argument(f"--{peer}", type=place, help=f"a Python with {peer}")
    parser.add_argument("--tokenizer", type=place, required=True, help="config.json and tokenizer.json of the model")
    parser.add_argument("--minilm", type=place, help="a checkpoint of all-MiniLM-L6-v2")
    parser.add_argument("--texts", type=place, nargs="+", default=[], help="JSON lines, with text or sentence1: mixed")
    parser.add_argument("--text-count", type=int, default=256)
    parser.add_argument("--variants", default=VARIANTS, help="of ours")
    parser.add_argument("--only", help="contenders to run, e.g. 'wall,int8,stock fp32'")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=place, help="where 25 GB fit; kept when given")
    parser.add_argument("--fresh", choices=("ours", "all"), help="make these files again")
    parser.add_argument("--out", type=place, default=HERE / "results" / "engine.json")
    return parser.parse_args()


def files_made(contender: Contender, python: str, fresh: bool, done: dict[tuple[str, ...], str]) -> str:
    """Make a contender's files unless they are there; why they are not, or nothing. ``done``: commands run so far."""
    command = contender.command
    if command and command not in done and (fresh or not contender.files[0].is_file()):
        print(f"  making {contender.name}", file=sys.stderr)
        try:
            watched([python, *command])
            done[command] = ""
        except FailedError as error:
            contender.files[0].unlink(missing_ok=True)
            done[command] = f"could not be made: {error}"
    if done.get(command):
        return done[command]
    if contender.files and not contender.files[0].is_file():
        return f"expected {contender.files[0].name}, found no such file"
    lay_beside(contender)
    return ""


@dataclass(frozen=True)
class Model:
    """A checkpoint, who runs it, and what."""

    checkpoint: Path
    contenders: Sequence[Contender]
    shapes: Sequence[str]
    rounds: int


def measure(model: Model, rows: dict[str, Rows], options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Make what is missing, race, and say of those who did not run why."""
    pythons = {name: str(getattr(options, name.replace("-", "_")) or "") for name in (OURS, STOCK, *PEERS)}
    only = [name.strip() for name in options.only.split(",")] if options.only else None
    results: dict[str, Any] = {}
    ready: list[Contender] = []
    done: dict[tuple[str, ...], str] = {}
    for contender in model.contenders:
        if only and contender.name not in only:
            results[contender.name] = {"not_run": "not asked for"}
        elif not pythons[contender.party]:
            results[contender.name] = {"not_run": f"no --{contender.party} given"}
        else:
            fresh = options.fresh == "all" or options.fresh == contender.party
            reason = files_made(contender, pythons[contender.party], fresh, done)
            results[contender.name] = {"not_run": reason}
            ready += [] if reason else [contender]
    file = work / "workloads.json"
    file.write_text(json.dumps(rows), "utf-8")
    raced = race(ready, pythons, file, rows, model.rounds)
    for contender in ready:
        results[contender.name] = {"size_bytes": size_bytes(contender), **raced[contender.name]}
    return results


def size_bytes(contender: Contender) -> int:
    """Bytes of a contender's files; of ours, those the manifest names."""
    if contender.module == "runners.ours":
        folder, variant = contender.words
        return open_folder(Path(folder)).manifest.size_bytes(variant)
    return sum(path.stat().st_size for path in contender.files if path.is_file())


def described(rows: dict[str, Rows]) -> dict[str, Any]:
    """Texts and tokens of each workload."""
    return {
        name: {"texts": len(r), "tokens": sum(map(len, r)), "longest": max(map(len, r))} for name, r in rows.items()
    }


def one_model(model: Model, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Workloads and figures of one checkpoint."""
    print(model.checkpoint.name, file=sys.stderr)
    config = json.loads((model.checkpoint / "config.json").read_text("utf-8"))
    rows = fixed(config["vocab_size"], model.shapes)
    if options.texts:
        rows[MIXED] = mixed(model.checkpoint, options.texts, options.text_count)
        rows[WARM] = rows[MIXED][:8]
    return {"workloads": described(rows), "results": measure(model, rows, options, work)}


def parts(options: argparse.Namespace, work: Path) -> Iterator[dict[str, Any]]:
    """MiniLM; the 0.6B shape, the wall, and what they say of each other; what the engine takes beside time."""
    checkpoint, texts = work / QWEN3, bool(options.texts)
    small = NOT_GIVEN
    if options.minilm:
        contenders, rounds = minilm(options.minilm, work, texts), MINILM_ROUNDS * options.rounds
        small = one_model(Model(options.minilm, contenders, MINILM_SHAPES, rounds), options, work)
    yield {MINILM: small}
    contenders = qwen3(checkpoint, work, tuple(options.variants.split(",")), texts)
    big = one_model(Model(checkpoint, contenders, tuple(SHAPES), options.rounds), options, work)
    operations = operations_per_token(json.loads((checkpoint / "config.json").read_text("utf-8")))
    at_wall = tokens_per_s(big["results"], "wall", "8x128")
    wall = {
        "mflop_per_token": round(operations / 1e6, 1),
        "gop_per_s": round(at_wall * operations / 1e9, 1) if at_wall else None,
        "tokens_per_s": at_wall,
    }
    yield {"wall": wall, QWEN3: big, "ratios": ratios(big["results"], small["results"])}
    yield {"costs": costs(options, work)}


def costs(options: argparse.Namespace, work: Path) -> dict[str, Any] | None:
    """What the engine takes beside time; None where only some contenders were asked for."""
    if options.only:
        return None
    print("costs", file=sys.stderr)
    lines = work / "sentences.txt"
    if options.texts:
        rows = (text(line) for line in options.texts[0].read_text("utf-8").splitlines() if line.strip())
        lines.write_text("".join(f"{' '.join(row.split())}\n" for row in rows), "utf-8")
    small = work / "minilm-ours" if options.minilm else None
    return Costs(str(options.ours), work / "ours", small, lines if options.texts else None).all()


def main() -> None:
    """Everything, in one run."""
    options = read_options()
    work = options.work or Path(tempfile.mkdtemp(prefix="featherbed-bench-"))
    make(options.tokenizer, work / QWEN3)
    os.environ["FEATHERBED_CACHE"] = str(work / "cache")  # of the runners of ours: the first to load fills it
    if options.fresh:
        shutil.rmtree(work / "cache", ignore_errors=True)
    result: dict[str, Any] = {"machine": machine(), "commit": commit(), "rounds": options.rounds}
    for part in parts(options, work):
        result |= part
        document = json.dumps(result, indent=2, ensure_ascii=False).replace(f"{work}/", "")  # a reason may name a file
        (work / "engine.json").write_text(document + "\n", "utf-8")  # an hour's work: kept, were the rest to fail
    options.out.parent.mkdir(exist_ok=True)
    shutil.copyfile(work / "engine.json", options.out)
    shown = {key: result[key] for key in ("wall", "ratios", "costs")}
    print(json.dumps(shown, indent=2, ensure_ascii=False))
    if not options.work:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
