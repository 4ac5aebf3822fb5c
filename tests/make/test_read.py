"""A reference file, back into the graph it was written from."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest

from featherbed.errors import ModelFolderError
from featherbed.folder import graph_name
from featherbed.make.checkpoint import open_checkpoint
from featherbed.make.graph import reference_graph
from featherbed.make.graph.lower import lower
from featherbed.make.ir import LOOKUP, OURS
from featherbed.make.read import read_graph
from featherbed.make.write import write_graph
from featherbed.spec import read_spec
from tests.conftest import FIXTURES, NAMES


@pytest.mark.parametrize("inline_limit_bytes", [0, 2**30], ids=["sidecar", "one-file"])
@pytest.mark.parametrize("name", NAMES)
def test_a_graph_comes_back_as_it_was_written(name: str, inline_limit_bytes: int, tmp_path: Path) -> None:
    written = reference_graph(open_checkpoint(FIXTURES / name), read_spec(FIXTURES / name))
    write = partial(write_graph, metadata={}, inline_limit_bytes=inline_limit_bytes)
    write(lower(written), tmp_path / "model.onnx")
    read = read_graph(tmp_path / "model.onnx")
    assert [(n.op, n.inputs, n.outputs, n.domain) for n in read.nodes] == [
        (n.op, n.inputs, n.outputs, n.domain) for n in written.nodes
    ]
    assert [dict(n.attributes) for n in read.nodes] == [
        {k: pytest.approx(v) if isinstance(v, float) else v for k, v in n.attributes} for n in written.nodes
    ]
    assert (read.inputs, read.outputs, read.opset) == (written.inputs, written.outputs, written.opset)
    for key, weight in written.weights.items():
        assert np.array_equal(read.weights[key].array(), weight.array()), key


@pytest.mark.parametrize("name", ["bert-mean", "qwen3-tied"])
def test_only_the_vocabulary_is_an_embedding_table(name: str, folders: dict[str, Path]) -> None:
    graph = read_graph(folders[name] / graph_name(""))
    tables = {n.inputs[1] for n in graph.nodes if (n.domain, n.op) == (OURS, LOOKUP)}
    assert len(tables) == 1
    assert graph.weights[tables.pop()].shape[0] == read_spec(FIXTURES / name).vocab_size


def test_a_variant_without_float_layers_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ModelFolderError, match="no linear layers"):
        read_graph(folders["bert-mean"] / graph_name("_int8"))


def test_bytes_that_are_no_graph_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\xff\x00not a model")
    with pytest.raises(ModelFolderError, match="build the folder again"):
        read_graph(tmp_path / "model.onnx")


def test_weights_outside_the_folder_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    model = onnx.load(str(folders["bert-mean"] / graph_name("")))
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../elsewhere")
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelFolderError, match="outside the folder"):
        read_graph(tmp_path / "model.onnx")
