"""The card's front matter: what the Hub reads, with the measured figures as ``model-index``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from featherbed.folder import ModelFolder
from featherbed.recipe import REFERENCE

TAGS = ("onnx", "featherbed", "sentence-transformers", "transformers.js", "feature-extraction", "sentence-similarity")
KEPT = {
    "cos_mean": "mean cosine to fp32",
    "cos_min": "worst cosine to fp32",
    "spearman": "Spearman of similarities with fp32's",
}
FOUND = {"ndcg_at_10": "nDCG@10", "top_1": "top-1", "mrr_at_10": "MRR@10", "spearman": "Spearman of cosines"}


def front_matter(folder: ModelFolder, reports: Mapping[str, Mapping[str, Any]]) -> str:
    """YAML between lines of three dashes, in the order in which the Hub's own cards have it."""
    m = folder.manifest
    document: dict[str, Any] = {}
    if m.origin.license:
        document["license"] = m.origin.license
    if m.origin.languages:
        document["language"] = list(m.origin.languages)
    if m.origin.base_model:
        document |= {"base_model": m.origin.base_model, "base_model_relation": "quantized"}
    document |= {"library_name": "featherbed", "pipeline_tag": "feature-extraction"}
    quantized = ["quantized"] if set(m.variants) - {REFERENCE} else []
    document["tags"] = [*TAGS, *quantized, m.spec.family]
    results = list(_results(reports))
    if results:
        document["model-index"] = [{"name": m.name, "results": results}]
    return f"---\n{yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)}---\n"


def _results(reports: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for probe in _distinct(one["probe"] for one in reports.values() if "metrics" in one):
        metrics = [
            {"type": key, "value": one["metrics"][key], "name": f"{variant}: {words}"}
            for variant, one in reports.items()
            if one.get("probe") == probe and "metrics" in one and variant != REFERENCE
            for key, words in KEPT.items()
            if one["metrics"].get(key) is not None
        ]
        if metrics:
            name = f"{probe['name']} {probe['version']}".strip()
            yield _result("feature-extraction", "Agreement with fp32", f"probe {name}", probe["sha256"], metrics)
    for dataset in dict.fromkeys(name for one in reports.values() for name in one.get("eval", {})):
        kept = {variant: one["eval"][dataset] for variant, one in reports.items() if dataset in one.get("eval", {})}
        metrics = [
            {"type": key, "value": figures[mode][key], "name": f"{variant}, {mode}: {words}"}
            for variant, figures in kept.items()
            for mode in ("dense", "hybrid")
            if mode in figures
            for key, words in FOUND.items()
            if key in figures[mode]
        ]
        paired = any(metric["type"] == "spearman" for metric in metrics)
        task = ("sentence-similarity", "Semantic similarity") if paired else ("text-retrieval", "Retrieval")
        files = next(iter(kept.values()))["dataset"]["files_sha256"]
        yield _result(*task, dataset, next(iter(files.values())), metrics)


def _distinct(values: Iterator[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def _result(task: str, named: str, dataset: str, sha256: str, metrics: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "task": {"type": task, "name": named},
        "dataset": {"name": dataset, "type": f"sha256:{sha256[:16]}"},
        "metrics": metrics,
    }
