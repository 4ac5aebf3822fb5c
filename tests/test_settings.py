"""featherbed.toml, the environment, flags: later wins, and what nobody knows is an error that names the nearest."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from featherbed.errors import ModelFolderError, OptionError, TokenizerError
from featherbed.pipeline.configured import configured
from featherbed.run.embedder import Embedder
from featherbed.settings import KEYS, Embedding, read_embedding


def toml(place: Path, *lines: str) -> Path:
    path = place / "featherbed.toml"
    path.write_text("\n".join(["[embedding]", *lines]), "utf-8")
    return path


def test_later_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = toml(tmp_path, 'model = "a"', "batch_size = 4", "pool_size = 2")
    monkeypatch.setenv("FEATHERBED_BATCH_SIZE", "8")
    monkeypatch.setenv("FEATHERBED_POOL_SIZE", "3")
    monkeypatch.setenv("FEATHERBED_TOKENIZER_PATH", "")
    found = read_embedding(path, Embedding(pool_size=5))
    assert found == Embedding(model="a", batch_size=8, pool_size=5)
    assert read_embedding() == Embedding(batch_size=8, pool_size=3)


def test_paths_are_as_seen_from_the_file_that_names_them(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    path = toml(tmp_path, 'model = "model"', 'quantized_model_path = "q/m.onnx"', 'tokenizer_path = "/t.json"')
    found = read_embedding(path)
    assert found.model == str(tmp_path / "model")
    assert found.quantized_model_path == tmp_path / "q" / "m.onnx"
    assert found.tokenizer_path == Path("/t.json")
    assert read_embedding(toml(tmp_path, 'model = "owner/name"')).model == "owner/name"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('[embedding]\nmodle = "a"', "did you mean model?"),
        ('[embedding]\nzzz = "a"', f"expected one of {', '.join(KEYS)}"),
        ("[embeding]\n", "did you mean embedding?"),
        ("[embedding]\nbatch_size = 0", "expected a whole number of at least 1, found 0"),
        ("[embedding]\nbatch_size = true", "found True"),
        ("[embedding]\nmodel = 3", "expected a text, found 3"),
        ("embedding = 3", "expected a section [embedding], found 3"),
        ("[embedding", "expected a file in TOML"),
    ],
)
def test_what_nobody_knows_is_an_error(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "featherbed.toml"
    path.write_text(text, "utf-8")
    with pytest.raises(OptionError) as caught:
        read_embedding(path)
    assert part in str(caught.value)
    assert str(path) in str(caught.value)


def test_an_unknown_variable_is_an_error_and_the_caches_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATHERBED_CACHE", "/x")
    assert read_embedding() == Embedding()
    monkeypatch.setenv("FEATHERBED_BATCHSIZE", "8")
    with pytest.raises(OptionError, match="did you mean batch_size"):
        read_embedding()


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="No such file"):
        read_embedding(tmp_path / "absent.toml")


def test_the_quantized_file_is_used_and_without_it_fp32_is_back(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder, texts = folders["bert-mean"], ["rain", "a fox in the night"]
    quantized = folder / "onnx" / "model_int8.onnx"
    with caplog.at_level(logging.WARNING, "featherbed"):
        found = configured(Embedding(model=str(folder), quantized_model_path=quantized))
    assert f"model {folder} is ignored: quantized_model_path {quantized} is used" in caplog.text
    assert np.abs(found.encode(texts) - Embedder(folder, "int8").encode(texts)).max() <= 1e-6
    back = configured(Embedding(model=str(folder)))
    assert back.variant == "fp32"
    assert np.array_equal(back.encode(texts), Embedder(folder, "fp32").encode(texts))
    assert configured(Embedding(model=str(folder)), "q4").variant == "q4"


def test_a_bare_file_stands_apart_from_its_tokenizer(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders["qwen3-tied"]
    for name in ("graph", "words", "more"):
        (tmp_path / name).mkdir()
    graph = Path(shutil.copy(folder / "onnx" / "model.onnx", tmp_path / "graph" / "m.onnx"))
    words = Path(shutil.copy(folder / "tokenizer.json", tmp_path / "words" / "tok.json"))
    more = Path(shutil.copy(folder / "tokenizer_config.json", tmp_path / "more" / "tc.json"))
    shutil.copy(folder / "config.json", tmp_path / "words")
    found = configured(Embedding(quantized_model_path=graph, tokenizer_path=words, tokenizer_config_path=more))
    assert np.abs(found.encode("rain") - Embedder(folder, "fp32").encode("rain")).max() <= 1e-6
    cut = json.loads(more.read_text("utf-8")) | {"model_max_length": 5}
    more.write_text(json.dumps(cut), "utf-8")
    said = Embedding(quantized_model_path=graph, tokenizer_path=words, tokenizer_config_path=more)
    assert configured(said).spec.max_length == 5


def test_a_tokenizer_of_its_own_goes_with_a_folder_too(folders: dict[str, Path], tmp_path: Path) -> None:
    words = Path(shutil.copy(folders["bert-mean"] / "tokenizer.json", tmp_path / "tok.json"))
    found = configured(Embedding(model=str(folders["bert-mean"]), tokenizer_path=words))
    assert np.abs(found.encode("rain") - Embedder(folders["bert-mean"], "fp32").encode("rain")).max() <= 1e-6


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no such file": lambda path: path.unlink(missing_ok=True),
    "a folder, and no file": lambda path: path.mkdir(),
    "an empty file": lambda path: path.write_bytes(b""),
    "a git-lfs pointer": lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
}


@pytest.mark.parametrize("why", DAMAGES)
def test_an_onnx_file_that_cannot_be_read_is_named_with_the_reason(tmp_path: Path, why: str) -> None:
    path = tmp_path / "m.onnx"
    DAMAGES[why](path)
    with pytest.raises(ModelFolderError) as caught:
        configured(Embedding(quantized_model_path=path))
    assert f"cannot read ONNX file {path}: " in str(caught.value)
    assert why in str(caught.value)


@pytest.mark.parametrize("why", [*DAMAGES, "no JSON", "list, and no object"])
@pytest.mark.parametrize("key", ["tokenizer_path", "tokenizer_config_path"])
def test_a_tokenizer_that_cannot_be_read_is_named_with_the_reason(
    folders: dict[str, Path], tmp_path: Path, why: str, key: str
) -> None:
    path = tmp_path / "t.json"
    if why in DAMAGES:
        DAMAGES[why](path)
    else:
        path.write_text("[]" if "list" in why else "{", "utf-8")
    graph = folders["bert-mean"] / "onnx" / "model.onnx"
    said = Embedding(quantized_model_path=graph, **{key: path})  # type: ignore[arg-type]  # either key is a path
    with pytest.raises(TokenizerError) as caught:
        configured(said)
    name = "tokenizer.json" if key == "tokenizer_path" else "tokenizer_config.json"
    assert f"cannot read {name} {path}: " in str(caught.value)
    assert why in str(caught.value)


def test_no_permission_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"x")
    opening = Path.open

    def refused(self: Path, mode: str = "r") -> object:
        if self == path:
            raise PermissionError(13, "Permission denied")
        return opening(self, mode)

    monkeypatch.setattr(Path, "open", refused)  # who runs tests as root may read everything
    with pytest.raises(ModelFolderError, match=r"cannot read ONNX file .*Permission denied"):
        configured(Embedding(quantized_model_path=path))


def test_neither_model_nor_file_is_an_error() -> None:
    with pytest.raises(OptionError, match="model or quantized_model_path"):
        configured(Embedding())
