"""Baselines: what variants reached before, a kind of CPU each, for 8-bit kernels differ from one kind to the next.

A baseline is a file for your repository: {kind: {variant: {metric: value}}}. Each value becomes a gate, with room for
what onnxruntime's versions may differ in.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from featherbed.check.machine import machine
from featherbed.errors import OptionError
from featherbed.folder import dump, write_text
from featherbed.report import Gate, Report
from featherbed.spec import read_json

ROOM = {"cos_mean": 1e-4, "cos_p1": 1e-3, "cos_min": 2e-3, "spearman": 1e-3, "neighbours_at_10": 5e-3}


def kind() -> str:
    """This machine's kind of CPU: the architecture, and the flags that decide which kernels run."""
    return kind_of(machine())


def kind_of(known: dict[str, Any]) -> str:
    """The kind of CPU of a machine as ``machine`` and reports describe it."""
    return ", ".join([known["system"].split()[-1], *known["flags"]])


def baseline_gates(path: Path, variants: Iterable[str]) -> dict[str, tuple[Gate, ...]]:
    """The gates of ``variants`` that the file has for this kind of CPU.

    Raises OptionError when there is no such file, or nothing in it for this kind or for one of them.
    """
    known = _read(path) if path.is_file() else {}
    here = known.get(kind(), {})
    missing = [name for name in variants if name not in here]
    if missing:
        found = f"{len(known)} kinds: {'; '.join(known)}" if known else "no such file" if not path.is_file() else "none"
        raise OptionError(
            f"--baseline {path}",
            expected=f"figures of {', '.join(missing)} on this kind of CPU ({kind()})",
            found="those of other variants" if here else found,
            remedy="record them once with --record, and commit the file",
        )
    return {name: tuple(Gate(metric, here[name][metric] - ROOM[metric]) for metric in here[name]) for name in variants}


def record(path: Path, report: Report) -> None:
    """Put a report's figures down for this kind of CPU; other kinds and variants stay as they are."""
    known = _read(path) if path.is_file() else {}
    here = known.setdefault(kind(), {})
    for name, metrics in report.metrics.items():
        values = metrics.to_json()
        here[name] = {metric: values[metric] for metric in ROOM if values[metric] is not None}
    write_text(path, dump({name: dict(sorted(known[name].items())) for name in sorted(known)}))


def _read(path: Path) -> dict[str, dict[str, dict[str, float]]]:
    raw: dict[str, Any] = read_json(path, OptionError)
    try:
        known = {
            str(cpu): {str(v): {str(m): float(x) for m, x in row.items()} for v, row in variants.items()}
            for cpu, variants in raw.items()
        }
        for metric in {m for variants in known.values() for row in variants.values() for m in row}:
            ROOM[metric]
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise OptionError(
            f"--baseline {path}",
            expected=f"{{kind of CPU: {{variant: {{metric: value}}}}}} with metrics of {', '.join(ROOM)}",
            found=f"{type(error).__name__}: {error}",
            remedy="record it anew with --record",
        ) from error
    return known
