"""A number with its yardstick: metrics, the gates they must pass, and the report that carries them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from featherbed.errors import OptionError
from featherbed.recipe import Recipe, Shelf

AT_LEAST = {
    "cos_mean", "cos_p1", "cos_min", "pearson", "spearman", "neighbours_at_10", "triplet_accuracy",
    "triplet_margin_mean", "retrieval_top_1", "retrieval_ndcg_at_10", "retrieval_mrr_at_10",
}  # fmt: skip
AT_MOST = {
    "invariance_max", "invariance_batch", "invariance_padding", "invariance_order", "anisotropy",
    "unit_norm_max_error", "pooling_max_error", "not_finite", "size_bytes", "reference_max_error",
}  # fmt: skip
WITH = {  # metrics that are measured only with an option of verify
    "reference_max_error": "--reference",
    **dict.fromkeys(("retrieval_top_1", "retrieval_ndcg_at_10", "retrieval_mrr_at_10"), "--retrieval"),
}


@dataclass(frozen=True)
class Metrics:
    """What verify measures of one variant against the reference, on one probe.

    ``cos_*`` are row by row against the reference's vectors of the same texts, ``cos_p1`` their first percentile.
    ``pearson`` and ``spearman`` correlate the similarities of all pairs of texts with the reference's,
    ``neighbours_at_10`` is the mean share of a text's ten nearest that stay among them. ``invariance_*`` are the
    largest 1 − cos between a text's vector alone and in company. ``anisotropy`` is the mean cosine of different texts.
    ``pooling_max_error`` is the largest difference of a component between the graph's own vector and what the folder's
    pooling makes of its hidden states. ``not_finite`` counts vectors with NaN or Inf. ``reference_max_error`` is the
    largest difference of a component to upstream's PyTorch model, ``retrieval_*`` are means over a dataset's queries;
    None where that was not asked for.
    ``intervals`` are 95 % bootstrap intervals of some of these, ``percentiles`` the cosines below which so many per
    cent of the texts lie, ``worst`` the (place in the probe, cosine) of the worst texts.
    A value is NaN when any vector was not finite.
    """

    n: int
    cos_mean: float
    cos_p1: float
    cos_min: float
    pearson: float
    spearman: float
    neighbours_at_10: float
    invariance_batch: float
    invariance_padding: float
    invariance_order: float
    triplets_correct: int
    triplets_total: int
    triplet_margin_mean: float
    anisotropy: float
    unit_norm_max_error: float
    pooling_max_error: float
    not_finite: int
    size_bytes: int
    reference_max_error: float | None = None
    retrieval_top_1: float | None = None
    retrieval_ndcg_at_10: float | None = None
    retrieval_mrr_at_10: float | None = None
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    percentiles: Mapping[str, float] = field(default_factory=dict)
    worst: tuple[tuple[int, float], ...] = ()

    @property
    def invariance_max(self) -> float:
        """The largest of the three; NaN as soon as one is."""
        parts = (self.invariance_batch, self.invariance_padding, self.invariance_order)
        return math.nan if any(map(math.isnan, parts)) else max(parts)

    @property
    def triplet_accuracy(self) -> float:
        """Share of triplets whose positive is nearer than its negative; NaN without triplets."""
        return self.triplets_correct / self.triplets_total if self.triplets_total else math.nan

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is not finite becomes null. What needs an option is there only where measured."""
        values = _plain(vars(self) | {"invariance_max": self.invariance_max})
        assert isinstance(values, dict)
        return {key: value for key, value in values.items() if key not in WITH or getattr(self, key) is not None}


HINTS = {  # what a failed gate most likely means
    "not_finite": "NaN or Inf in a vector: a weight or scale that is not finite, or a sum that overflows",
    "cos_min": "a text's vector is far from the reference's: outliers that rounding crushed, or a damaged weight",
    "cos_mean": "vectors are far from the reference's: a damaged weight or scale, or too few bits",
    "invariance_batch": "a text's vector depends on its company: one activation scale for a whole batch",
    "invariance_padding": "a text's vector depends on the padding side: the last token is not found by the mask",
    "invariance_order": "a text's vector depends on its place in the batch",
    "invariance_max": "a text's vector depends on its company: one activation scale for a batch, or padding is read",
    "unit_norm_max_error": "vectors are not at length 1: the graph does not normalise, or gives zeros",
    "pooling_max_error": "the graph pools otherwise than the folder's configuration says",
    "reference_max_error": "the graph is not upstream's function: look at pooling, normalisation and tokens first",
}


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

    def __str__(self) -> str:
        """One line: what was found, the bound, and what it most likely means."""
        side = "at least" if self.metric in AT_LEAST else "at most"
        hint = f": {HINTS[self.metric]}" if self.metric in HINTS and not self.passed else ""
        return f"{self.variant} {self.metric} is {self.value:.6g}, expected {side} {self.bound:g}{hint}"

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

    def to_junit(self) -> str:
        """JUnit XML for CI: a suite a variant, a case a gate, the failed ones with what was found."""
        root = Element("testsuites", name="featherbed verify", tests=f"{len(self.verdicts)}")
        root.set("failures", f"{sum(not v.passed for v in self.verdicts)}")
        for name in self.metrics:
            judged = [v for v in self.verdicts if v.variant == name]
            failures = sum(not v.passed for v in judged)
            suite = SubElement(root, "testsuite", name=name, tests=f"{len(judged)}", failures=f"{failures}")
            for verdict in judged:
                case = SubElement(suite, "testcase", classname=f"featherbed.{name}", name=verdict.metric)
                if not verdict.passed:
                    SubElement(case, "failure", message=str(verdict))
        indent(root)
        return tostring(root, "unicode", xml_declaration=True) + "\n"


def default_gates(recipe: Recipe) -> tuple[Gate, ...]:
    """The gates a variant must pass when nobody says otherwise, by the bits of its linear layers."""
    worst = {32: 0.9999, 16: 0.999, 8: 0.98}.get(recipe.linear_bits, 0.93)
    worst = 0.9999 if recipe.shelf is Shelf.REFERENCE else worst
    return (
        Gate("not_finite", 0),
        Gate("cos_min", worst),
        Gate("invariance_max", 1e-4),
        Gate("unit_norm_max_error", 1e-4),
        Gate("pooling_max_error", 0.01),
    )


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
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
