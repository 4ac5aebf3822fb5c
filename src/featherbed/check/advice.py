"""Which variant a machine should take, and why: from verdicts, sizes and, where there are any, figures of its kind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from featherbed.check.baseline import kind, kind_of
from featherbed.check.memory import MIB, available_mib
from featherbed.choice import PREFERENCE, choose
from featherbed.errors import ModelFolderError, OptionError
from featherbed.folder import REPORTS, Manifest
from featherbed.recipe import REFERENCE

ROOM_MIB = 150  # of a session beside its weights, and what the caller needs himself
ALIKE = 0.05  # of speed: a difference that another day turns round
# instructions that multiply and add 8-bit numbers in one go
DOTS = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")


@dataclass(frozen=True)
class Candidate:
    """A variant as it is looked at: size, the worst cosine, tokens/s on this kind of CPU (None: not measured), and
    why it is out ("" where it is not)."""

    name: str
    size_bytes: int
    cos_min: float | None
    tokens_per_s: float | None
    out: str


@dataclass(frozen=True)
class Advice:
    """The variant to take, what ``auto`` takes, and the reasons as sentences."""

    variant: str
    auto: str
    reasons: tuple[str, ...]
    candidates: tuple[Candidate, ...]


def advise(manifest: Manifest, reports: Mapping[str, Mapping[str, Any]], subject: str) -> Advice:
    """The variant for this machine. ``reports`` are those that are at hand, by variant.

    Variants that failed a gate or do not fit into free memory are out. Of the rest: the fastest, where two or more were
    measured on this kind of CPU, and among equals the one that is closest to fp32; else the first of PREFERENCE.
    Raises OptionError when none is left, ModelFolderError on a report that is none.
    """
    free = available_mib()
    said = {name: _Said(f"{REPORTS}/{name}.json of {subject}", reports.get(name, {})) for name in manifest.variants}
    found = tuple(_candidate(manifest, one, name, free) for name, one in said.items())
    left = [one for one in found if not one.out]
    if not left:
        raise OptionError(
            f"a variant of {subject} for this machine",
            expected=f"one that passed its gates and fits into {free:.0f} MiB",
            found="; ".join(f"{one.name} {one.out}" for one in found),
            remedy="free memory, or build smaller variants: int4, int4-small",
        )
    timed = [one for one in left if one.tokens_per_s is not None]
    if len(timed) > 1:
        chosen, why = _fastest(timed)
    else:
        preferred = next((one for name in PREFERENCE for one in left if one.name == name), None)
        chosen = preferred or left[0]
        order = f"the first that is sound{' of' if preferred else ', with none of'} {', '.join(PREFERENCE)}"
        measured = f"{'only one' if timed else 'none'} of them on this kind of CPU ({kind()})"
        why = f"{chosen.name} is {order}; `featherbed bench` has measured {measured}"
    return Advice(chosen.name, choose(manifest, subject), (why, *_remarks(chosen, found)), found)


@dataclass(frozen=True)
class _Said:
    """What a report says; every figure of it may be missing, or something else. Raises ModelFolderError on that."""

    file: str
    report: Mapping[str, Any]

    @property
    def speed(self) -> float | None:
        """Tokens/s, where this kind of CPU was measured."""
        if self.report.get("bench") is None:
            return None
        bench = self._table(self.report["bench"], "bench")
        if bench.get("machine") is None:
            return None
        machine = self._table(bench["machine"], "bench.machine")
        flags = machine.get("flags")
        words = isinstance(flags, list) and all(isinstance(flag, str) for flag in flags)
        if not (words and isinstance(machine.get("system"), str) and machine["system"].split()):
            raise self._odd("bench.machine", "a system and its flags", dict(machine))
        speed = self._number(bench.get("tokens_per_s"), "bench.tokens_per_s")
        return speed if kind_of(dict(machine)) == kind() else None

    @property
    def cos_min(self) -> float | None:
        """The worst cosine, where somebody verified."""
        if "metrics" not in self.report:
            return None
        metrics = self._table(self.report["metrics"], "metrics")
        return None if "cos_min" not in metrics else self._number(metrics["cos_min"], "metrics.cos_min")

    def _table(self, value: object, field: str) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise self._odd(field, "a table", value)
        return value

    def _number(self, value: object, field: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._odd(field, "a number", value)
        return float(value)

    def _odd(self, field: str, expected: str, value: object) -> ModelFolderError:
        return ModelFolderError(
            f"{field} in {self.file}", expected=expected, found=repr(value), remedy="verify or bench again with --save"
        )


def _candidate(manifest: Manifest, said: _Said, name: str, free_mib: float) -> Candidate:
    size = manifest.size_bytes(name)
    needed = size / MIB + ROOM_MIB
    out = "failed a gate" if manifest.variants[name].passed is False else ""
    if not out and needed > free_mib:
        out = f"needs about {needed:.0f} MiB"
    cosine = said.cos_min
    return Candidate(name, size, 1.0 if name == REFERENCE else cosine, said.speed, out)


def _fastest(timed: list[Candidate]) -> tuple[Candidate, str]:
    best = max(one.tokens_per_s or 0 for one in timed)
    alike = [one for one in timed if (one.tokens_per_s or 0) >= best * (1 - ALIKE)]
    chosen = max(alike, key=lambda one: (one.cos_min or 0, one.tokens_per_s or 0))
    others = [one.name for one in alike if one is not chosen]
    why = f"{chosen.name} ran at {chosen.tokens_per_s:,.0f} tokens/s on this kind of CPU"
    if others:
        return chosen, f"{why}, {', '.join(others)} not {ALIKE:.0%} faster, and it is closest to fp32 of these"
    return chosen, f"{why}, faster than any other"


def _remarks(chosen: Candidate, found: tuple[Candidate, ...]) -> tuple[str, ...]:
    said = [f"{one.name} is out: it {one.out}" for one in found if one.out]
    flags = kind().split(", ")
    if "int8" in chosen.name and chosen.tokens_per_s is None and not any(flag in flags for flag in DOTS):
        said.append("this CPU has no dot product of 8-bit numbers: measure int8 against fp32 with `featherbed bench`")
    smallest = min((one for one in found if not one.out), key=lambda one: one.size_bytes)
    if smallest is not chosen:
        said.append(f"where memory or disk is short, {smallest.name} is smallest: {smallest.size_bytes / 1e6:.0f} MB")
    return tuple(said)
