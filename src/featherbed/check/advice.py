"""Which variant a machine should take, and why: from verdicts, sizes and, where there are any, figures of its kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from featherbed.check.baseline import kind, kind_of
from featherbed.check.memory import MIB, available_mib
from featherbed.choice import PREFERENCE, choose
from featherbed.errors import OptionError
from featherbed.folder import Manifest
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
    Raises OptionError when none is left.
    """
    free = available_mib()
    found = tuple(_candidate(manifest, reports.get(name, {}), name, free) for name in manifest.variants)
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


def _candidate(manifest: Manifest, report: Mapping[str, Any], name: str, free_mib: float) -> Candidate:
    bench = report.get("bench") or {}
    here = bench.get("machine") is not None and kind_of(bench["machine"]) == kind()
    size = manifest.size_bytes(name)
    needed = size / MIB + ROOM_MIB
    out = "failed a gate" if manifest.variants[name].passed is False else ""
    if not out and needed > free_mib:
        out = f"needs about {needed:.0f} MiB"
    cosine = 1.0 if name == REFERENCE else report.get("metrics", {}).get("cos_min")
    return Candidate(
        name,
        size,
        float(cosine) if cosine is not None else None,
        float(bench["tokens_per_s"]) if here else None,
        out,
    )


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
