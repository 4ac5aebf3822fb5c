"""docs/conform.md from results/conform.json: what stands between the page's markers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tables import markdown

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "conform.md"
START, END = "<!-- conform -->", "<!-- end -->"
BAR = 0.99999
HEADS = {
    "onnxruntime": "onnxruntime",
    "sentence-transformers": "sentence-transformers",
    "fastembed": "fastembed",
    "transformers.js Node": "transformers.js, Node",
    "transformers.js Chromium": "transformers.js, Chromium",
    "onnxruntime-web Chromium": "onnxruntime-web, Chromium",
}


def shown(cosine: float) -> str:
    """Cut and not rounded up; what misses the bar is bold."""
    digits = f"{int(cosine * 1e6 + 1e-3) / 1e6:.6f}"
    return digits if cosine >= BAR else f"**{digits}**"


def tables(known: dict[str, Any]) -> str:
    """A table a model, and under it why cells have no figure or miss the bar."""
    blocks = []
    for name, rows in known["models"].items():
        notes: dict[str, int] = {}

        def cell(row: dict[str, Any], peer: str, notes: dict[str, int] = notes) -> str:
            found = row.get(peer, {})
            if "cosine" in found:
                return shown(found["cosine"])
            why = found.get("why") or row["ours"]
            first = why.splitlines()[0]
            return f"fails ({notes.setdefault(first, len(notes) + 1)})"

        lines = [[f"`{variant}`", *(cell(row, peer) for peer in HEADS)] for variant, row in rows.items()]
        blocks += [f"## {name}", markdown(["variant", *HEADS.values()], lines)]
        if notes:
            blocks.append("\n".join(f"{number}. {_plain(why)}" for why, number in notes.items()))
        if company := _company(rows):
            blocks.append(company)
    versions = ", ".join(f"{name} {version}" for name, version in sorted(known["versions"].items()))
    return "\n\n".join([*blocks, f"Versions: {versions}. {known['texts']} texts."])


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
