"""Draw docs/img/main_job.svg, and write the README's table, from benchmarks/results/main_job.json. Needs matplotlib.

python benchmarks/plot.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
INK, OURS, STOCK = "#1f2933", "#2a7f62", "#b8c2cc"


def table(result: dict[str, Any]) -> str:
    """The README's table, between its markers."""
    build, speed = result["build"], result["speed"]
    rows = [
        "| | MB | tokens/s 8×128 | 1×128 | 1×512 | private MiB | made in, unverified | peak private memory of that |"
    ]
    rows.append("|---|---:|---:|---:|---:|---:|---:|---:|")
    stock = {k: v for k, v in build.items() if k != "featherbed"}
    ours, theirs = build["featherbed"], sum(v["seconds"] for v in stock.values())
    made = {
        "int8": (ours["seconds"], ours["private_peak_mib"]),
        "stock int8": (theirs, max(v["private_peak_mib"] for v in stock.values())),
    }
    for name in ("int8", "fp32", "q4", "stock int8", "stock fp32", "stock q4"):
        figures = [f"{speed[shape][name]['tokens_per_s']:.0f}" for shape in ("8x128", "1x128", "1x512")]
        memory = f"{speed['8x128'][name]['rss_private_mib']:.0f}"
        making = ["", ""]
        if name in made:
            making = [f"{made[name][0]:.0f} s, all three", f"{made[name][1] / 1024:.2f} GiB"]
        label = f"**featherbed `{name}`**" if name == "int8" else f"featherbed `{name}`"
        label = name if name.startswith("stock") else label
        size = f"{result['size_bytes'][name] / 1e6:.0f}"
        rows.append("| " + " | ".join([label, size, *figures, memory, *making]) + " |")
    m = result["machine"]
    rows.append("")
    rows.append(
        f"{m['cores']} cores of {m['cpu']} ({', '.join(m['flags'])}), onnxruntime {m['onnxruntime']}, commit "
        f"{result['commit'][:7]}; medians of rounds in turn, private memory after batches of 8×128. "
        "Stock graphs give hidden states, ours the pooled vectors too."
    )
    return "\n".join(rows)


def quote(result: dict[str, Any]) -> None:
    """Put the table into the README."""
    path = ROOT / "README.md"
    before, _, rest = path.read_text("utf-8").partition("<!-- main_job -->\n")
    _, _, after = rest.partition("<!-- end -->")
    path.write_text(f"{before}<!-- main_job -->\n{table(result)}\n<!-- end -->{after}", "utf-8")


def main() -> None:
    """Two panels: tokens a second at 8 × 128, and the seconds it takes to make the files."""
    result = json.loads((ROOT / "benchmarks" / "results" / "main_job.json").read_text("utf-8"))
    quote(result)
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
