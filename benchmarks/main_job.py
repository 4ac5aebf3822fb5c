"""What it costs to make the files of the 0.6B shape, against the stock path, in one run.

    python benchmarks/main_job.py --ours PYTHON --stock PYTHON --tokenizer FOLDER [--work FOLDER]

Builds fp32 + int8-dynamic + q4 with featherbed and with torch export + quantize_dynamic + MatMulNBits, and fp32 + int4,
which is calibrated and compensated, with featherbed alone; each in a process of its own whose time and memory are
watched. Writes benchmarks/results/main_job.json. How fast the files run is engine.py's to say; given the same --work,
it uses the stock files again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from checkpoint import make
from processes import HERE, FailedError, commit, watched

from featherbed.check.machine import machine


def stages(ours: Path, stock: Path, checkpoint: Path, work: Path) -> dict[str, list[str]]:
    """Name → command. Ours makes three files at once, the stock path one after the other."""
    verb = [str(ours), "-m", "featherbed.cli", "build", str(checkpoint), "--no-verify"]
    script, fp32 = [str(stock), str(HERE / "stock.py")], work / "stock" / "model.onnx"
    return {
        "featherbed": [*verb, "-o", str(work / "ours"), "--variants", "fp32,int8-dynamic,q4"],
        "stock export": [*script, "export", str(checkpoint), str(fp32)],
        "stock int8": [*script, "int8", str(fp32), str(fp32.parent / "int8" / "model.onnx")],
        "stock q4": [*script, "q4", str(fp32), str(fp32.parent / "q4" / "model.onnx")],
        "featherbed int4": [*verb, "-o", str(work / "ours"), "--variants", "fp32,int4"],
    }


def main() -> None:
    """Everything, in one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", type=Path, default=sys.executable, help="a Python with featherbed")
    parser.add_argument("--stock", type=Path, required=True, help="a Python with torch, transformers, onnxscript")
    parser.add_argument("--tokenizer", required=True, type=Path, help="config.json and tokenizer.json of the model")
    parser.add_argument("--work", type=Path, help="where 12 GB fit; kept when given")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "main_job.json")
    options = parser.parse_args()
    work = (options.work or Path(tempfile.mkdtemp(prefix="featherbed-bench-"))).absolute()
    checkpoint = work / "qwen3-0.6b"
    for name in ("stock", "ours"):
        shutil.rmtree(work / name, ignore_errors=True)
    make(options.tokenizer, checkpoint)
    build = {}
    for name, words in stages(options.ours.absolute(), options.stock.absolute(), checkpoint, work).items():
        print(name, file=sys.stderr)
        try:
            build[name] = watched(words)
        except FailedError as error:
            sys.exit(f"{name} failed: {error}")
    stock_seconds = sum(v["seconds"] for k, v in build.items() if k.startswith("stock"))
    result = {
        "machine": machine(),
        "commit": commit(),
        "build": build,
        "ratios": {"build_stock_over_ours": round(stock_seconds / build["featherbed"]["seconds"], 2)},
    }
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    print(json.dumps(result, indent=2))
    if not options.work:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
