"""Draw docs/img/main_job.svg from benchmarks/results/main_job.json. Needs matplotlib.

python benchmarks/plot.py
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
INK, OURS, STOCK = "#1f2933", "#2a7f62", "#b8c2cc"


def main() -> None:
    """Two panels: tokens a second at 8 × 128, and the seconds it takes to make the files."""
    result = json.loads((ROOT / "benchmarks" / "results" / "main_job.json").read_text("utf-8"))
    plt.rcParams.update({"font.size": 11, "font.family": "sans-serif", "svg.hashsalt": "featherbed", "text.color": INK})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), width_ratios=(1.25, 1))
    figure.patch.set_facecolor("white")

    speed = result["speed"]["8x128"]
    names = ["stock q4", "stock fp32", "q4", "fp32", "stock int8", "int8"]
    labels = {"int8": "featherbed int8", "fp32": "featherbed fp32", "q4": "featherbed q4"}
    values = [speed[n]["tokens_per_s"] for n in names]
    colours = [STOCK if n.startswith("stock") else OURS for n in names]
    bars = left.barh([labels.get(n, n) for n in names], values, color=colours)
    left.bar_label(bars, [f"{v:.0f}" for v in values], padding=4)
    left.set_title("tokens a second, batches of 8 × 128", loc="left", fontsize=11)
    left.set_xlim(0, max(values) * 1.15)

    build = result["build"]
    ours = build["featherbed"]["seconds"]
    start = 0.0
    for name, shade in (("stock export", "#9aa5b1"), ("stock int8", STOCK), ("stock q4", "#dde3e9")):
        seconds = build[name]["seconds"]
        right.barh(["stock"], [seconds], left=[start], color=shade)
        wide = seconds > 12
        if wide:
            right.text(start + seconds / 2, 0, name.removeprefix("stock "), ha="center", va="center", fontsize=10)
        start += seconds
    right.barh(["featherbed"], [ours], color=OURS)
    right.text(start, 0, f" {start:.0f} s", va="center")
    right.text(ours, 1, f" {ours:.0f} s", va="center")
    right.set_title("seconds to make fp32 + int8 + q4", loc="left", fontsize=11)
    right.set_xlim(0, start * 1.2)

    for axes in (left, right):
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.set_xticks([])
        axes.tick_params(length=0, colors=INK)
    figure.tight_layout(w_pad=3)
    (ROOT / "docs" / "img").mkdir(exist_ok=True)
    figure.savefig(ROOT / "docs" / "img" / "main_job.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
