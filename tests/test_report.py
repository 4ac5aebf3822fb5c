"""Reports: gates parsed and judged, NaN never passes, JSON that every reader takes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any
from xml.etree.ElementTree import fromstring

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featherbed.errors import OptionError
from featherbed.recipe import RECIPES, BlockwiseLinear, Recipe, Shelf
from featherbed.report import (
    AT_LEAST,
    AT_MOST,
    HINTS,
    WITH,
    Gate,
    Metrics,
    Report,
    default_gates,
    gates_for,
    parse_gates,
)

GOOD = Metrics(
    n=10,
    cos_mean=0.999,
    cos_p1=0.995,
    cos_min=0.99,
    pearson=0.999,
    spearman=0.998,
    neighbours_at_10=0.9,
    invariance_batch=1e-7,
    invariance_padding=2e-7,
    invariance_order=0.0,
    triplets_correct=9,
    triplets_total=10,
    triplet_margin_mean=0.2,
    anisotropy=0.3,
    unit_norm_max_error=1e-7,
    pooling_max_error=1e-7,
    not_finite=0,
    size_bytes=1000,
    reference_max_error=1e-6,
    retrieval_top_1=0.8,
    retrieval_ndcg_at_10=0.9,
    retrieval_mrr_at_10=0.85,
)
KEYS = sorted(AT_LEAST | AT_MOST)


def with_value(metric: str, value: float) -> Metrics:
    if metric == "triplet_accuracy":
        return replace(GOOD, triplets_correct=round(value * 1000), triplets_total=1000)
    if metric == "invariance_max":
        return replace(GOOD, invariance_order=value)
    return replace(GOOD, **{metric: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("metric", KEYS)
def test_every_metric_of_a_gate_is_one_that_is_measured(metric: str) -> None:
    assert isinstance(getattr(GOOD, metric), (int, float))


@pytest.mark.parametrize("metric", KEYS)
def test_a_gate_knows_its_good_side(metric: str) -> None:
    gate = Gate(metric, 0.5)
    below, at, above = (gate.judge("int8", with_value(metric, value)) for value in (0.4, 0.5, 0.6))
    assert at.passed
    assert (below.passed, above.passed) == ((False, True) if metric in AT_LEAST else (True, False))
    assert (below.variant, below.metric, below.bound, below.value) == ("int8", metric, 0.5, 0.4)


@pytest.mark.parametrize("metric", [key for key in KEYS if key != "triplet_accuracy"])
@pytest.mark.parametrize("bound", [-1e30, 0.0, 0.5, 1e30])
def test_nan_fails_every_gate(metric: str, bound: float) -> None:
    verdict = Gate(metric, bound).judge("int8", with_value(metric, math.nan))
    assert not verdict.passed
    assert verdict.to_json()["value"] is None


def test_accuracy_without_triplets_is_nan_and_fails() -> None:
    none = replace(GOOD, triplets_correct=0, triplets_total=0)
    assert math.isnan(none.triplet_accuracy)
    assert not Gate("triplet_accuracy", 0.0).judge("int8", none).passed
    assert GOOD.triplet_accuracy == 0.9


def test_a_reference_that_was_not_measured_fails_its_gate() -> None:
    assert not Gate("reference_max_error", 1.0).judge("fp32", replace(GOOD, reference_max_error=None)).passed
    assert Gate("reference_max_error", 1.0).judge("fp32", GOOD).passed


@pytest.mark.parametrize(("metric", "value"), [("cos_min", -math.inf), ("invariance_max", math.inf)])
def test_an_infinite_value_on_the_bad_side_fails(metric: str, value: float) -> None:
    assert not Gate(metric, 0.5).judge("int8", with_value(metric, value)).passed


# gates as words


@pytest.mark.parametrize(
    ("word", "gate"),
    [
        ("cos_min=0.98", Gate("cos_min", 0.98)),
        (" cos_min = 0.98 ", Gate("cos_min", 0.98)),
        ("invariance_max=1e-5", Gate("invariance_max", 1e-5)),
        ("size_bytes=1000000", Gate("size_bytes", 1e6)),
        ("triplet_margin_mean=-0.1", Gate("triplet_margin_mean", -0.1)),
        ("cos_mean=1", Gate("cos_mean", 1.0)),
    ],
)
def test_a_good_gate_is_read(word: str, gate: Gate) -> None:
    assert parse_gates([word]) == (gate,)


@given(metric=st.sampled_from(KEYS), bound=st.floats(allow_nan=False, allow_infinity=False))
def test_any_finite_bound_of_any_metric_is_read_exactly(metric: str, bound: float) -> None:
    assert parse_gates([f"{metric}={bound!r}"]) == (Gate(metric, bound),)


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("cos=0.9", "an unknown metric"),
        ("=0.9", "an unknown metric"),
        ("", "an unknown metric"),
        ("0.9", "an unknown metric"),
        ("COS_MIN=0.9", "an unknown metric"),
        ("n=3", "an unknown metric"),
        ("cos_min", "the bound ''"),
        ("cos_min=", "the bound ''"),
        ("cos_min=high", "the bound 'high'"),
        ("cos_min=0,98", "the bound '0,98'"),
        ("cos_min=0.9=1", "the bound '0.9=1'"),
        ("cos_min=nan", "the bound 'nan'"),
        ("cos_min=inf", "the bound 'inf'"),
        ("invariance_max=-inf", "the bound '-inf'"),
        ("cos_min=1e999", "the bound '1e999'"),
        ("cos_min>=0.9", "an unknown metric"),
    ],
)
def test_a_bad_gate_is_refused_with_what_is_wrong_and_an_example(word: str, found: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_gates(["cos_mean=0.9", word])
    text = str(caught.value)
    assert f"found {found};" in text
    assert repr(word) in text
    assert "--gate cos_min=0.98" in text
    assert all(key in text for key in KEYS)
    assert len(text.splitlines()) == 1
    assert caught.value.exit_code == 2


def test_no_words_are_no_gates() -> None:
    assert parse_gates([]) == ()


# default gates


@pytest.mark.parametrize(
    ("name", "worst"),
    [
        ("fp32", 0.9999),
        *((name, 0.98) for name in ("int8", "int8-block", "int8-dynamic", "int8-smooth")),
        *((name, 0.93) for name in ("int4", "int4-small", "q4")),
    ],
)
def test_default_gates_follow_the_bits_of_the_linear_layers(name: str, worst: float) -> None:
    assert default_gates(RECIPES[name]) == (
        Gate("not_finite", 0),
        Gate("cos_min", worst),
        Gate("invariance_max", 1e-4),
        Gate("unit_norm_max_error", 1e-4),
        Gate("pooling_max_error", 0.01),
    )


def test_fewer_bits_than_four_keep_the_lowest_gate() -> None:
    two = Recipe("q2", "_q2", Shelf.OURS, (BlockwiseLinear(2, 32, None),), "")
    half = Recipe("fp16", "_fp16", Shelf.OURS, (BlockwiseLinear(16, 32, None),), "")
    assert default_gates(two)[1] == Gate("cos_min", 0.93)
    assert default_gates(half)[1] == Gate("cos_min", 0.999)


def test_a_gate_that_was_asked_for_takes_the_place_of_its_namesake() -> None:
    gates = gates_for(RECIPES["int8"], (Gate("cos_min", 0.5), Gate("anisotropy", 0.9), Gate("cos_min", 0.6)))
    assert {gate.metric: gate.bound for gate in gates} == {
        "not_finite": 0,
        "cos_min": 0.6,
        "invariance_max": 1e-4,
        "unit_norm_max_error": 1e-4,
        "pooling_max_error": 0.01,
        "anisotropy": 0.9,
    }
    assert len(gates) == 6
    assert gates_for(RECIPES["int8"], ()) == default_gates(RECIPES["int8"])


# the report


def judged(*values: tuple[str, float]) -> Report:
    metrics = {name: replace(GOOD, cos_min=value) for name, value in values}
    verdicts = tuple(Gate("cos_min", 0.98).judge(name, metrics[name]) for name, _ in values)
    return Report({"name": "p", "version": "1", "sha256": "0"}, metrics, verdicts)


def test_a_report_passes_when_every_verdict_does() -> None:
    report = judged(("int8", 0.99), ("q4", 0.95))
    assert not report.passed
    assert report.passed_by("int8")
    assert not report.passed_by("q4")
    assert judged(("int8", 0.99), ("q4", 0.98)).passed


def plain(text: str) -> Any:
    """JSON as strict readers read it: NaN and Infinity are refused."""

    def no(word: str) -> Any:
        raise AssertionError(f"{word} in JSON")

    return json.loads(text, parse_constant=no)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null_in_json(value: float) -> None:
    report = judged(("int8", value))
    found = plain(json.dumps(report.to_json(), allow_nan=False))
    assert found["variants"]["int8"]["cos_min"] is None
    assert found["gates"][0]["value"] is None
    assert found["gates"][0]["bound"] == 0.98


def test_json_has_every_metric_and_those_of_an_option_only_where_they_were_measured() -> None:
    with_reference = GOOD.to_json()
    assert with_reference == {**vars(GOOD), "worst": [], "invariance_max": GOOD.invariance_max}
    without = replace(GOOD, **dict.fromkeys(WITH)).to_json()  # type: ignore[arg-type]
    assert with_reference.keys() - without.keys() == WITH.keys()


def test_a_reports_json_carries_its_probe_and_its_verdicts() -> None:
    found = judged(("int8", 0.99), ("q4", 0.5)).to_json()
    assert found["passed"] is False
    assert found["probe"]["name"] == "p"
    assert list(found["variants"]) == ["int8", "q4"]
    assert found["gates"][1] == {
        "variant": "q4",
        "metric": "cos_min",
        "bound": 0.98,
        "value": 0.5,
        "passed": False,
    }


def test_intervals_percentiles_and_the_worst_are_plain_values() -> None:
    found = replace(
        GOOD, intervals={"cos_mean": (0.9, math.nan)}, percentiles={"1": 0.8}, worst=((3, 0.5), (9, math.nan))
    ).to_json()
    assert found["intervals"] == {"cos_mean": [0.9, None]}
    assert found["percentiles"] == {"1": 0.8}
    assert found["worst"] == [[3, 0.5], [9, None]]


@pytest.mark.parametrize("part", ["invariance_batch", "invariance_padding", "invariance_order"])
def test_invariance_is_the_worst_of_its_parts(part: str) -> None:
    assert replace(GOOD, **{part: 0.25}).invariance_max == 0.25  # type: ignore[arg-type]
    assert math.isnan(replace(GOOD, **{part: math.nan}).invariance_max)  # type: ignore[arg-type]


@pytest.mark.parametrize("metric", sorted(HINTS))
def test_a_failed_gate_says_what_it_most_likely_means(metric: str) -> None:
    bad = with_value(metric, math.nan)
    verdict = Gate(metric, 0.5).judge("int8", bad)
    assert str(verdict).startswith(f"int8 {metric} is nan, expected at ")
    assert str(verdict).endswith(HINTS[metric])
    assert HINTS[metric] not in str(Gate(metric, 1e30 if metric in AT_MOST else -1e30).judge("int8", GOOD))


def test_junit_has_a_suite_a_variant_and_a_case_a_gate() -> None:
    report = judged(("int8", 0.99), ("q4 & <small>", 0.5))
    root = fromstring(report.to_junit())
    assert (root.tag, root.get("tests"), root.get("failures")) == ("testsuites", "2", "1")
    good, bad = root.findall("testsuite")
    assert (good.get("name"), good.get("failures")) == ("int8", "0")
    assert (bad.get("name"), bad.get("failures")) == ("q4 & <small>", "1")
    (case,) = bad.findall("testcase")
    assert (case.get("classname"), case.get("name")) == ("featherbed.q4 & <small>", "cos_min")
    failure = case.find("failure")
    assert failure is not None
    assert failure.get("message") == str(report.verdicts[1])
