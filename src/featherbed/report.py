"""A number with its yardstick: metrics, the gates they must pass, and the report that carries them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from featherbed.errors import OptionError
from featherbed.recipe import Recipe, Shelf

AT_LEAST = {"cos_mean", "cos_min", "triplet_accuracy", "triplet_margin_mean"}
AT_MOST = {"invariance_max", "anisotropy", "unit_norm_max_error", "size_bytes", "reference_max_error"}


@dataclass(frozen=True)
class Metrics:
    """What verify measures of one variant against the reference, on one probe.

    ``cos_*`` are row by row against the reference's vectors of the same texts. ``invariance_max`` is the
    largest 1 − cos between a text's vector alone and in company. ``anisotropy`` is the mean cosine of
    different texts. ``reference_max_error`` is the largest difference of a component to upstream's PyTorch
    model, None where that was not asked for. A value is NaN when any vector was not finite.
    """

    n: int
    cos_mean: float
    cos_min: float
    invariance_max: float
    triplets_correct: int
    triplets_total: int
    triplet_margin_mean: float
    anisotropy: float
    unit_norm_max_error: float
    size_bytes: int
    reference_max_error: float | None = None

    @property
    def triplet_accuracy(self) -> float:
        """Share of triplets whose positive is nearer than its negative; NaN without triplets."""
        return self.triplets_correct / self.triplets_total if self.triplets_total else math.nan

    def to_json(self) -> dict[str, int | float | None]:
        """Plain values; what is not finite becomes null. ``reference_max_error`` only where measured."""
        values = {k: _plain(v) for k, v in vars(self).items()}
        if self.reference_max_error is None:
            del values["reference_max_error"]
        return values


@dataclass(frozen=True)
class Gate:
    """A bound on a metric. Which side is good belongs to the metric, not to the gate."""

    metric: str
    bound: float

    def judge(self, variant: str, metrics: Metrics) -> Verdict:
        """Whether ``metrics`` hold; a value that is not a number fails."""
        value = float(getattr(metrics, self.metric) if getattr(metrics, self.metric) is not None else math.nan)
        passed = value >= self.bound if self.metric in AT_LEAST else value <= self.bound
        return Verdict(variant, self.metric, self.bound, value, passed)


@dataclass(frozen=True)
class Verdict:
    """A gate, applied."""

    variant: str
    metric: str
    bound: float
    value: float
    passed: bool

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {k: _plain(v) for k, v in vars(self).items()}


@dataclass(frozen=True)
class Report:
    """The outcome of verify: metrics and verdicts of every variant, on a named probe."""

    probe: dict[str, Any]  # name, version, sha256
    metrics: dict[str, Metrics]
    verdicts: tuple[Verdict, ...]

    @property
    def passed(self) -> bool:
        """Whether every gate held."""
        return all(v.passed for v in self.verdicts)

    def passed_by(self, variant: str) -> bool:
        """Whether every gate of one variant held."""
        return all(v.passed for v in self.verdicts if v.variant == variant)

    def to_json(self) -> dict[str, Any]:
        """The document that ``verify --json`` prints."""
        return {
            "passed": self.passed,
            "probe": self.probe,
            "variants": {name: m.to_json() for name, m in self.metrics.items()},
            "gates": [v.to_json() for v in self.verdicts],
        }


def default_gates(recipe: Recipe) -> tuple[Gate, ...]:
    """The gates a variant must pass when nobody says otherwise, by the bits of its linear layers."""
    worst = {32: 0.9999, 16: 0.99, 8: 0.98}.get(recipe.linear_bits, 0.93)
    worst = 0.9999 if recipe.shelf is Shelf.REFERENCE else worst
    return Gate("cos_min", worst), Gate("invariance_max", 1e-4), Gate("unit_norm_max_error", 1e-4)


def parse_gates(words: Iterable[str]) -> tuple[Gate, ...]:
    """``["cos_min=0.98", …]`` as gates.

    Raises OptionError on an unknown metric or a bound that is not a number.
    """
    gates = []
    for word in words:
        metric, _, bound = (part.strip() for part in word.partition("="))
        try:
            value = float(bound)
        except ValueError:
            value = math.nan
        if metric not in AT_LEAST | AT_MOST or not math.isfinite(value):
            raise OptionError(
                f"--gate {word!r}",
                expected=f"METRIC=NUMBER with a metric of {', '.join(sorted(AT_LEAST | AT_MOST))}",
                found="an unknown metric" if metric not in AT_LEAST | AT_MOST else f"the bound {bound!r}",
                remedy="for example --gate cos_min=0.98",
            )
        gates.append(Gate(metric, value))
    return tuple(gates)


BOUNDS_MIN, BOUNDS_MAX = ("cos_min", "cos_mean", "tokens_per_s"), ("size_mb", "rss_mb")


@dataclass(frozen=True)
class Bound:
    """What a tuned variant must hold: at least ``value`` of a metric, or at most."""

    metric: str
    value: float

    def holds(self, figures: Mapping[str, float]) -> bool:
        """Whether the figures of a trial are within; what is not a number is not."""
        found = figures["rss_mib"] * 2**20 / 1e6 if self.metric == "rss_mb" else figures[self.metric]
        return found >= self.value if self.metric in BOUNDS_MIN else found <= self.value


def parse_bounds(minimum: Iterable[str], maximum: Iterable[str]) -> tuple[Bound, ...]:
    """``["cos_min=0.98"]`` and ``["size_mb=20"]`` as bounds.

    Raises OptionError on a metric of the other side, an unknown one, or a bound that is not a number.
    """
    found = []
    for option, words, known in (("--min", minimum, BOUNDS_MIN), ("--max", maximum, BOUNDS_MAX)):
        for word in words:
            metric, _, text = (part.strip() for part in word.partition("="))
            try:
                value = float(text)
            except ValueError:
                value = math.nan
            if metric not in known or not math.isfinite(value):
                raise OptionError(
                    f"{option} {word!r}",
                    expected=f"METRIC=NUMBER with a metric of {', '.join(known)}",
                    found="another metric" if metric not in known else f"the bound {text!r}",
                    remedy=f"for example {option} {'cos_min=0.98' if option == '--min' else 'size_mb=20'}",
                )
            found.append(Bound(metric, value))
    return tuple(found)


def gates_for(recipe: Recipe, asked: tuple[Gate, ...], upstream: bool = False) -> tuple[Gate, ...]:
    """The default gates of a recipe with those ``asked`` in place of, or beside, their namesakes.

    With ``upstream`` the reference also answers to upstream's PyTorch model.
    """
    parity = (Gate("reference_max_error", 2e-5),) if upstream and recipe.shelf is Shelf.REFERENCE else ()
    chosen = {g.metric: g for g in (*default_gates(recipe), *parity, *asked)}
    return tuple(chosen.values())


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
