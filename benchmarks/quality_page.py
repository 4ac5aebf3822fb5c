"""docs/quality.md from results/quality.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tables import markdown

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "quality.md"
START, END = "<!-- quality -->", "<!-- end -->"
SCORES = {
    "sts_spearman": "STS",
    "xquad_en_top_1": "XQuAD en top-1",
    "xquad_en_ndcg_at_10": "en nDCG@10",
    "xquad_de_top_1": "de top-1",
    "xquad_de_ndcg_at_10": "de nDCG@10",
}


def cosines(block: dict[str, Any]) -> str:
    """Mean and worst, cut and not rounded up."""
    mean, worst = int(block["mean"] * 1e5 + 1e-6) / 1e5, int(block["worst"] * 1e4 + 1e-6) / 1e4
    return f"{mean:.5f} / {worst:.4f}"


def kept(model: dict[str, Any], names: list[str]) -> str:
    """What variants keep: cosines, size, bits, seconds."""
    rows = [
        [
            f"`{name}`" if ":" not in name else name,
            cosines(v["cosine_to_fp32"]),
            cosines(v["cosine_to_fp32_sts_sentences"]),
            f"{v['size_bytes'] / 1e6:.2f}",
            f"{v['linear_bits']:.2f}",
            f"{v['build_seconds']:.0f}" if "build_seconds" in v else "",
        ]
        for name in names
        if (v := model["variants"].get(name))
    ]
    return markdown(
        ["variant", "all texts, mean / worst", "STS sentences", "MB", "bits a linear weight", "built in s"], rows
    )


def retrieval(model: dict[str, Any], names: list[str]) -> str:
    """Points of fp32, and differences to it with their intervals."""
    first = next(iter(model["variants"].values()))["scores"]
    rows = [["`fp32`", *(f"{first[key]['fp32_points']:.2f}" for key in SCORES)]]
    for name in names:
        if v := model["variants"].get(name):
            cells = [v["scores"][key] for key in SCORES]
            rows.append(
                [
                    f"`{name}`",
                    *(
                        f"{c['difference_points']:+.2f} [{c['difference_low_points']:+.2f}, "
                        f"{c['difference_high_points']:+.2f}]"
                        for c in cells
                    ),
                ]
            )
    return markdown(["variant", *SCORES.values()], rows)


def trials(model: dict[str, Any]) -> str:
    """The trials of a search, by size."""
    rows = []
    for t in sorted(model["tune"], key=lambda t: t["size_mb"]):
        levels = list(t["bits"].values())
        counts = " · ".join(str(levels.count(level)) for level in ("4", "8", "8-block", "32"))
        mark = "**tuned**" if t["winner"] else "front" if t["front"] else ""
        rows.append(
            [
                counts,
                f"{t['size_mb']:.2f}",
                f"{t['tokens_per_s']:.0f}",
                cosines({"mean": t["cos_mean"], "worst": t["cos_min"]}),
                mark,
            ]
        )
    return markdown(["weights at 4 · 8 · 8-block · 32 bits", "MB", "tokens/s", "mean / worst", ""], rows)


def _commits(variants: dict[str, Any]) -> str:
    """The commit that all variants were made at; or each, with its variants."""
    of: dict[str, list[str]] = {}
    for name, variant in variants.items():
        of.setdefault(variant["commit"][:7], []).append(f"`{name}`")
    if len(of) == 1:
        return f"commit {next(iter(of))}"
    return "commits " + "; ".join(f"{commit} ({', '.join(names)})" for commit, names in of.items())


def page(result: dict[str, Any]) -> str:
    """What stands between the page's markers."""
    parts: list[str] = []
    named = ["int8-dynamic", "int8-smooth", "int8", "int8-block", "q4", "int4", "int4-small", "tuned"]
    for name, model in result.items():
        m = model["machine"]
        texts = next(iter(model["variants"].values()))["cosine_to_fp32"]["texts"]
        parts.append(f"## {name}\n")
        parts.append(
            f"{texts:,} texts; {m['cores']} core{'s' * (m['cores'] > 1)} of {m['cpu']}, "
            f"onnxruntime {m['onnxruntime']}, {_commits(model['variants'])}.\n"
        )
        parts.append(kept(model, named) + "\n")
        steps = [n for n in model["variants"] if ":" in n]
        if steps:
            parts.append("Step by step (`int8` and `int4` above are the last rung):\n")
            parts.append(kept(model, steps) + "\n")
        parts.append("Points of `fp32`, and each variant's difference with its 95 % interval:\n")
        parts.append(retrieval(model, named) + "\n")
        if model["tune"]:
            parts.append("`featherbed tune --min cos_min=0.98`, on the shipped probe:\n")
            parts.append(trials(model) + "\n")
    return "\n".join(parts)


def write_page(result: dict[str, Any]) -> None:
    """Put the results into docs/quality.md, between its markers."""
    before, _, rest = PAGE.read_text("utf-8").partition(START)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{START}\n\n{page(result)}\n{END}{after}", "utf-8")


if __name__ == "__main__":
    write_page(json.loads((HERE / "results" / "quality.json").read_text("utf-8")))
