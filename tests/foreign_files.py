"""Files as others export them: one small graph with their inputs, outputs and types, and the same in plain numpy."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, TensorProto, helper, numpy_helper, save

from tests.conftest import FIXTURES

Array = npt.NDArray[Any]
DIM, VOCABULARY, POSITIONS, TASKS = 48, 384, 600, 4
SCALE, ZERO = 0.0078, 110
CONFIGS = ("config.json", "tokenizer.json", "tokenizer_config.json", "config_sentence_transformers.json", "1_Pooling")
KINDS = {np.float32: TensorProto.FLOAT, np.float16: TensorProto.FLOAT16}


def numbers(name: str, *shape: int) -> npt.NDArray[np.float32]:
    """The weight called ``name``: random, the same every time."""
    return np.asarray(np.random.default_rng(sum(map(ord, name))).normal(size=shape) / 4, np.float32)


TABLE, PLACES, WEIGHT = (
    numbers("table", VOCABULARY, DIM),
    numbers("places", POSITIONS, DIM),
    numbers("weight", DIM, DIM),
)
TASK_ROWS = numbers("tasks", TASKS, DIM)


@dataclass(frozen=True)
class Export:
    """(table[ids] + places[position_ids] + tasks[task_id] + 1000 · what must be zero) @ weight, by other names.

    ``past`` is (layers, heads, size); ``wide`` the axes of task_id; ``half`` has inputs and outputs in float16 where
    they are float.
    """

    inputs: Sequence[str] = ("input_ids", "attention_mask")
    outputs: Sequence[str] = ("last_hidden_state",)
    past: tuple[int, int | str, int | str] | None = None
    batch: int | str = "batch_size"
    length: int | str = "sequence_length"
    wide: tuple[int | str, ...] = ()
    half: bool = False
    whole: int = TensorProto.INT64

    def model(self) -> ModelProto:
        """The graph."""
        self_axes = [self.batch, self.length]
        flat = TensorProto.FLOAT16 if self.half else TensorProto.FLOAT
        ports = []
        for name in self.inputs:
            axes: Sequence[int | str] = self.wide if name == "task_id" else [1] if "branch" in name else self_axes
            kind = TensorProto.BOOL if "branch" in name else self.whole
            ports.append(helper.make_tensor_value_info(name, kind, axes))
        nodes = [helper.make_node("Gather", ["table", "input_ids"], ["x0"])]
        added = [
            self._looked_up(nodes, table, name)
            for name, table in (("position_ids", "places"), ("task_id", "tasks"), ("token_type_ids", "places"))
            if name in self.inputs
        ]
        if "use_cache_branch" in self.inputs:
            nodes.append(helper.make_node("Cast", ["use_cache_branch"], ["branch"], to=TensorProto.FLOAT))
            nodes.append(helper.make_node("Mul", ["branch", "much"], ["branch.wrong"]))
            added.append("branch.wrong")
        for layer in range(self.past[0] if self.past else 0):
            assert self.past is not None
            for name in (f"past_key_values.{layer}.{kind}" for kind in ("key", "value")):
                axes = ["batch_size", self.past[1], "past_sequence_length", self.past[2]]
                ports.append(helper.make_tensor_value_info(name, flat, axes))
                added.append(self._length_of(nodes, name))
        last = "x0"
        for at, name in enumerate(added):
            nodes.append(helper.make_node("Add", [last, name], [f"x{at + 1}"]))
            last = f"x{at + 1}"
        nodes.append(helper.make_node("MatMul", [last, "weight"], ["h"]))
        found = [self._output(nodes, name, flat) for name in self.outputs]
        constants = {
            "table": TABLE, "places": PLACES, "tasks": TASK_ROWS, "weight": WEIGHT, "much": np.float32(1000),
            "one": np.array([1]), "two": np.array([2]), "scale": np.float32(SCALE), "zero": np.uint8(ZERO),
        }  # fmt: skip
        weights = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
        graph = helper.make_graph(nodes, "foreign", ports, found, weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    def _looked_up(self, nodes: list[Any], table: str, name: str) -> str:
        nodes.append(helper.make_node("Gather", [table, name], [f"{name}.row"]))
        return f"{name}.row"

    def _length_of(self, nodes: list[Any], name: str) -> str:
        """1000 · tokens of a past: 0 if it is empty."""
        nodes.append(helper.make_node("Shape", [name], [f"{name}.shape"]))
        nodes.append(helper.make_node("Gather", [f"{name}.shape", "two"], [f"{name}.many"]))
        nodes.append(helper.make_node("Cast", [f"{name}.many"], [f"{name}.float"], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Mul", [f"{name}.float", "much"], [f"{name}.wrong"]))
        return f"{name}.wrong"

    def _output(self, nodes: list[Any], name: str, flat: int) -> Any:
        pooled = name in ("sentence_embedding", "sentence_embedding_quantized", "pooler_output", "embeddings")
        source = "h"
        if pooled:
            nodes.append(helper.make_node("Cast", ["attention_mask"], [f"{name}.mask"], to=TensorProto.FLOAT))
            nodes.append(helper.make_node("Unsqueeze", [f"{name}.mask", "two"], [f"{name}.column"]))
            nodes.append(helper.make_node("Mul", ["h", f"{name}.column"], [f"{name}.masked"]))
            nodes.append(helper.make_node("ReduceSum", [f"{name}.masked", "one"], [f"{name}.sum"], keepdims=0))
            nodes.append(helper.make_node("LpNormalization", [f"{name}.sum"], [f"{name}.unit"], axis=-1, p=2))
            source = f"{name}.unit" if "quantized" in name else f"{name}.sum"
        axes = [self.batch, DIM] if pooled else [self.batch, self.length, DIM]
        if "quantized" in name:
            nodes.append(helper.make_node("QuantizeLinear", [source, "scale", "zero"], [name]))
            return helper.make_tensor_value_info(name, TensorProto.UINT8, axes)
        nodes.append(helper.make_node("Cast", [source], [name], to=flat))
        return helper.make_tensor_value_info(name, flat, axes)

    def write(self, path: Path) -> Path:
        """The graph as a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        save(self.model(), path)
        return path


def hidden(rows: Sequence[Sequence[int]], task: int | None = None, places: int | None = None) -> list[Array]:
    """Hidden states of each row by itself; ``places`` is the first token's position where positions are looked up."""
    found = []
    for row in rows:
        x = TABLE[list(row)].astype(np.float64)
        if places is not None:
            x = x + PLACES[places : places + len(row)]
        if task is not None:
            x = x + TASK_ROWS[task]
        found.append(x @ WEIGHT)
    return found


def means(rows: Sequence[Sequence[int]], task: int | None = None, places: int | None = None) -> Array:
    """Unit vectors [N, DIM] by the mean."""
    vectors = np.stack([one.mean(axis=0) for one in hidden(rows, task, places)])
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def repository(folder: Path, name: str = "bert-mean", leave: Sequence[str] = ()) -> Path:
    """A folder with a fixture's configs, as others publish them, without any graph."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in (one for one in CONFIGS if one not in leave):
        source = FIXTURES / name / file
        if source.is_dir():
            shutil.copytree(source, folder / file)
        elif source.is_file():
            shutil.copy(source, folder / file)
    return folder
