"""The model card: README.md, written only from the manifest and the evidence."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featherbed.check.front_matter import front_matter
from featherbed.check.usage import usage
from featherbed.errors import ModelFolderError
from featherbed.folder import CARD, ModelFolder, open_folder, write_text
from featherbed.origin import Origin
from featherbed.recipe import REFERENCE
from featherbed.spec import read_json

MB = 1e6
SEARCHED, RATE = ("top_1", "ndcg_at_10", "mrr_at_10", "recall_at_100"), "chunks_per_s"


def card(folder: Path | str) -> Path:
    """Write the card of a model folder anew; returns its path. Raises ModelFolderError, OutputError."""
    opened = open_folder(Path(folder))
    write_text(opened.path / CARD, render(opened))
    opened.with_evidence({})
    return opened.path / CARD


def render(folder: ModelFolder) -> str:
    """The card's text. The same evidence gives the same bytes."""
    m = folder.manifest
    reports = {name: evidence_of(folder, name) for name in m.variants}
    parts = [
        front_matter(folder, reports),
        f"# {m.name}\n",
        f"ONNX files of a `{m.spec.family}` text-embedding model: {m.spec.dim} dimensions, up to "
        f"{m.spec.max_length} tokens, {m.spec.pooling.value} pooling, dynamic batch and sequence. "
        f"Made by featherbed {m.version}{_from(m.origin)}.\n",
        "## Variants\n",
        _variants(folder),
    ]
    if any("metrics" in r for r in reports.values()):
        parts += ["## Quality, against `fp32`\n", _quality(reports), _probe_note(reports)]
    if any("eval" in r for r in reports.values()):
        parts += ["## Retrieval and similarity\n", _found(reports)]
    if any("bench" in r for r in reports.values()):
        parts += ["## Speed and memory\n", _speed(reports), _bench_note(reports)]
    parts += ["## Use\n", usage(folder), _contract(folder), "## Files\n", _files(folder)]
    if m.history:
        parts += ["## Changes\n", _changes(folder)]
    return "\n".join(parts)


def _from(origin: Origin) -> str:
    if not origin.base_model:
        return ""
    at = f" at revision `{origin.revision[:12]}`" if origin.revision else ""
    return f" from [{origin.base_model}](https://huggingface.co/{origin.base_model}){at}"


def evidence_of(folder: ModelFolder, name: str) -> dict[str, Any]:
    """What is known of a variant; {} where nothing was measured. Raises ModelFolderError when it is of another one."""
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
            "; ".join(step_words(s) for s in v.recipe["steps"]) or "float32",
        ]
        for v in m.variants.values()
    ]
    return _table(["variant", "MB", "gates", "onnxruntime ≥", "weights"], rows)


def step_words(step: dict[str, Any]) -> str:
    """A recipe's step, in words."""
    if "layers" in step:  # of many layers, how many are rounded in which way
        ways = Counter("float32" if way is None else step_words(way) for _, way in step["layers"])
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
            lines.append((f"{line} (sha256 {p['sha256'][:12]}…)", name, described_machine(report["machine"])))
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
    here = REFERENCE in reports
    again = "Repeat it with `featherbed verify`." if here else "`fp32` is not in this folder: build it to repeat it."
    return f"{intro}{' '.join(notes)} {again}\n"


def described_machine(m: dict[str, Any]) -> str:
    """A machine of the evidence, in a line."""
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
        lines.setdefault(f"{load} run in turn, on {described_machine(b['machine'])}", []).append(f"`{name}`")
    notes = " ".join(f"{', '.join(names)}: {line}." for line, names in lines.items())
    return f"{notes} Repeat it with `featherbed bench`.\n"


def _contract(folder: ModelFolder) -> str:
    types = " and `token_type_ids`" if folder.manifest.spec.token_types else ""
    return (
        f"Inputs are `input_ids` and `attention_mask`{types}; outputs `last_hidden_state` and `sentence_embedding` "
        "(pooled, unit length). Any padding side gives the same vectors.\n"
    )


def _found(reports: dict[str, dict[str, Any]]) -> str:
    parts = []
    for dataset in dict.fromkeys(name for one in reports.values() for name in one.get("eval", {})):
        kept = {name: one["eval"][dataset] for name, one in reports.items() if dataset in one.get("eval", {})}
        rows = [
            [f"`{name}`", mode, *(_with_interval(one[mode], key, 4) for key in SEARCHED), number(one[mode][RATE], 1)]
            for name, one in kept.items()
            for mode in ("dense", "hybrid")
            if "top_1" in one.get(mode, {})
        ]
        for figures in words_alone(reports, dataset):
            rows.insert(0, ["words alone", "lexical", *(_with_interval(figures, key, 4) for key in SEARCHED), "–"])
        pairs = [[f"`{n}`", _with_interval(one["dense"], "spearman", 4)] for n, one in kept.items() if _paired(one)]
        parts.append(f"### {dataset}\n")
        if rows:
            parts.append(_table(["variant", "search", "top-1", "nDCG@10", "MRR@10", "recall@100", "chunks/s"], rows))
        if pairs:
            parts.append(_table(["variant", "Spearman of cosines with ratings"], pairs))
        parts.append(_dataset_note(kept))
    return "\n".join(parts)


def words_alone(reports: Mapping[str, Mapping[str, Any]], dataset: str) -> list[dict[str, Any]]:
    """What a lexical search found on a dataset, which is the same beside every variant: once, or not at all."""
    kept = (one.get("eval", {}).get(dataset, {}).get("lexical") for one in reports.values())
    return [figures for figures in kept if figures is not None][:1]


def _paired(one: dict[str, Any]) -> bool:
    return "spearman" in one.get("dense", {})


def _dataset_note(kept: dict[str, dict[str, Any]]) -> str:
    notes: dict[str, list[str]] = {}
    for name, one in kept.items():
        d = one["dataset"]
        counts = f"{d['pairs']} pairs" if "pairs" in d else f"{d['queries']} queries, {d['documents']} documents"
        hashes = ", ".join(f"{file} sha256 {sha[:12]}…" for file, sha in d["files_sha256"].items())
        notes.setdefault(f"{counts} ({hashes}), on {described_machine(one['machine'])}", []).append(f"`{name}`")
    said = " ".join(f"{', '.join(names)}: {line}." for line, names in notes.items())
    return f"{said} In brackets the 95 % interval. Repeat it with `featherbed eval`.\n"


def _changes(folder: ModelFolder) -> str:
    now = folder.manifest.variants
    rows = [
        [
            one.date,
            f"`{one.variant}`",
            "replaced" if one.variant in now else "removed",
            f"featherbed {one.featherbed}, {one.size_bytes / MB:.1f} MB, sha256 `{one.sha256[:12]}…`",
        ]
        for one in reversed(folder.manifest.history)
    ]
    return _table(["date", "variant", "", "it was"], rows)


def _files(folder: ModelFolder) -> str:
    m = folder.manifest
    names = [f for v in m.variants.values() for f in v.files]
    rows = [[f"`{n}`", str(m.files[n].size_bytes), f"`{m.files[n].sha256}`"] for n in names]
    return _table(["file", "bytes", "sha256"], rows)
