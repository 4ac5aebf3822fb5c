"""What the figures of one run say of each other: ratios, which a busy machine bends less than tokens a second."""

from __future__ import annotations

from typing import Any

YARDSTICKS = ("stock fp32", "stock int8", "openvino int8", "llama q8_0")
SHAPES = ("8x128", "1x16", "1x128", "1x512", "mixed")
SMALL = ("int4", "int4-small")


def tokens_per_s(results: dict[str, Any], name: str, line: str) -> float | None:
    """A contender's speed, None where it was not measured."""
    found = results.get(name, {}).get("workloads", {}).get(line)
    return float(found["tokens_per_s"]) if found else None


def ratio(results: dict[str, Any], ours: tuple[str, str], theirs: tuple[str, str]) -> float | None:
    """Speed over speed, each a contender and a workload."""
    above, below = tokens_per_s(results, *ours), tokens_per_s(results, *theirs)
    return round(above / below, 3) if above and below else None


def ratios(qwen3: dict[str, Any], minilm: dict[str, Any]) -> dict[str, Any]:
    """All of them; None where a side was not run."""
    return {
        **{
            f"int8 ÷ {peer}": {shape: ratio(qwen3, ("int8", shape), (peer, shape)) for shape in SHAPES}
            for peer in YARDSTICKS
        },
        **{
            f"{name} ÷ stock fp32": {shape: ratio(qwen3, (name, shape), ("stock fp32", shape)) for shape in SHAPES}
            for name in SMALL
        },
        "int8 ÷ wall": {"8x128": ratio(qwen3, ("int8", "8x128"), ("wall", "8x128"))},
        "int8 ÷ int8 in fixed batches": {"mixed": ratio(qwen3, ("int8", "mixed"), ("int8", "mixed fixed"))},
        **{
            f"minilm int8 ÷ {peer}": {
                shape: ratio(minilm, ("int8", shape), (peer, shape)) for shape in ("8x128", "1x16", "mixed")
            }
            for peer in ("stock fp32", "sentence-transformers", "fastembed")
        },
    }
