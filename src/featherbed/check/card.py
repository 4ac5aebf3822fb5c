"""The model card: README.md, written only from the manifest and the evidence."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from featherbed.errors import ModelFolderError
from featherbed.folder import CARD, ModelFolder, open_folder, write_text
from featherbed.spec import read_json

MB = 1e6


def card(folder: Path | str) -> Path:
    """Write the card of a model folder anew; returns its path. Raises ModelFolderError, OutputError."""
    opened = open_folder(Path(folder))
    write_text(opened.path / CARD, render(opened))
    opened.with_evidence({})
    return opened.path / CARD


def render(folder: ModelFolder) -> str:
    """The card's text. The same evidence gives the same bytes."""
    m = folder.manifest
    reports = {name: _report(folder, name) for name in m.variants}
    parts = [
        _front_matter(),
        f"# {m.name}\n",
        f"ONNX files of a `{m.spec.family}` text-embedding model: {m.spec.dim} dimensions, up to "
        f"{m.spec.max_length} tokens, {m.spec.pooling.value} pooling, dynamic batch and sequence. "
        f"Made by featherbed {m.version}.\n",
        "## Variants\n",
        _variants(folder),
    ]
    if any("metrics" in r for r in reports.values()):
        parts += ["## Quality, against `fp32`\n", _quality(reports), _probe_note(reports)]
    if any("bench" in r for r in reports.values()):
        parts += ["## Speed and memory\n", _speed(reports), _bench_note(reports)]
    parts += ["## Use\n", _usage(folder), "## Files\n", _files(folder)]
    return "\n".join(parts)


def _report(folder: ModelFolder, name: str) -> dict[str, Any]:
    path = folder.report_path(name)
    if not path.is_file():
        return {}
    report = read_json(path, ModelFolderError)
    if report.get("variant") != name:
        raise ModelFolderError(
            f"{path}",
            expected=f"evidence of {name}",
            found=repr(report.get("variant")),
            remedy="verify again with --save",
        )
    return report


def _front_matter() -> str:
    tags = ["onnx", "featherbed", "sentence-transformers", "feature-extraction", "quantized"]
    lines = ["---", "library_name: featherbed", "pipeline_tag: feature-extraction", "tags:"]
    return "\n".join([*lines, *(f"- {tag}" for tag in tags), "---", ""])


def _table(head: list[str], rows: list[list[str]]) -> str:
    words = [any(row[at].strip("`*")[:1].isalpha() for row in rows) for at in range(len(head))]
    lines = [head, ["---" if word else "---:" for word in words], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _variants(folder: ModelFolder) -> str:
    m = folder.manifest
    verdict = {True: "passed", False: "**failed**", None: "not verified"}
    rows = [
        [
            f"`{v.name}`",
            f"{m.size_bytes(v.name) / MB:.1f}",
            verdict[v.passed],
            f"{v.least_onnxruntime}",
            "; ".join(_step(s) for s in v.recipe["steps"]) or "float32",
        ]
        for v in m.variants.values()
    ]
    return _table(["variant", "MB", "gates", "onnxruntime ≥", "weights"], rows)


def _step(step: dict[str, Any]) -> str:
    if "layers" in step:  # of many layers, how many are rounded in which way
        ways = Counter("float32" if way is None else _step(way) for _, way in step["layers"])
        return "; ".join(f"{count} × {way}" for way, count in ways.most_common())
    values = ", ".join(f"{k} {v}" for k, v in step.items() if k != "step" and v is not None)
    return f"{step['step']} ({values})" if values else str(step["step"])


def _quality(reports: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, report in reports.items():
        if "metrics" not in report:
            continue
        m = report["metrics"]
        rows.append(
            [
                f"`{name}`",
                _with_interval(m, "cos_mean", 5),
                number(m.get("cos_p1"), 4),
                number(m["cos_min"], 4),
                number(m.get("spearman"), 4),
                _with_interval(m, "neighbours_at_10", 3),
                scientific(m["invariance_max"]),
                f"{m['triplets_correct']} / {m['triplets_total']}",
                number(m["triplet_margin_mean"], 3),
                number(m["anisotropy"], 3),
            ]
        )
    head = [
        "variant", "cosine mean", "1 % below", "worst", "Spearman", "neighbours kept", "batch invariance", "triplets",
        "margin", "anisotropy",
    ]  # fmt: skip
    return _table(head, rows)


def _with_interval(metrics: dict[str, Any], name: str, digits: int) -> str:
    """A figure, and between which it would lie with other texts; a dash where evidence is older than the metric."""
    low, high = metrics.get("intervals", {}).get(name, (None, None))
    between = "" if low is None else f" ({number(low, digits)}–{number(high, digits)})"
    return number(metrics.get(name), digits) + between


def number(value: float | None, digits: int) -> str:
    """0.98712 → "0.9871"; cut, not rounded up, so that no cosine below 1 reads as 1. None is a dash.

    A millionth of the last digit is float64's own dust, and forgiven.
    """
    if value is None:
        return "–"
    scale = 10**digits
    return f"{math.floor(abs(value) * scale + 1e-6) / scale * (-1 if value < 0 else 1):.{digits}f}"


def scientific(value: float | None) -> str:
    """Small errors: two digits and a power of ten."""
    return "–" if value is None else f"{value:.1e}" if value else "0"


def _probe_note(reports: dict[str, dict[str, Any]]) -> str:
    lines = []
    for name, report in reports.items():
        if "metrics" in report:
            p = report["probe"]
            line = f"{p['texts']} texts and {p['triplets']} triplets of the probe `{p['name']}` {p['version']}"
            lines.append((f"{line} (sha256 {p['sha256'][:12]}…)", name, _machine(report["machine"])))
    notes = []
    for line, machine in dict.fromkeys((note[0], note[2]) for note in lines):
        names = ", ".join(f"`{n}`" for text, n, where in lines if (text, where) == (line, machine))
        notes.append(f"{names}: {line}, on {machine}.")
    intro = (
        "Cosines are row by row against the `fp32` file, in brackets the 95 % interval; Spearman is the rank "
        "correlation of the similarities of all pairs of texts with those of `fp32`, and neighbours kept the share of "
        "a text's ten nearest that stay; batch invariance is the largest 1 − cosine between a text's vector alone and "
        "in a batch of 64 mixed lengths, padded right, padded left, and shuffled. "
    )
    for name, report in reports.items():
        error = report.get("metrics", {}).get("reference_max_error")
        if error is not None:
            notes.append(f"`{name}` differs from upstream's PyTorch model by at most {scientific(error)} a component.")
    return intro + " ".join(notes) + " Repeat it with `featherbed verify`.\n"


def _machine(m: dict[str, Any]) -> str:
    flags = f" ({', '.join(m['flags'])})" if m["flags"] else ""
    return f"{m['cpu']}{flags}, {m['cores']} cores, {m['system']}, onnxruntime {m['onnxruntime']}"


def _speed(reports: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, report in reports.items():
        if "bench" not in report:
            continue
        b = report["bench"]
        rows.append(
            [
                f"`{name}`",
                f"{b['tokens_per_s']:.0f}",
                f"{b['latency_p50_ms']:.1f}",
                f"{b['latency_p95_ms']:.1f}",
                f"{b['load_s']:.2f}",
                f"{b['rss_mib']:.0f}",
                f"{b['rss_private_mib']:.0f}",
            ]
        )
    head = ["variant", "tokens/s", "one text p50 ms", "p95 ms", "load s", "memory MiB", "of it private MiB"]
    return _table(head, rows)


def _bench_note(reports: dict[str, dict[str, Any]]) -> str:
    benches = {name: r["bench"] for name, r in reports.items() if "bench" in r}
    lines: dict[str, list[str]] = {}
    for name, b in benches.items():
        load = f"batches of {b['load']['batch']} × {b['load']['tokens']} tokens, median of {b['load']['rounds']} rounds"
        lines.setdefault(f"{load} run in turn, on {_machine(b['machine'])}", []).append(f"`{name}`")
    notes = " ".join(f"{', '.join(names)}: {line}." for line, names in lines.items())
    return f"{notes} Repeat it with `featherbed bench`.\n"


def _usage(folder: ModelFolder) -> str:
    names = list(folder.manifest.variants)
    variant = "int8" if "int8" in names else names[-1]
    return f"""```python
from featherbed import Embedder

model = Embedder("PATH/TO/THIS/FOLDER", variant="{variant}")
queries = model.encode_query(["how do I rotate a matrix?"])
documents = model.encode_document(["numpy.rot90 turns an array by 90 degrees."])
print(model.similarity(queries, documents))
```

Inputs are `input_ids` and `attention_mask`{" and `token_type_ids`" if folder.manifest.spec.token_types else ""}; \
outputs `last_hidden_state` and `sentence_embedding` (pooled, unit length). Any padding side gives the same vectors.
"""


def _files(folder: ModelFolder) -> str:
    m = folder.manifest
    names = [f for v in m.variants.values() for f in v.files]
    rows = [[f"`{n}`", str(m.files[n].size_bytes), f"`{m.files[n].sha256}`"] for n in names]
    return _table(["file", "bytes", "sha256"], rows)
