"""The report: one self-contained HTML page, written only from the manifest and the evidence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from featherbed.check.card import (
    MB,
    described_machine,
    evidence_of,
    number,
    render,
    scientific,
    step_words,
    words_alone,
)
from featherbed.check.plots import Box, Dot, boxes, heat, scatter
from featherbed.errors import ModelFolderError
from featherbed.folder import CARD, PAGE, REPORTS, ModelFolder, open_folder, write_text
from featherbed.probe import shipped
from featherbed.spec import read_json

TUNE = "tune.json"
SEARCHED = (("top_1", "top-1"), ("ndcg_at_10", "nDCG@10"), ("mrr_at_10", "MRR@10"), ("recall_at_100", "recall@100"))
Reports = Mapping[str, dict[str, Any]]


def report(folder: Path | str) -> Path:
    """Write the report of a model folder anew; returns its path. Raises ModelFolderError, OutputError."""
    opened = open_folder(Path(folder))
    write_text(opened.path / PAGE, page(opened))
    opened.with_evidence({})
    return opened.path / PAGE


def write_pages(folder: ModelFolder) -> ModelFolder:
    """Card and report, anew; the folder with their hashes."""
    write_text(folder.path / CARD, render(folder))
    write_text(folder.path / PAGE, page(folder))
    return folder.with_evidence({})


def page(folder: ModelFolder) -> str:
    """The page's HTML. The same evidence gives the same bytes."""
    m = folder.manifest
    reports = {name: evidence_of(folder, name) for name in m.variants}
    measured = {name: one for name, one in reports.items() if _drawable(one)}
    facts = (
        f"{m.spec.family} · {m.spec.dim} dimensions · up to {m.spec.max_length} tokens · {m.spec.pooling.value} pooling"
    )
    parts = [
        f"<header><h1>{escape(m.name)}</h1><p>{escape(facts)} · made by featherbed {escape(m.version)}</p></header>",
        _section("Variants", _variants(folder, reports)),
    ]
    if measured:
        parts.append(_section("What to choose", _fronts(folder, measured), _FRONTS))
        parts.append(_section("How near to fp32, text by text", _distributions(measured), _BOXES))
    found = _retrieval(reports)
    if found:
        parts.append(_section("Retrieval and similarity", found))
    parts += [_section(*one) for one in _harm(folder)]
    worst = "".join(_worst(measured))
    if worst:
        parts.append(
            _section("The worst texts", worst, "Where a variant is farthest from fp32. Read them: is that yours?")
        )
    parts.append(_section("Recipes and files", _recipes(folder)))
    parts.append(_section("Measured on", "".join(f"<p>{line}</p>" for line in _machines(reports))))
    body = "\n".join(parts)
    style = (Path(__file__).parent / "page.css").read_text("utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(m.name)}: featherbed report</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


_FRONTS = (
    "Higher is nearer to fp32, on the scale of nines; variants on the line are beaten by no other in both. "
    "A ring is a variant that failed a gate."
)
_BOXES = "The dot is the worst text, the box the middle half, its line the median, the short mark the 5 % below."


def _drawable(report: Mapping[str, Any]) -> bool:
    metrics = report.get("metrics", {})
    return metrics.get("cos_min") is not None and None not in metrics.get("percentiles", {"": None}).values()


def _section(title: str, inside: str, note: str = "") -> str:
    said = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{said}{inside}</section>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already."""
    text = [any('class="text"' in row[at] for row in rows) for at in range(len(head))]
    kinds = [' class="words"' if is_text else "" for is_text in text]
    top = "".join(f"<th{kind}>{escape(name)}</th>" for name, kind in zip(head, kinds, strict=True))
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _variants(folder: ModelFolder, reports: Reports) -> str:
    verdict = {True: '<span class="good">passed</span>', False: '<span class="bad">failed</span>', None: "not verified"}
    rows = []
    for name, variant in folder.manifest.variants.items():
        m, b = reports[name].get("metrics", {}), reports[name].get("bench", {})
        rows.append(
            [
                f"<b>{escape(name)}</b>",
                verdict[variant.passed],
                f"{folder.manifest.size_bytes(name) / MB:.1f}",
                number(m.get("cos_mean"), 5),
                number(m.get("cos_p1"), 4),
                number(m.get("cos_min"), 4),
                number(m.get("spearman"), 4),
                number(m.get("neighbours_at_10"), 3),
                scientific(m.get("invariance_max")),
                _whole(b.get("tokens_per_s")),
                number(b.get("latency_p50_ms"), 1),
                _whole(b.get("rss_private_mib")),
            ]
        )
    head = [
        "variant", "gates", "MB", "cosine", "1 % below", "worst", "Spearman", "neighbours", "invariance", "tokens/s",
        "one text ms", "private MiB",
    ]  # fmt: skip
    failed = [
        f"<li><b>{escape(name)}</b> {gate['metric']}: {_plain(gate['value'])}, the gate is {gate['bound']:g}</li>"
        for name, one in reports.items()
        for gate in one.get("gates", ())
        if not gate["passed"]
    ]
    return _table(head, rows) + (f'<ul class="failed">{"".join(failed)}</ul>' if failed else "")


def _whole(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"


def _plain(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.6g}"


def _fronts(folder: ModelFolder, measured: Reports) -> str:
    sizes = {name: folder.manifest.size_bytes(name) / MB for name in measured}
    drawn = [(sizes, "size, MB", False)]
    for key, across, more in (("tokens_per_s", "tokens/s", True), ("rss_private_mib", "private memory, MiB", False)):
        values = {name: one["bench"][key] for name, one in measured.items() if "bench" in one}
        if values:
            drawn.append((values, across, more))
    figures = "".join(f"<figure>{scatter(_dots(folder, measured, *one[:2]), *one[1:])}</figure>" for one in drawn)
    missing = "" if len(drawn) > 1 else '<p class="note">Speed and memory: <code>featherbed bench --save</code>.</p>'
    return f'<div class="figures">{figures}</div>{missing}'


def _dots(folder: ModelFolder, measured: Reports, values: Mapping[str, float], across: str) -> list[Dot]:
    variants = folder.manifest.variants
    return [
        Dot(
            name,
            value,
            measured[name]["metrics"]["cos_min"],
            variants[name].passed is not False,
            f"{name}: {value:.4g} {across}, worst cosine {number(measured[name]['metrics']['cos_min'], 5)}",
        )
        for name, value in values.items()
    ]


def _distributions(measured: Reports) -> str:
    rows = []
    for name, one in measured.items():
        if name == "fp32":
            continue  # it is what the others are compared with
        five, low, median, high, top = (one["metrics"]["percentiles"][f"{at}"] for at in (5, 25, 50, 75, 95))
        rows.append(Box(name, one["metrics"]["cos_min"], (five, low, median, high, top)))
    return f"<figure>{boxes(rows)}</figure>" if rows else "<p>There is only fp32.</p>"


def _retrieval(reports: Reports) -> str:
    datasets = dict.fromkeys(name for one in reports.values() for name in one.get("eval", {}))
    parts = []
    for dataset in datasets:
        rows, pairs = [], []
        for figures in words_alone(reports, dataset):
            rows.append(["<b>words</b>", "lexical", *(number(figures[key], 4) for key, _ in SEARCHED), "–"])
        for variant, one in reports.items():
            kept = one.get("eval", {}).get(dataset, {})
            for mode in ("dense", "hybrid"):
                figures = kept.get(mode)
                if figures is None:
                    continue
                if "spearman" in figures:
                    low, high = figures["intervals"]["spearman"]
                    between = f"{number(low, 4)}–{number(high, 4)}"
                    pairs.append([f"<b>{escape(variant)}</b>", number(figures["spearman"], 4), between])
                else:
                    shown = [number(figures[key], 4) for key, _ in SEARCHED]
                    rate = number(figures.get("chunks_per_s"), 1)
                    rows.append([f"<b>{escape(variant)}</b>", mode, *shown, rate])
        title = f"<h3>{escape(dataset)}</h3>"
        if rows:
            parts.append(title + _table(["variant", "search", *(t for _, t in SEARCHED), "chunks/s"], rows))
        if pairs:
            parts.append(title + _table(["variant", "Spearman", "95 %"], pairs))
    return "".join(parts)


def _harm(folder: ModelFolder) -> Iterator[tuple[str, str, str]]:
    path = folder.path / REPORTS / TUNE
    if not path.is_file():
        return
    harms = read_json(path, ModelFolderError).get("harms", {})
    drawn = [(level, heat(harms, level)) for level in ("4", "8")]
    figures = "".join(f"<figure><figcaption>{level} bits</figcaption>{svg}</figure>" for level, svg in drawn if svg)
    if figures:
        yield (
            "Harm by layer",
            figures,
            "1 − cosine of the whole embedding when this one weight is rounded, as tune measured it; darker is more, "
            "on a logarithmic scale.",
        )


def _worst(measured: Reports) -> Iterator[str]:
    known = shipped()
    for name, one in measured.items():
        if name == "fp32":
            continue
        ours = one["probe"].get("sha256") == known.sha256
        rows = []
        for place, cosine in one["metrics"].get("worst", ()):
            text = known.texts[place] if ours else f"text {place + 1} of the probe {one['probe'].get('name', '')}"
            rows.append([number(cosine, 4), f'<span class="text">{escape(text)}</span>'])
        if rows:
            table = _table(["cosine", "text"], rows)
            yield f"<details><summary>{escape(name)}: {rows[0][0]}</summary>{table}</details>"


def _recipes(folder: ModelFolder) -> str:
    m = folder.manifest
    rows = []
    for v in m.variants.values():
        steps = "; ".join(step_words(step) for step in v.recipe["steps"]) or "float32"
        files = "<br>".join(f"<code>{escape(f)}</code> {m.files[f].size_bytes:,} bytes" for f in v.files)
        hashes = "<br>".join(f"<code>{m.files[f].sha256[:16]}…</code>" for f in v.files)
        rows.append([f"<b>{escape(v.name)}</b>", f'<span class="text">{escape(steps)}</span>', files, hashes])
    return _table(["variant", "weights", "files", "sha256"], rows)


def _machines(reports: Reports) -> Iterator[str]:
    lines: dict[str, list[str]] = {}
    for name, one in reports.items():
        if "metrics" in one:
            p = one["probe"]
            said = f"quality on {p['texts']} texts and {p['triplets']} triplets of the probe {p['name']} {p['version']}"
            lines.setdefault(f"{said}, {described_machine(one['machine'])}", []).append(name)
        if "bench" in one:
            load = one["bench"]["load"]
            said = (
                f"speed and memory in batches of {load['batch']} × {load['tokens']} tokens, median of {load['rounds']}"
            )
            lines.setdefault(f"{said} rounds, {described_machine(one['bench']['machine'])}", []).append(name)
        for dataset, kept in one.get("eval", {}).items():
            lines.setdefault(f"{dataset}, {described_machine(kept['machine'])}", []).append(name)
    for line, names in lines.items():
        yield f"<b>{escape(', '.join(names))}</b>: {escape(line)}."
    if not lines:
        yield "Nothing yet: <code>featherbed verify --save</code>."
