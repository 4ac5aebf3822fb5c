"""bench measures each variant in a process of its own."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import featherbed
from featherbed.check import bench as bench_room
from featherbed.check.bench import Load
from featherbed.check.memory import memory_mib
from featherbed.errors import EngineError, MissingError, OptionError, TokenizerError
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


def test_an_error_of_ours_in_a_worker_is_the_same_error_here(copied: Callable[[str], Path]) -> None:
    folder = copied("bert-mean")
    (folder / "tokenizer.json").write_text("{}", "utf-8")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: expected a tokenizer") as caught:
        featherbed.bench(folder, ["int8"], SMALL)
    assert "\n" not in str(caught.value)


def test_a_worker_that_dies_is_an_error_that_names_the_variant(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(EngineError, match=r"^bench of variant int8: .*found a process that vanished"):
        featherbed.bench(folders["bert-mean"], ["int8"], SMALL)


def test_the_document_says_which_provider_was_used_and_what_was_asked(folders: dict[str, Path]) -> None:
    document = featherbed.bench(folders["bert-mean"], ["int8"], replace(SMALL, threads=2, pool_size=2))
    assert document["load"] == {
        "tokens": 16, "batch": 2, "rounds": 1, "threads": 2, "pool_size": 2, "provider": "cpu",
    }  # fmt: skip


@pytest.mark.parametrize(("provider", "error"), [("openvino", MissingError), ("gpu", OptionError)])
def test_a_provider_that_cannot_be_had_is_refused(
    folders: dict[str, Path], provider: str, error: type[Exception]
) -> None:
    with pytest.raises(error, match=f"^provider '{provider}'"):
        featherbed.bench(folders["bert-mean"], ["int8"], replace(SMALL, provider=provider))


def test_loading_is_measured_when_weights_are_prepacked_already(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    class Counted(bench_room._Worker):
        def load(self) -> None:
            super().load()
            started.append(self.load_s)

    monkeypatch.setattr(bench_room, "_Worker", Counted)
    document = featherbed.bench(folders["bert-mean"], ["int8", "fp32"], SMALL)
    assert len(started) == 4
    assert [row["load_s"] for row in document["variants"].values()] == [round(s, 3) for s in started[1::2]]


def test_more_tokens_than_the_model_takes_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(OptionError, match="--tokens"):
        featherbed.bench(folders["bert-mean"], ["int8"], Load(tokens=65))


@pytest.mark.parametrize(
    "values", [(0, 1, 1, 0, 0), (1, 0, 1, 0, 0), (1, 1, 0, 0, 0), (1, 1, 1, -1, 0), (1, 1, 1, 0, -1)]
)
def test_loads_that_make_no_run_are_refused(values: tuple[int, int, int, int, int]) -> None:
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
