"""Sessions: graphs small enough to work out by hand, and every way a file can be refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper, save

from featherbed.errors import EngineError, ModelFolderError
from featherbed.run.batches import collate
from featherbed.run.session import Session, require

TOKENS, DIM = 8, 3
TABLE = np.arange(TOKENS * DIM, dtype=np.float32).reshape(TOKENS, DIM)
BATCH = collate([[1, 2, 3], [7]], 0)


@dataclass(frozen=True)
class Sketch:
    """A graph that looks ids up in TABLE, adds ``added`` inputs to them, and gives ``output``."""

    inputs: Sequence[str] = ("input_ids", "attention_mask")
    added: Sequence[str] = ()
    output: str = "last_hidden_state"
    batch: str | int = "batch"

    def write(self, path: Path) -> Path:
        axes = [self.batch, "tokens"]
        nodes, last = [], "input_ids"
        for name in self.added:
            nodes.append(helper.make_node("Add", [last, name], [f"{last}+{name}"]))
            last = f"{last}+{name}"
        nodes.append(helper.make_node("Gather", ["table", last], [self.output]))
        graph = helper.make_graph(
            nodes,
            "sketch",
            [helper.make_tensor_value_info(name, TensorProto.INT64, axes) for name in self.inputs],
            [helper.make_tensor_value_info(self.output, TensorProto.FLOAT, [*axes, DIM])],
            [numpy_helper.from_array(TABLE, "table")],
        )
        save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
        return path


def plain(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    return np.array([[TABLE[i] for i in row] for row in ids], np.float32)


def test_hidden_states_are_what_the_graph_says(tmp_path: Path) -> None:
    session = Session(Sketch().write(tmp_path / "a.onnx"))
    assert np.array_equal(session.hidden(BATCH), plain(BATCH.ids))
    assert not session.pools


def test_a_graph_with_a_sentence_embedding_pools(tmp_path: Path) -> None:
    session = Session(Sketch(output="sentence_embedding").write(tmp_path / "a.onnx"))
    assert session.pools
    assert np.array_equal(session.vectors(BATCH), plain(BATCH.ids))


def test_only_declared_inputs_are_fed(tmp_path: Path) -> None:
    session = Session(Sketch(inputs=("input_ids",)).write(tmp_path / "a.onnx"))
    assert np.array_equal(session.hidden(BATCH), plain(BATCH.ids))


def test_token_types_are_zeros_and_the_mask_is_the_mask(tmp_path: Path) -> None:
    inputs = ("input_ids", "attention_mask", "token_type_ids")
    session = Session(Sketch(inputs, added=inputs[1:]).write(tmp_path / "a.onnx"))
    batch = collate([[1, 2, 3], [6]], 0)
    assert np.array_equal(session.hidden(batch), plain(batch.ids + batch.mask))


@pytest.mark.parametrize("prepack", [True, False])
@pytest.mark.parametrize("threads", [None, 1, 2])
def test_threads_and_prepacking_change_no_result(tmp_path: Path, threads: int | None, prepack: bool) -> None:
    session = Session(Sketch().write(tmp_path / "a.onnx"), threads, prepack)
    assert np.array_equal(session.hidden(BATCH), plain(BATCH.ids))


def test_a_missing_file_is_a_model_folder_error(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"absent\.onnx: expected an \.onnx file, found no such file"):
        Session(tmp_path / "absent.onnx")


def test_a_folder_in_place_of_the_file_is_a_model_folder_error(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="no such file"):
        Session(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage " * 500, b"<html>404</html>", b"version https://git-lfs.github.com/spec/v1\n", b"\0" * 99],
)
def test_a_file_that_is_no_graph_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(content)
    with pytest.raises(EngineError, match=r"a\.onnx: expected a graph that onnxruntime \S+ loads") as caught:
        Session(path)
    assert "\n" not in str(caught.value)


def test_a_cut_graph_is_refused_at_every_length(tmp_path: Path) -> None:
    path = Sketch().write(tmp_path / "a.onnx")
    whole = path.read_bytes()
    for part in range(64):
        path.write_bytes(whole[: len(whole) * part // 64])
        with pytest.raises(EngineError):
            Session(path)


@pytest.mark.parametrize(
    "sketch",
    [
        Sketch(inputs=("input_ids", "attention_mask", "position_ids")),
        Sketch(inputs=("input_ids", "past_key_values.0.key")),
        Sketch(output="logits"),
    ],
    ids=["an input too many", "a cache", "another output"],
)
def test_ports_we_cannot_serve_are_listed(tmp_path: Path, sketch: Sketch) -> None:
    with pytest.raises(EngineError) as caught:
        Session(sketch.write(tmp_path / "a.onnx"))
    assert caught.value.found == f"inputs {', '.join(sorted(sketch.inputs))}; outputs {sketch.output}"
    assert "attention_mask, input_ids, token_type_ids" in caught.value.expected


def test_a_graph_without_token_ids_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("Cast", ["attention_mask"], ["last_hidden_state"], to=TensorProto.FLOAT)
    ports = [helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "tokens"])]
    outputs = [helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["batch", "tokens"])]
    model = helper.make_model(
        helper.make_graph([node], "masks", ports, outputs), opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )
    save(model, tmp_path / "a.onnx")
    with pytest.raises(EngineError, match="found inputs attention_mask;"):
        Session(tmp_path / "a.onnx")


def test_a_run_that_fails_says_what_was_run(tmp_path: Path) -> None:
    session = Session(Sketch().write(tmp_path / "a.onnx"))
    with pytest.raises(EngineError, match=r"^a run of 2 texts × 3 tokens: .*out of data bounds") as caught:
        session.hidden(collate([[1, 2, TOKENS], [7]], 0))
    assert "\n" not in str(caught.value)
    assert np.array_equal(session.hidden(BATCH), plain(BATCH.ids))


def test_a_run_that_fails_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    session = Session(Sketch().write(tmp_path / "a.onnx"))
    with pytest.raises(EngineError):
        session.hidden(collate([[TOKENS]], 0))
    assert capfd.readouterr() == ("", "")


def test_a_static_batch_says_which_sizes_do_not_fit(tmp_path: Path) -> None:
    path = Sketch(batch=1).write(tmp_path / "a.onnx")
    session = Session(path)
    single = collate([[1, 2]], 0)
    assert np.array_equal(session.hidden(single), plain(single.ids))
    with pytest.raises(EngineError, match=r"expected dynamic axes.*found the fixed shape \[1, 'tokens'\]"):
        Session(path, width=3)
    with pytest.raises(EngineError, match=r"^a run of 2 texts × 3 tokens: .*Got: 2 Expected: 1"):
        session.hidden(BATCH)


@pytest.mark.parametrize(
    ("installed", "least"), [("1.18.0", "1.30"), ("1.9.1", "1.30"), ("1.29.9", "1.30"), ("1.31.0", "2.0")]
)
def test_an_onnxruntime_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch, installed: str, least: str) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", installed)
    with pytest.raises(EngineError, match=f"^variant q4: expected onnxruntime {least} or newer.*found {installed}"):
        require(least, "variant q4")


@pytest.mark.parametrize(
    ("installed", "least"), [("1.30.0", "1.30"), ("1.31.1", "1.9"), ("2.0.0", "1.30"), ("1.30.2", "1.30.2")]
)
def test_an_onnxruntime_that_is_new_enough_is_taken(
    monkeypatch: pytest.MonkeyPatch, installed: str, least: str
) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", installed)
    require(least, "variant q4")
