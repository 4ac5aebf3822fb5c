"""Put benchmarks/results/*.json into the README and docs/speed.md, and draw docs/img/engine.svg. Needs matplotlib.

python benchmarks/plot.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
from tables import QWEN3, README, VARIANTS, cost, page, ran, short

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
INK, OURS, THEIRS = "#1f2933", "#2a7f62", "#b8c2cc"
SHAPE = "8x128"


def quote(path: Path, marker: str, text: str) -> None:
    """Put ``text`` between a page's markers."""
    start, end = f"<!-- {marker} -->\n", "<!-- end -->"
    before, _, rest = path.read_text("utf-8").partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{path}: expected {start.strip()} … {end}, found none")
    path.write_text(f"{before}{start}{text}\n{end}{after}", "utf-8")


def draw(engine: dict[str, Any], out: Path) -> None:
    """Two panels: tokens a second with the wall, and memory, private and file-backed."""
    found = ran(engine[QWEN3])
    names = [name for name in reversed(README) if name in found and SHAPE in found[name]["workloads"]]
    labels = [f"featherbed {name}" if name in VARIANTS else name for name in names]
    colours = [OURS if name in VARIANTS else THEIRS for name in names]
    plt.rcParams.update({"font.size": 11, "font.family": "sans-serif", "svg.hashsalt": "featherbed", "text.color": INK})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 0.42 * len(names) + 1), sharey=True, width_ratios=(1.2, 1))
    figure.patch.set_facecolor("white")

    speed = [found[name]["workloads"][SHAPE]["tokens_per_s"] for name in names]
    left.bar_label(left.barh(labels, speed, color=colours), [f"{v:.0f}" for v in speed], padding=4)
    wall = engine["wall"]["tokens_per_s"]
    if wall:
        left.axvline(wall, color=INK, linewidth=1, linestyle="--")
        left.text(wall, -0.4, "INT8 products alone ", ha="right", va="center", fontsize=9)
    left.set_title("tokens a second, batches of 8 × 128", loc="left", fontsize=11)
    left.set_xlim(0, max([*speed, wall or 0]) * 1.15)

    private = [found[name]["rss_private_mib"] for name in names]
    mapped = [found[name]["rss_mib"] - found[name]["rss_private_mib"] for name in names]
    right.barh(labels, private, color=colours)
    bars = right.barh(labels, mapped, left=private, color=colours, alpha=0.4)
    right.bar_label(bars, [f"{p:.0f} + {m:.0f}" for p, m in zip(private, mapped, strict=True)], padding=4)
    right.set_title("memory in MiB: private + mapped from a file", loc="left", fontsize=11)
    right.set_xlim(0, max(p + m for p, m in zip(private, mapped, strict=True)) * 1.35)

    for axes in (left, right):
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.set_xticks([])
        axes.tick_params(length=0, colors=INK)
    figure.tight_layout(w_pad=2)
    out.parent.mkdir(exist_ok=True)
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    """Pages and picture."""
    results = ROOT / "benchmarks" / "results"
    engine = json.loads((results / "engine.json").read_text("utf-8"))
    job = json.loads((results / "main_job.json").read_text("utf-8"))
    quote(ROOT / "README.md", "engine", short(engine))
    quote(ROOT / "README.md", "main_job", cost(job))
    quote(ROOT / "docs" / "speed.md", "engine", page(engine))
    draw(engine, ROOT / "docs" / "img" / "engine.svg")


if __name__ == "__main__":
    main()
