"""docs/conform.md says what results/conform.json has, and no path of the machine that ran it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conform_page import BAR, HEADS, PAGE, START, shown, tables, wall

KNOWN = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "conform.json").read_text("utf-8"))


def test_the_page_quotes_the_committed_results() -> None:
    page = PAGE.read_text("utf-8").split(START)[1].split("<!-- end -->")[0]
    assert page.strip() == tables(KNOWN)


def test_a_cell_has_a_figure_or_a_reason() -> None:
    for rows in KNOWN["models"].values():
        for row in rows.values():
            for cell in (cell for cell in row.values() if isinstance(cell, dict)):
                assert ("cosine" in cell) != ("why" in cell)


@pytest.mark.parametrize(("cosine", "text"), [(BAR, "0.999990"), (1.0, "1.000000"), (0.9999899, "**0.999989**")])
def test_a_figure_is_cut_and_not_rounded_up_to_the_bar(cosine: float, text: str) -> None:
    assert shown(cosine) == text


def test_every_figure_below_the_bar_names_its_wall() -> None:
    for rows in KNOWN["models"].values():
        for variant, row in rows.items():
            for peer in HEADS:
                if row.get(peer, {}).get("cosine", 1) < BAR:
                    assert wall(variant, peer), (variant, peer)


@pytest.mark.parametrize("variant", ["fp32", "q4", "int4", "int4-small", "bnb4", "fp16", "q4f16"])
def test_variants_with_float_activations_have_no_excuse(variant: str) -> None:
    assert not any(wall(variant, peer) for peer in HEADS)


def test_codes_are_vectors_again_by_the_scale_of_the_manifest() -> None:
    assert any(row.endswith("its codes") for rows in KNOWN["models"].values() for row in rows)


def test_no_path_of_a_machine_is_told() -> None:
    assert "/tmp/" not in json.dumps(KNOWN) + PAGE.read_text("utf-8")
