"""Bad inputs end to end: a typed error of one line, nothing half-written, an older model folder untouched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import featherbed
from featherbed.errors import (
    CheckpointError,
    FeatherbedError,
    OptionError,
    OutputError,
    SpecError,
    TokenizerError,
    UnknownArchitectureError,
)
from tests.conftest import FIXTURES

Damage = Callable[[Path], None]
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 132\n"
PAGE = "<!DOCTYPE html>\n<html>\n<head><title>404</title></head>\n</html>\n"


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path under a folder, files with what they hold."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def put(name: str, text: str | bytes) -> Damage:
    """Another content for a file."""

    def act(folder: Path) -> None:
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return act


def gone(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def cut(name: str, part: float) -> Damage:
    def act(folder: Path) -> None:
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(raw[: int(len(raw) * part)])

    return act


def changed(name: str, **values: object) -> Damage:
    """Other values in a JSON file; None takes a key out."""

    def act(folder: Path) -> None:
        old = json.loads((folder / name).read_text("utf-8"))
        new = {key: value for key, value in {**old, **values}.items() if value is not None}
        (folder / name).write_text(json.dumps(new), "utf-8")

    return act


def tensors(edit: Callable[[dict[str, Any]], object]) -> Damage:
    def act(folder: Path) -> None:
        values = load_file(folder / "model.safetensors")
        edit(values)
        save_file(values, folder / "model.safetensors")

    return act


def vocabulary(grow: Callable[[dict[str, int]], object]) -> Damage:
    def act(folder: Path) -> None:
        tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        grow(tokenizer["model"]["vocab"])
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")

    return act


DAMAGES: dict[str, tuple[Damage, type[FeatherbedError], str]] = {
    # weights
    "no weights": (gone("model.safetensors"), CheckpointError, "model.safetensors"),
    "weights cut in the header": (cut("model.safetensors", 0.001), CheckpointError, "cut off"),
    "weights cut in the middle": (cut("model.safetensors", 0.5), CheckpointError, "cut off"),
    "weights cut at the end": (cut("model.safetensors", 0.9999), CheckpointError, "cut off"),
    "empty weights": (put("model.safetensors", b""), CheckpointError, "0 bytes"),
    "random weights": (
        put("model.safetensors", np.random.default_rng(0).bytes(4096)), CheckpointError, "not safetensors"),
    "weights as a git-lfs pointer": (put("model.safetensors", LFS), CheckpointError, "git lfs pull"),
    "weights as an HTML page": (put("model.safetensors", PAGE), CheckpointError, "not safetensors"),
    "weights nested too deep": (
        put("model.safetensors", (100_000).to_bytes(8, "little") + b"[" * 100_000), CheckpointError, "header"),
    "a missing tensor": (
        tensors(lambda t: t.pop("encoder.layer.0.output.dense.weight")),
        CheckpointError, "'encoder.layer.0.output.dense.weight'"),
    "a tensor of another shape": (
        tensors(lambda t: t.update({"encoder.layer.0.output.dense.weight": np.zeros((48, 95), np.float32)})),
        CheckpointError, "[48, 96]"),
    "a tensor of another type": (
        tensors(lambda t: t.update({"encoder.layer.0.output.dense.bias": np.zeros(48, np.int8)})),
        CheckpointError, "I8"),
    # config
    "no config": (gone("config.json"), SpecError, "config.json"),
    "a config that is not JSON": (put("config.json", "{"), SpecError, "config.json"),
    "a config as a git-lfs pointer": (put("config.json", LFS), SpecError, "git lfs pull"),
    "a config as an HTML page": (put("config.json", PAGE), SpecError, "JSONDecodeError"),
    "an unknown architecture": (changed("config.json", model_type=["t5"]), UnknownArchitectureError, "'t5'"),
    "no architecture": (changed("config.json", model_type=None), UnknownArchitectureError, "None"),
    "more layers than weights": (changed("config.json", num_hidden_layers=3), CheckpointError, "layer.1."),
    "a billion layers": (changed("config.json", num_hidden_layers=10**9), CheckpointError, "layer.1."),
    "a size that lies": (changed("config.json", hidden_size=768), CheckpointError, "768"),
    "heads that do not divide": (changed("config.json", num_attention_heads=5), FeatherbedError, "head"),
    "no heads": (changed("config.json", num_attention_heads=0), SpecError, "num_attention_heads"),
    "an epsilon that is a text": (changed("config.json", layer_norm_eps="small"), SpecError, "layer_norm_eps"),
    "another activation": (changed("config.json", hidden_act="relu"), UnknownArchitectureError, "'relu'"),
    "NaN in the config": (changed("config.json", initializer_range=float("nan")), FeatherbedError, "config.json"),
    # tokenizer
    "no tokenizer": (gone("tokenizer.json"), TokenizerError, "tokenizer.json"),
    "an empty tokenizer": (put("tokenizer.json", ""), TokenizerError, "tokenizer.json"),
    "a tokenizer that is not JSON": (put("tokenizer.json", "not json"), TokenizerError, "tokenizer.json"),
    "a tokenizer cut in the middle": (cut("tokenizer.json", 0.5), TokenizerError, "tokenizer.json"),
    "a tokenizer as an HTML page": (put("tokenizer.json", PAGE), TokenizerError, "tokenizer.json"),
    "a tokenizer as a git-lfs pointer": (put("tokenizer.json", LFS), TokenizerError, "git lfs pull"),
    "a tokenizer of another schema": (put("tokenizer.json", '{"version": "9"}'), TokenizerError, "tokenizer.json"),
    "a vocabulary larger than the table": (
        vocabulary(lambda v: v.update({f"word{i}": 384 + i for i in range(200)})), TokenizerError, "384"),
    "a token id behind the table": (vocabulary(lambda v: v.update({"rain": 5000})), TokenizerError, "384"),
    # the rest
    "a pooling nobody knows": (put("1_Pooling/config.json", '{"pooling_mode": "max"}'), SpecError, "1_Pooling"),
    "two poolings": (
        put("1_Pooling/config.json", '{"pooling_mode": "cls", "pooling_mode_mean_tokens": true}'),
        SpecError, "cls, mean"),
    "a pooling that is silent": (gone("1_Pooling/config.json"), SpecError, "--pooling"),
    "a default prompt that is not there": (
        changed("config_sentence_transformers.json", default_prompt_name="queri"), SpecError, "queri"),
    "a prompt that UTF-8 cannot carry": (
        put("config_sentence_transformers.json", '{"prompts": {"query": "\\ud800"}}'),
        FeatherbedError, "config_sentence_transformers.json"),
    "a length of zero": (changed("tokenizer_config.json", model_max_length=0), SpecError, "length"),
    "a length with no room for a text": (changed("tokenizer_config.json", model_max_length=2), TokenizerError, "2"),
}  # fmt: skip


def refused(kind: type[FeatherbedError], act: Callable[[], object]) -> str:
    """The one line of the error that ``act`` ends in."""
    with pytest.raises(FeatherbedError) as caught:
        act()
    assert isinstance(caught.value, kind)
    assert caught.value.exit_code == 2
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert "expected" in text
    assert "found" in text
    return text


@pytest.fixture
def older(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A place with a model folder of before."""
    return Path(shutil.copytree(folders["bert-cls"], tmp_path / "place" / "m"))


@pytest.mark.parametrize("name", list(DAMAGES))
def test_a_damaged_checkpoint_is_refused_in_one_line_and_leaves_nothing(
    checkpoint: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    damage, kind, word = DAMAGES[name]
    source = checkpoint("bert-cls")
    damage(source)
    before = tree(source)
    place = tmp_path / "place"
    place.mkdir()
    line = refused(kind, lambda: featherbed.build(source, place / "m", ["fp32", "int8"], check=False))
    assert word in line
    assert list(place.iterdir()) == []
    assert tree(source) == before


@pytest.mark.parametrize("name", list(DAMAGES))
def test_a_damaged_checkpoint_leaves_an_older_model_folder_as_it_was(
    checkpoint: Callable[[str], Path], older: Path, name: str
) -> None:
    damage, kind, _ = DAMAGES[name]
    source = checkpoint("bert-cls")
    damage(source)
    before = tree(older.parent)
    refused(kind, lambda: featherbed.build(source, older, ["fp32"], check=False))
    assert tree(older.parent) == before


def test_the_same_build_without_damage_replaces_the_older_folder(
    checkpoint: Callable[[str], Path], older: Path
) -> None:
    featherbed.build(checkpoint("bert-cls"), older, ["fp32", "q4"], check=False)
    assert {path.name for path in (older / "onnx").iterdir()} == {"model.onnx", "model_q4.onnx"}
    assert list(older.parent.iterdir()) == [older]


@pytest.mark.parametrize("missing", ["model-00002-of-00003.safetensors", "model-00001-of-00003.safetensors"])
def test_a_missing_shard_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path, missing: str) -> None:
    source = checkpoint("qwen3-biased")
    (source / missing).unlink()
    assert missing in refused(CheckpointError, lambda: featherbed.build(source, tmp_path / "m", check=False))
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"variants": ["int9"]}, "did you mean int8?"),
        ({"variants": []}, "an empty list"),
        ({"variants": ["fp32", "../x"]}, "'../x'"),
        ({"gates": ["cos=0.9"]}, "an unknown metric"),
        ({"gates": ["cos_min=much"]}, "the bound 'much'"),
        ({"pooling": "max"}, "'max'"),
    ],
    ids=str,
)
def test_a_bad_option_is_refused_before_anything_is_written(
    older: Path, tmp_path: Path, options: dict[str, Any], word: str
) -> None:
    before = tree(older.parent)
    for out in (older, tmp_path / "new"):
        line = refused(OptionError, partial(featherbed.build, FIXTURES / "bert-cls", out, **options))
        assert word in line
    assert tree(older.parent) == before
    assert not (tmp_path / "new").exists()


def test_a_pooling_that_contradicts_the_checkpoint_is_refused(tmp_path: Path) -> None:
    refused(SpecError, lambda: featherbed.build(FIXTURES / "bert-cls", tmp_path / "m", pooling="mean"))
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("source", ["nowhere", "./nowhere", "a/b/c", "a\0b", "x" * 5000, "~nobody/x"])
def test_a_source_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.chdir(tmp_path)
    refused(CheckpointError, lambda: featherbed.build(source, tmp_path / "m", check=False))
    assert list(tmp_path.iterdir()) == []


def test_a_file_as_the_source_is_refused(tmp_path: Path) -> None:
    source = FIXTURES / "bert-cls" / "model.safetensors"
    refused(FeatherbedError, lambda: featherbed.build(source, tmp_path / "m", check=False))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["under a file", "a file", "a folder of others", "a name too long"])
def test_an_output_that_cannot_be_written_is_refused_and_untouched(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("thesis", "utf-8")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "thesis.tex").write_text("thesis", "utf-8")
    out, kind = {
        "under a file": (tmp_path / "file" / "m", OutputError),
        "a file": (tmp_path / "file", OptionError),
        "a folder of others": (tmp_path / "others", OptionError),
        "a name too long": (tmp_path / ("m" * 300), OutputError),
    }[place]
    before = tree(tmp_path)
    refused(kind, lambda: featherbed.build(FIXTURES / "bert-cls", out, ["fp32"], check=False))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("number", [5, 13, 28, 30])
def test_a_disk_that_fails_at_any_sync_leaves_the_older_folder(
    older: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fsync, left, failed = os.fsync, 0, 0
    before = tree(older.parent)

    def failing(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    for syncs in range(0, 60, 4):  # folders' own syncs may fail: some file systems have none
        left = syncs
        try:
            featherbed.build(FIXTURES / "bert-cls", older, ["fp32", "q4"], check=False)
            text = ""
        except OutputError as error:
            text = str(error)
        if not text:
            break
        assert os.strerror(number) in text
        assert tree(older.parent) == before
        failed += 1
    assert failed >= 3
    assert (older / "onnx" / "model_q4.onnx").is_file()
    assert list(older.parent.iterdir()) == [older]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError])
def test_a_build_that_is_interrupted_leaves_the_older_folder(older: Path, error: type[BaseException]) -> None:
    before = tree(older.parent)

    def progress(stage: str, *_: int) -> None:
        if stage == "write q4":
            raise error

    with pytest.raises(error):
        featherbed.build(FIXTURES / "bert-cls", older, ["fp32", "q4"], check=False, progress=progress)
    assert tree(older.parent) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(
    checkpoint: Callable[[str], Path], tmp_path: Path, value: float
) -> None:
    source = checkpoint("bert-cls")
    tensors(lambda t: t["encoder.layer.0.output.dense.bias"].__setitem__(3, value))(source)
    with pytest.raises(CheckpointError, match=r"encoder\.layer\.0\.output\.dense\.bias.*NaN or infinity"):
        featherbed.build(source, tmp_path / "m", ["fp32"])
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["encoder.layer.0.output.dense.weight", "embeddings.word_embeddings.weight"])
@pytest.mark.parametrize("recipe", ["int8", "int8-block", "int8-dynamic", "q4"])
def test_weights_that_are_not_finite_are_not_rounded_into_a_variant_that_passes(
    checkpoint: Callable[[str], Path], tmp_path: Path, recipe: str, name: str, value: float
) -> None:
    source = checkpoint("bert-cls")
    tensors(lambda t: t[name].__setitem__((3, 5), value))(source)
    with pytest.raises(CheckpointError, match=name):
        featherbed.build(source, tmp_path / "m", [recipe])
    assert not (tmp_path / "m").exists()


def test_a_folder_that_holds_code_and_pickles_builds_without_running_or_taking_them(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = checkpoint("bert-cls")
    canary = tmp_path / "canary"
    code = f"import pathlib; pathlib.Path({str(canary)!r}).touch()"
    for name in ("modeling.py", "tokenization.py", "__init__.py"):
        (source / name).write_text(code, "utf-8")
    (source / "pytorch_model.bin").write_bytes(b"cpathlib\nPath\n.")
    changed("config.json", auto_map={"AutoModel": "modeling.Model"})(source)
    changed("tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization.T", None]})(source)
    featherbed.build(source, tmp_path / "m", ["fp32"], check=False)
    assert not canary.exists()
    assert not [path for path in (tmp_path / "m").rglob("*") if path.suffix in {".py", ".bin"}]


# the command line


@pytest.mark.parametrize("name", ["no tokenizer", "weights cut in the middle", "an unknown architecture"])
def test_the_command_line_ends_in_one_line_and_exit_code_2(
    checkpoint: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    damage, _, word = DAMAGES[name]
    source = checkpoint("bert-cls")
    damage(source)
    place = tmp_path / "place"
    place.mkdir()
    command = [sys.executable, "-m", "featherbed.cli", "build", str(source), "-o", str(place / "m")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    last = done.stderr.rstrip("\n").splitlines()[-1]
    assert last.startswith("featherbed: ")
    assert word in last
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(place.iterdir()) == []
