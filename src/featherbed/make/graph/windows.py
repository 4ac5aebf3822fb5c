"""What modernbert and gemma3_text share: layers that see the whole text, and layers that see a window of it.

    full_attention      every token sees every token
    sliding_attention   a token sees those at most ``reach`` positions before or behind it

Each kind has a rotary base of its own. onnxruntime's attention has a window for causal attention only, so here
the window is a bias on the scores, computed once a run from the positions: [1, 1, T, T], 4 · T² bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from featherbed.errors import SpecError, UnknownArchitectureError
from featherbed.make.graph.blocks import FLOAT, Aligned, Blocks
from featherbed.make.ir import constant
from featherbed.spec import number

FULL, SLIDING = "full_attention", "sliding_attention"
UNSEEN = -3e4  # added to a score: next to any other it is 0 after the softmax, and float16 can hold it


@dataclass(frozen=True)
class Base:
    """Where config.json has the rotary base of one kind of layer, and what it is where it says nothing."""

    key: str
    default: float


@dataclass(frozen=True)
class Sight:
    """What one kind of layers hands to attention: cos and sin [T, size / 2], and the bias, "" for none."""

    rotary: tuple[str, str]
    bias: str


def refused(subject: str, expected: str, found: str) -> UnknownArchitectureError:
    """The error of a setting that is not built."""
    remedy = "open an issue that names the model"
    return UnknownArchitectureError(subject, expected=expected, found=found, remedy=remedy)


def layer_types(config: dict[str, Any], silent: tuple[str, ...]) -> tuple[str, ...]:
    """The kind of each layer; ``silent`` is what config.json means without the key ``layer_types``.

    Raises UnknownArchitectureError on another kind, SpecError when there are more or fewer than layers.
    """
    said = config.get("layer_types")
    if said is None:
        return silent
    if not isinstance(said, list) or len(said) != len(silent):
        raise SpecError(
            "config.json, key 'layer_types'",
            expected=f"the kind of each of {len(silent)} layers",
            found=f"{len(said)} of them" if isinstance(said, list) else repr(said),
            remedy="use the config.json that belongs to the weights",
        )
    others = [repr(kind) for kind in said if kind not in (FULL, SLIDING)]
    if others:
        raise refused("layer_types in config.json", f"{FULL} or {SLIDING}", others[0])
    return tuple(said)


def rotary_bases(config: dict[str, Any], bases: Mapping[str, Base]) -> dict[str, float]:
    """The rotary base of each kind of layer.

    transformers 5 writes them under rope_parameters, by kind; 4 at the top, under keys of the family. Raises
    UnknownArchitectureError on frequencies that are scaled, or not of all numbers of a head.
    """
    nested = config.get("rope_parameters") or {}
    flat = sorted(set(nested) - set(bases))
    if flat:
        raise refused("rope_parameters in config.json", f"entries for {' and '.join(bases)}", ", ".join(flat))
    found = {}
    for kind, base in bases.items():
        said = nested.get(kind) or {}
        scaling = config.get("rope_scaling") or {}
        for where in (said, scaling):
            name = where.get("rope_type", where.get("type", "default"))
            if name != "default":
                raise refused(f"rotary frequencies of {kind} in config.json", "rope_type default", repr(name))
        part = said.get("partial_rotary_factor", config.get("partial_rotary_factor", 1))
        if part not in (None, 1):
            raise refused("partial_rotary_factor in config.json", "1", repr(part))
        of_kind = "rope_theta" in said
        found[kind] = number(said, "rope_theta", 1.0) if of_kind else number(config, base.key, base.default)
    return found


def sights(
    blocks: Blocks, aligned: Aligned, size: int, bases: Mapping[str, float], reach: int, kinds: tuple[str, ...]
) -> dict[str, Sight]:
    """What each kind among ``kinds`` hands to attention, heads of ``size``."""
    b = blocks
    column = b.node("Unsqueeze", aligned.positions, b.const([1]))  # [T, 1]
    numbers = b.cast(column, FLOAT)
    found = {}
    for kind in dict.fromkeys(kinds):
        frequencies = 1.0 / bases[kind] ** (np.arange(0, size, 2, dtype=np.float32) / size)
        # not the name by which run/derive.py knows a decoder: what is seen from both sides cannot be kept
        row = b.weight(constant(f"rotary.{kind}", frequencies[None, :], np.float32))
        angles = b.node("Mul", numbers, row)
        bias = _window(b, aligned, column, reach) if kind == SLIDING else ""
        found[kind] = Sight((b.node("Cos", angles), b.node("Sin", angles)), bias)
    return found


def _window(b: Blocks, aligned: Aligned, column: str, reach: int) -> str:
    """[1, 1, T, T]: 0 where two positions are at most ``reach`` apart, UNSEEN elsewhere."""
    line = b.node("Unsqueeze", aligned.positions, b.const([0]))  # [1, T]
    ahead = b.node("Less", b.node("Add", column, b.const(reach)), line)
    behind = b.node("Less", b.node("Add", line, b.const(reach)), column)
    far = b.node("Or", ahead, behind)
    bias = b.node("Where", far, b.const(UNSEEN, np.float32), b.const(0, np.float32))
    return b.node("Unsqueeze", bias, b.const([0, 1]))
