"""docs/conform.md from results/conform.json: what stands between the page's markers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tables import markdown

from featherbed.recipe import RECIPES, BlockwiseLinear, DynamicLinear, PerTokenLinear
from featherbed.steps import StaticLinear, UnsignedLinear

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "conform.md"
START, END = "<!-- conform -->", "<!-- end -->"
BAR = 0.99999
LEVEL_INT8 = 4  # MatMulNBits' accuracy_level that may round activations
HEADS = {
    "onnxruntime": "onnxruntime",
    "sentence-transformers": "sentence-transformers",
    "fastembed": "fastembed",
    "transformers.js Node": "transformers.js, Node",
    "transformers.js Chromium": "transformers.js, Chromium",
    "onnxruntime-web Chromium": "onnxruntime-web, Chromium",
}


WALLS = {
    "a": "WASM's kernels add floats in another order than native ones, and this variant rounds activations to 8\n"
    "  bits: a last digit flips codes, and no kernel but the very same one gives the same vector (measured above).",
    "b": "Optimum reads `last_hidden_state`, whose last layer is computed for all tokens, where `sentence_embedding`\n"
    "  needs one: with one activation scale a tensor that is another scale.",
    "c": "WASM's `MatMulNBits` leaves activations in float where native kernels round them (level 4 allows either):\n"
    "  these are the vectors that native kernels give at level 1, and nearer to `fp32`.",
}


def rounds(variant: str) -> bool:
    """Whether a variant rounds what lies between its layers, so that a last digit can flip codes."""
    steps = RECIPES[variant.partition(",")[0]].steps
    return any(isinstance(step, (PerTokenLinear, DynamicLinear, UnsignedLinear, StaticLinear)) for step in steps)


def wall(variant: str, peer: str) -> str:
    """Why a cell misses the bar, by its letter; "" where nobody knows."""
    steps = RECIPES[variant.partition(",")[0]].steps
    if peer == "sentence-transformers" and any(isinstance(s, (DynamicLinear, UnsignedLinear)) for s in steps):
        return "b"
    if "Chromium" in peer and any(isinstance(s, BlockwiseLinear) and s.accuracy_level == LEVEL_INT8 for s in steps):
        return "c"
    return "a" if "Chromium" in peer and rounds(variant) else ""


def shown(cosine: float) -> str:
    """Cut and not rounded up; what misses the bar is bold."""
    digits = f"{int(cosine * 1e6 + 1e-3) / 1e6:.6f}"
    return digits if cosine >= BAR else f"**{digits}**"


def tables(known: dict[str, Any]) -> str:
    """A table a model, and under it why cells have no figure or miss the bar."""
    blocks = []
    for name, rows in known["models"].items():
        notes: dict[str, int] = {}
        lines = [
            [_called(variant), *(_cell(variant, row, peer, notes) for peer in HEADS)] for variant, row in rows.items()
        ]
        blocks += [f"## {name}", markdown(["variant", *HEADS.values()], lines)]
        if notes:
            blocks.append("\n".join(f"{number}. {_plain(why)}" for why, number in notes.items()))
        missing = {wall(variant, peer) for variant, row in rows.items() for peer in HEADS if _misses(row, peer)}
        if missing:
            blocks.append("\n".join(f"- ({letter}) {WALLS[letter]}" for letter in sorted(missing & WALLS.keys())))
        if table := _kept(rows):
            blocks += ["Cosine to `fp32` on the same texts, worst / mean, of what misses the bar in a browser:", table]
        if company := _company(rows):
            blocks.append(company)
    versions = ", ".join(f"{name} {version}" for name, version in sorted(known["versions"].items()))
    return "\n\n".join([*blocks, f"Versions: {versions}. {known['texts']} texts."])


def _called(variant: str) -> str:
    name, comma, more = variant.partition(",")
    return f"`{name}`{comma}{more}"


def _misses(row: dict[str, Any], peer: str) -> bool:
    return bool(row.get(peer, {}).get("cosine", 1) < BAR)


def _cell(variant: str, row: dict[str, Any], peer: str, notes: dict[str, int]) -> str:
    found = row.get(peer, {})
    if "cosine" in found:
        letter = wall(variant, peer) if _misses(row, peer) else ""
        return shown(found["cosine"]) + (f" ({letter})" if letter else "")
    first = (found.get("why") or row["ours"]).splitlines()[0]
    word = "fails" if found.get("asked", True) else "not asked"
    return f"{word} ({notes.setdefault(first, len(notes) + 1)})"


def _kept(rows: dict[str, Any]) -> str:
    """A table of what variants keep of fp32 natively and in a browser, where these differ."""
    web = "onnxruntime-web Chromium"
    lines = []
    for variant, row in rows.items():
        if _misses(row, web) and "kept" in row and "kept" in row[web]:
            lines.append([_called(variant), *(" / ".join(f"{v:.5f}" for v in r["kept"]) for r in (row, row[web]))])
    return markdown(["variant", "native", "onnxruntime-web, Chromium"], lines) if lines else ""


def _plain(why: str) -> str:
    """An error's text without paths of the machine that ran it."""
    return "`" + re.sub(r"(/[\w.@+-]+)+/", "…/", why).replace("`", "'")[:300] + "`"


def _company(rows: dict[str, Any]) -> str:
    """A sentence on variants whose vectors depend on what else is in the batch."""
    worst = {
        variant: min(found)
        for variant, row in rows.items()
        if (found := [c["cosine_at_once"] for c in row.values() if isinstance(c, dict) and "cosine_at_once" in c])
    }
    told = [f"`{variant}` {shown(value).strip('*')}" for variant, value in worst.items() if value < BAR]
    return f"All texts in one batch, worst cosine where below the bar: {', '.join(told)}." if told else ""


def write_page(known: dict[str, Any]) -> None:
    """Put the tables between the markers."""
    before, _, rest = PAGE.read_text("utf-8").partition(START)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{START}\n\n{tables(known)}\n\n{END}{after}", "utf-8")


if __name__ == "__main__":
    write_page(json.loads((HERE / "results" / "conform.json").read_text("utf-8")))
