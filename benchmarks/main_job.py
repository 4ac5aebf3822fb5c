"""The main job on the shape of Qwen3-Embedding-0.6B, against the stock path, in one run.

    python benchmarks/main_job.py --ours PYTHON --stock PYTHON --tokenizer FOLDER [--work FOLDER]

Builds fp32 + int8 + q4 with featherbed and with torch export + quantize_dynamic + MatMulNBits, each in a process
of its own whose time and memory are watched; then runs the graphs in turn, round by round, on the same
onnxruntime, and takes medians. Writes benchmarks/results/main_job.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from checkpoint import make
from memory import memory_mib

from featherbed.check.machine import machine

HERE = Path(__file__).parent
SHAPES = ((8, 128), (1, 128), (1, 512), (1, 16))
ROUNDS = 5
SAMPLE_S = 0.02


def watched(words: list[str]) -> dict[str, float]:
    """Run a command; wall seconds, peak RSS and the largest private memory seen, in MiB."""
    private = peak = 0.0
    with tempfile.TemporaryFile("w+") as errors:  # not a pipe: it would fill up while nobody reads
        started = time.perf_counter()
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=errors, text=True)
        while process.poll() is None:
            now = memory_mib(process.pid)
            private, peak = max(private, now["rss_private_mib"]), max(peak, now["rss_peak_mib"])
            time.sleep(SAMPLE_S)
        seconds = time.perf_counter() - started
        if process.returncode:
            errors.seek(0)
            sys.exit(f"{' '.join(words)} failed:\n{errors.read()[-2000:]}")
    return {"seconds": round(seconds, 2), "private_peak_mib": private, "rss_peak_mib": peak}


class Runner:
    """One graph, loaded in its own process."""

    def __init__(self, python: str, path: Path, output: str, shape: tuple[int, int], vocabulary: int) -> None:
        words = [python, str(HERE / "run_graph.py"), str(path), output, str(shape[0]), str(shape[1]), str(vocabulary)]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.load_s = self.answer()["load_s"]

    def answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        return dict(json.loads(self.process.stdout.readline()))

    def run(self) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def speed(python: str, graphs: dict[str, tuple[Path, str]], shape: tuple[int, int], vocabulary: int) -> dict[str, Any]:
    """Tokens a second and memory of each graph: rounds in turn, the first one to warm up, medians."""
    runners = {name: Runner(python, path, output, shape, vocabulary) for name, (path, output) in graphs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in graphs}
    last: dict[str, dict[str, float]] = {}
    for turn in range(ROUNDS + 1):
        for name, runner in runners.items():
            last[name] = runner.run()
            if turn:
                seconds[name].append(last[name].pop("seconds"))
        print(f"  {shape[0]}×{shape[1]} round {turn} of {ROUNDS}", file=sys.stderr)
    for runner in runners.values():
        runner.close()
    tokens = shape[0] * shape[1]
    return {
        name: {
            "tokens_per_s": round(tokens / statistics.median(times), 1),
            "load_s": round(runners[name].load_s, 2),
            **last[name],
        }
        for name, times in seconds.items()
    }


def siblings(path: Path) -> list[Path]:
    """A graph and its sidecar, whichever way that is spelt."""
    return [p for p in path.parent.iterdir() if p.name in {path.name, f"{path.name}_data", f"{path.name}.data"}]


def main() -> None:
    """Everything, in one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", default=sys.executable, help="a Python with featherbed")
    parser.add_argument("--stock", required=True, help="a Python with torch, transformers, onnxscript")
    parser.add_argument("--tokenizer", required=True, type=Path, help="config.json and tokenizer.json of the model")
    parser.add_argument("--work", type=Path, help="where 12 GB fit; kept when given")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "main_job.json")
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="featherbed-bench-"))
    checkpoint, stock, ours = work / "qwen3-0.6b", work / "stock", work / "ours"
    for folder in (stock, ours):
        shutil.rmtree(folder, ignore_errors=True)
    if not (checkpoint / "model.safetensors").is_file():
        make(options.tokenizer, checkpoint)
    vocabulary = json.loads((checkpoint / "config.json").read_text("utf-8"))["vocab_size"]
    verb = [options.ours, "-m", "featherbed.cli", "build", str(checkpoint), "-o", str(ours)]
    build = {}
    print("featherbed build, unverified", file=sys.stderr)
    build["featherbed"] = watched([*verb, "--variants", "fp32,int8,q4", "--no-verify"])
    script = str(HERE / "stock.py")
    for name, words in {
        "stock export": ["export", str(checkpoint), str(stock / "model.onnx")],
        "stock int8": ["int8", str(stock / "model.onnx"), str(stock / "int8" / "model.onnx")],
        "stock q4": ["q4", str(stock / "model.onnx"), str(stock / "q4" / "model.onnx")],
    }.items():
        print(name, file=sys.stderr)
        build[name] = watched([options.stock, script, *words])
    graphs = {
        "stock fp32": (stock / "model.onnx", "last_hidden_state"),
        "stock int8": (stock / "int8" / "model.onnx", "last_hidden_state"),
        "stock q4": (stock / "q4" / "model.onnx", "last_hidden_state"),
        "fp32": (ours / "onnx" / "model.onnx", "sentence_embedding"),
        "int8": (ours / "onnx" / "model_int8.onnx", "sentence_embedding"),
        "q4": (ours / "onnx" / "model_q4.onnx", "sentence_embedding"),
    }
    speeds = {f"{b}x{t}": speed(options.ours, graphs, (b, t), vocabulary) for b, t in SHAPES}
    stock_seconds = sum(v["seconds"] for k, v in build.items() if k != "featherbed")
    top = speeds["8x128"]
    commit = subprocess.run(["git", "-C", str(HERE), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    result = {
        "machine": machine(),
        "commit": commit.stdout.strip(),
        "build": build,
        "speed": speeds,
        "size_bytes": {name: sum(p.stat().st_size for p in siblings(path)) for name, (path, _) in graphs.items()},
        "ratios": {
            "build_stock_over_ours": round(stock_seconds / build["featherbed"]["seconds"], 2),
            "int8_over_stock_fp32_8x128": round(top["int8"]["tokens_per_s"] / top["stock fp32"]["tokens_per_s"], 2),
            "int8_over_stock_int8_8x128": round(top["int8"]["tokens_per_s"] / top["stock int8"]["tokens_per_s"], 2),
        },
    }
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    print(json.dumps(result, indent=2))
    if not options.work:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
