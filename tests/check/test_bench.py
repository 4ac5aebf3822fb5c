"""bench measures each variant in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import featherbed
from featherbed.check.bench import Load
from featherbed.check.memory import memory_mib
from featherbed.errors import EngineError, OptionError
from featherbed.folder import open_folder

SMALL = Load(tokens=16, batch=2, rounds=1)


def test_bench_fills_every_figure_and_the_card_quotes_it(copied: Callable[[str], Path]) -> None:
    folder = copied("bert-mean")
    document = featherbed.bench(folder, ["fp32", "int8"], SMALL, save=True)
    assert list(document["variants"]) == ["fp32", "int8"]
    for row in document["variants"].values():
        assert all(value > 0 for value in row.values())
        assert row["rss_private_mib"] <= row["rss_mib"] <= row["rss_peak_mib"]
        assert row["tokens_per_s"] == pytest.approx(16 * row["texts_per_s"], rel=0.01)
    card = (folder / "README.md").read_text("utf-8")
    assert f"{document['variants']['int8']['tokens_per_s']:.0f}" in card
    open_folder(folder).check_hashes()


def test_a_worker_that_dies_is_an_error_that_names_the_variant(copied: Callable[[str], Path]) -> None:
    folder = copied("bert-mean")
    (folder / "tokenizer.json").write_text("{}", "utf-8")
    with pytest.raises(EngineError, match="int8"):
        featherbed.bench(folder, ["int8"], SMALL)


def test_more_tokens_than_the_model_takes_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(OptionError, match="--tokens"):
        featherbed.bench(folders["bert-mean"], ["int8"], Load(tokens=65))


@pytest.mark.parametrize("values", [(0, 1, 1, 0), (1, 0, 1, 0), (1, 1, 0, 0), (1, 1, 1, -1)])
def test_loads_that_make_no_run_are_refused(values: tuple[int, int, int, int]) -> None:
    with pytest.raises(OptionError):
        Load(*values)


def test_touching_memory_shows_as_private() -> None:
    before = memory_mib()["rss_private_mib"]
    block = bytearray(b"x") * (64 * 2**20)
    after = memory_mib()["rss_private_mib"]
    assert 60 <= after - before <= 80
    del block


def test_the_document_is_json(folders: dict[str, Path]) -> None:
    document = featherbed.bench(folders["qwen3-tied"], ["int8"], SMALL)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
