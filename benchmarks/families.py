"""Every family at its published shape, with random weights: as upstream, whatever the company, and what building takes.

    python benchmarks/families.py --torch PYTHON [--work FOLDER]

--torch is a Python with featherbed[reference]. Writes benchmarks/results/families.json
and the table of docs/families.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from processes import HERE, FailedError, commit, watched
from tables import markdown

from featherbed.check.machine import machine
from featherbed.probe import SHIPPED

FIXTURES = HERE.parent / "tests" / "fixtures"
PAGE = HERE.parent / "docs" / "families.md"
EVERY = 24
LIKE = {  # family → the fixture whose tokenizer and files it takes, the model whose shape it has
    "bert": ("bert-mean", "bge-base"),
    "xlm-roberta": ("xlm-roberta", "multilingual-e5-base"),
    "mpnet": ("mpnet", "all-mpnet-base-v2"),
    "nomic_bert": ("nomic_bert", "nomic-embed-text-v1.5"),
    "modernbert": ("modernbert", "gte-modernbert-base"),
    "gemma3_text": ("gemma3", "embeddinggemma-300m"),
    "qwen2": ("qwen2", "0.5B decoder"),
    "qwen3": ("qwen3-tied", "Qwen3-Embedding-0.6B"),
}


def measured(family: str, ours: Path, torch: Path, work: Path) -> dict[str, Any]:
    """One family: built in a process that is watched, then held against PyTorch. Raises FailedError."""
    like, shape = LIKE[family]
    source, out, answer = work / family, work / f"{family}-onnx", work / "answer.json"
    for folder in (source, out):
        shutil.rmtree(folder, ignore_errors=True)
    watched([str(torch), str(HERE / "random_checkpoint.py"), family, str(FIXTURES / like), str(source)])
    verb = [str(ours), "-m", "featherbed.cli", "build", str(source), "-o", str(out), "--no-verify"]
    cost = watched([*verb, "--variants", "fp32"])
    few = work / "probe.jsonl"  # of large models, with weights that mean nothing, some texts say as much as all
    few.write_text("\n".join(SHIPPED.read_text("utf-8").splitlines()[::EVERY]), "utf-8")
    verb = [str(torch), "-m", "featherbed.cli", "verify", str(out), "--reference", str(source), "--json"]
    verb += ["--probe", str(few)]
    watched(verb, answer)
    metrics = json.loads(answer.read_text("utf-8").splitlines()[-1])["variants"]["fp32"]
    weights_bytes = (source / "model.safetensors").stat().st_size
    for folder in (source, out):
        shutil.rmtree(folder)
    return {
        "shape": shape,
        "weights_bytes": weights_bytes,
        "parity": metrics["reference_max_error"],
        "invariance": max(metrics[f"invariance_{how}"] for how in ("batch", "padding", "order")),
        "build": cost,
    }


def page(result: dict[str, Any]) -> str:
    """The table."""
    rows = [
        [
            f"`{family}`",
            one["shape"],
            f"{one['weights_bytes'] / 1e6:.0f}",
            f"{one['parity']:.1e}",
            f"{one['invariance']:.1e}",
            f"{one['build']['seconds']:.1f}",
            f"{one['build']['rss_peak_mib']:.0f}",
            f"{one['build']['private_peak_mib']:.0f}",
        ]
        for family, one in result["families"].items()
    ]
    head = ["family", "shape of", "MB", "parity", "invariance", "build s", "peak RSS MiB", "private MiB"]
    return markdown(head, rows)


def main() -> None:
    """Every family, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", type=Path, default=sys.executable, help="a Python with featherbed")
    parser.add_argument("--torch", type=Path, required=True, help="a Python with featherbed[reference]")
    parser.add_argument("--work", type=Path, help="where 6 GB fit; kept when given")
    parser.add_argument("--families", default=",".join(LIKE))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "families.json")
    options = parser.parse_args()
    work = (options.work or Path(tempfile.mkdtemp(prefix="featherbed-families-"))).absolute()
    work.mkdir(parents=True, exist_ok=True)
    kept = json.loads(options.out.read_text("utf-8")) if options.out.is_file() else {}
    found: dict[str, Any] = dict(kept.get("families", {}))
    for family in options.families.split(","):
        print(family, file=sys.stderr)
        try:
            found[family] = measured(family, options.ours.absolute(), options.torch.absolute(), work)
        except FailedError as error:
            sys.exit(f"{family} failed: {error}")
        result = {"machine": machine(), "commit": commit(), "families": {f: found[f] for f in LIKE if f in found}}
        options.out.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    before, _, rest = PAGE.read_text("utf-8").partition("<!-- families -->\n")
    after = rest.partition("<!-- end -->")[2]
    PAGE.write_text(f"{before}<!-- families -->\n{page(result)}\n<!-- end -->{after}", "utf-8")
    print(page(result))
    if not options.work:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
