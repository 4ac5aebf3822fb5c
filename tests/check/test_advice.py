"""Which variant a machine should take: verdicts and memory first, then speed where it was measured, then a list."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from featherbed.check import advice as room
from featherbed.check.advice import Advice, advise
from featherbed.check.baseline import kind_of
from featherbed.errors import ModelFolderError, OptionError
from featherbed.folder import FileRecord, Manifest, Variant, open_folder

EVIDENCE = Path(__file__).parent.parent / "browser" / "evidence"
MIB = 2**20
HERE = {"system": "Linux x86_64", "flags": ["avx2", "avx512_vnni"]}
ELSEWHERE = [
    {"system": "Linux x86_64", "flags": ["avx2"]},
    {"system": "Linux x86_64", "flags": ["avx2", "avx512_vnni", "amx_int8"]},
    {"system": "Linux aarch64", "flags": ["avx2", "avx512_vnni"]},
]
ALL = {"fp32": 400, "int8": 110, "int8-block": 120, "int4": 70}  # MiB


@pytest.fixture(autouse=True)
def this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of a known kind, with much memory."""
    monkeypatch.setattr(room, "available_mib", lambda: 8000.0)
    monkeypatch.setattr(room, "kind", lambda: kind_of(HERE))


def manifest_of(sizes_mib: Mapping[str, float], **passed: bool | None) -> Manifest:
    """A manifest of variants of these sizes that passed their gates; int8_block=False says otherwise."""
    verdicts = {name.replace("_", "-"): verdict for name, verdict in passed.items()}
    assert verdicts.keys() <= sizes_mib.keys()
    variants = {name: Variant(name, {}, (f"{name}.onnx",), "1.30", verdicts.get(name, True)) for name in sizes_mib}
    files = {f"{name}.onnx": FileRecord("", int(size * MIB)) for name, size in sizes_mib.items()}
    return replace(open_folder(EVIDENCE).manifest, variants=variants, files=files)


def report(speed: float | None = None, cos_min: float | None = None, of: Any = HERE) -> dict[str, Any]:
    found: dict[str, Any] = {} if cos_min is None else {"metrics": {"cos_min": cos_min}}
    return found if speed is None else {**found, "bench": {"machine": of, "tokens_per_s": speed}}


def out_of(advice: Advice) -> dict[str, str]:
    return {one.name: one.out for one in advice.candidates if one.out}


def test_without_figures_the_first_of_the_preferred_is_taken() -> None:
    for sizes, expected in (
        (ALL, "int8"),
        ({"int4": 70, "fp32": 400, "int8-block": 120}, "int8-block"),
        ({"int4": 70, "fp32": 400}, "fp32"),
        ({"int4": 70}, "int4"),
        ({"q4": 80, "int4": 70}, "q4"),
    ):
        advice = advise(manifest_of(sizes), {}, "m")
        assert (advice.variant, advice.auto) == (expected, expected)
        assert [one.name for one in advice.candidates] == list(sizes)
    assert (
        "`featherbed bench` has measured none of them on this kind of CPU (x86_64, avx2, avx512_vnni)"
        in (advise(manifest_of(ALL), {}, "m").reasons[0])
    )


def test_candidates_carry_what_is_known() -> None:
    reports = {"fp32": report(500.0, 1.0), "int8": report(cos_min=0.9987), "int4": report(700.0)}
    found = advise(manifest_of(ALL), reports, "m").candidates
    assert [(one.name, one.size_bytes // MIB, one.cos_min, one.tokens_per_s, one.out) for one in found] == [
        ("fp32", 400, 1.0, 500.0, ""),
        ("int8", 110, 0.9987, None, ""),
        ("int8-block", 120, None, None, ""),
        ("int4", 70, None, 700.0, ""),
    ]


def test_what_failed_a_gate_is_out_however_fast_it_is() -> None:
    reports = {"int8": report(5000, 0.99), "int8-block": report(1000, 0.99), "fp32": report(500, 1.0)}
    advice = advise(manifest_of(ALL, int8=False), reports, "m")
    assert (advice.variant, advice.auto) == ("int8-block", "int8-block")
    assert out_of(advice) == {"int8": "failed a gate"}
    assert "int8 is out: it failed a gate" in advice.reasons
    assert advise(manifest_of(ALL, int8=False), {}, "m").variant == "int8-block"


def test_what_was_never_verified_is_not_out() -> None:
    assert advise(manifest_of(ALL, int8=None), {}, "m").variant == "int8"


def test_what_does_not_fit_into_free_memory_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = {"fp32": report(9000, 1.0), "int8": report(1000, 0.99), "int4": report(500, 0.98)}
    for free, expected, out in (
        (room.ROOM_MIB + 400, "fp32", []),
        (room.ROOM_MIB + 399, "int8", ["fp32"]),
        (room.ROOM_MIB + 110, "int8", ["fp32", "int8-block"]),
        (room.ROOM_MIB + 109, "int4", ["fp32", "int8", "int8-block"]),
    ):
        monkeypatch.setattr(room, "available_mib", lambda free=free: float(free))
        advice = advise(manifest_of(ALL), reports, "m")
        assert advice.variant == expected
        assert list(out_of(advice)) == out
    assert out_of(advice)["int8"] == f"needs about {room.ROOM_MIB + 110} MiB"
    assert f"int8 is out: it needs about {room.ROOM_MIB + 110} MiB" in advice.reasons
    assert (advice.variant, advice.auto) == ("int4", "int8")  # what auto takes goes by gates alone


def test_the_fastest_of_those_measured_here_is_taken() -> None:
    reports = {"fp32": report(500, 1.0), "int8": report(1000, 0.99), "int4": report(1100, 0.95)}
    advice = advise(manifest_of(ALL), reports, "m")
    assert (advice.variant, advice.auto) == ("int4", "int8")
    assert advice.reasons[0] == "int4 ran at 1,100 tokens/s on this kind of CPU, faster than any other"
    assert advise(manifest_of(ALL, int4=False), reports, "m").variant == "int8"


@pytest.mark.parametrize(("speed", "expected"), [(1000, "int8-block"), (951, "int8-block"), (949, "int8")])
def test_of_those_that_are_alike_the_one_closest_to_fp32_is_taken(speed: float, expected: str) -> None:
    reports = {"int8": report(1000, 0.9987), "int8-block": report(speed, 0.9996), "int4": report(300, 0.99999)}
    advice = advise(manifest_of(ALL), reports, "m")
    assert advice.variant == expected
    if expected == "int8-block":
        assert advice.reasons[0] == (
            f"int8-block ran at {speed:,} tokens/s on this kind of CPU, int8 not 5% faster, and it is closest to fp32 "
            "of these"
        )


def test_fp32_itself_is_closest_where_it_is_as_fast() -> None:
    reports = {"fp32": report(980, 1.0), "int8": report(1000, 0.9987)}
    assert advise(manifest_of(ALL), reports, "m").variant == "fp32"


def test_of_those_that_are_alike_in_everything_the_faster_is_taken() -> None:
    reports = {"int8": report(990, 0.9987), "int8-block": report(1000, 0.9987)}
    assert advise(manifest_of(ALL), reports, "m").variant == "int8-block"


@pytest.mark.parametrize("machine", ELSEWHERE)
def test_figures_of_another_kind_of_cpu_do_not_count(machine: dict[str, Any]) -> None:
    reports = {"int8": report(100, 0.99, machine), "int4": report(9000, 0.98, machine), "fp32": report(50, 1.0)}
    advice = advise(manifest_of(ALL), reports, "m")
    assert advice.variant == "int8"
    assert {one.name: one.tokens_per_s for one in advice.candidates if one.tokens_per_s} == {"fp32": 50}
    assert "has measured only one of them on this kind of CPU" in advice.reasons[0]


def test_another_cpu_of_the_same_kind_counts() -> None:
    twin = {**HERE, "cpu": "of another maker", "cores": 96, "onnxruntime": "1.30.0"}
    reports = {"int8": report(100, 0.99, twin), "int4": report(9000, 0.98, twin)}
    assert advise(manifest_of(ALL), reports, "m").variant == "int4"


def test_figures_of_what_is_out_do_not_count() -> None:
    reports = {"int4": report(9000, 0.98), "fp32": report(50, 1.0)}
    advice = advise(manifest_of(ALL, int4=False), reports, "m")
    assert advice.variant == "int8"
    assert "has measured only one of them" in advice.reasons[0]


def test_reports_without_metrics_or_speed_or_machine_are_no_error() -> None:
    reports: dict[str, dict[str, Any]] = {
        "fp32": {},
        "int8": {"variant": "int8", "metrics": {}},
        "int8-block": {"bench": None},
        "int4": {"bench": {"tokens_per_s": 9000.0}},
    }
    advice = advise(manifest_of(ALL), reports, "m")
    assert advice.variant == "int8"
    assert {one.tokens_per_s for one in advice.candidates} == {None}
    assert {one.cos_min for one in advice.candidates if one.name != "fp32"} == {None}  # fp32 is what is compared with


@pytest.mark.parametrize(
    ("odd", "field"),
    [
        ({"metrics": None}, "metrics"),
        ({"metrics": [1]}, "metrics"),
        ({"metrics": {"cos_min": "x"}}, "metrics.cos_min"),
        ({"metrics": {"cos_min": None}}, "metrics.cos_min"),
        ({"metrics": {"cos_min": True}}, "metrics.cos_min"),
        ({"metrics": {"cos_min": float("nan")}}, "metrics.cos_min"),
        ({"bench": 5}, "bench"),
        ({"bench": [1]}, "bench"),
        ({"bench": {"machine": 5}}, "bench.machine"),
        ({"bench": {"machine": {}}}, "bench.machine"),
        ({"bench": {"machine": {"system": " ", "flags": []}}}, "bench.machine"),
        ({"bench": {"machine": {"system": "Linux x86_64", "flags": [1]}}}, "bench.machine"),
        ({"bench": {"machine": HERE}}, "bench.tokens_per_s"),
        ({"bench": {"machine": HERE, "tokens_per_s": None}}, "bench.tokens_per_s"),
        ({"bench": {"machine": HERE, "tokens_per_s": "1000"}}, "bench.tokens_per_s"),
        ({"bench": {"machine": ELSEWHERE[0], "tokens_per_s": {}}}, "bench.tokens_per_s"),
    ],
    ids=str,
)
def test_a_report_that_is_none_is_said_by_file_and_field(odd: dict[str, Any], field: str) -> None:
    with pytest.raises(ModelFolderError) as caught:
        advise(manifest_of(ALL), {"int8": odd}, "owner/m")
    assert str(caught.value).startswith(f"{field} in reports/int8.json of owner/m: expected ")


def test_when_none_is_left_the_error_says_why_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "available_mib", lambda: 250.0)
    with pytest.raises(OptionError) as caught:
        advise(manifest_of({"fp32": 400, "int8": 110}, int8=False), {}, "owner/m")
    line = str(caught.value)
    assert line.startswith("a variant of owner/m for this machine: expected one that passed its gates and fits into ")
    assert "fp32 needs about 550 MiB; int8 failed a gate" in line


def test_the_smallest_is_named_where_another_is_taken() -> None:
    last = advise(manifest_of(ALL), {}, "m").reasons[-1]
    assert last == "where memory or disk is short, int4 is smallest: 73 MB"
    assert not [line for line in advise(manifest_of(ALL, int4=False), {}, "m").reasons if "is smallest" in line]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [(["avx2"], True), (["avx2", "avx512f"], True), (["avx2", "avx_vnni"], False), (["asimddp", "i8mm"], False)],
)
def test_a_cpu_without_8_bit_dot_products_is_told_to_measure(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], expected: bool
) -> None:
    known = {"system": "Linux x86_64", "flags": flags}
    monkeypatch.setattr(room, "kind", lambda: kind_of(known))

    def warned(reports: dict[str, Any], **passed: bool) -> bool:
        return any("no dot product" in line for line in advise(manifest_of(ALL, **passed), reports, "m").reasons)

    assert warned({}) is expected
    assert not warned({}, int8=False, int8_block=False)  # fp32 needs none
    assert not warned({"int8": report(2, 0.99, known), "fp32": report(1, 1.0, known)})  # it was measured
