"""Dense modules behind the pooling, in numpy: for vectors that are not normalised, and for files that do not pool.

Our graphs have them inside ``sentence_embedding``. The weights are those that lie in the model's folder for
sentence-transformers, read where they lie.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from featherbed.errors import ModelFolderError
from featherbed.modules import Dense, dense_modules

WEIGHTS = "model.safetensors"
TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Layer:
    """weight [M, K] and bias [M] or None, and whether a tanh follows."""

    weight: Vectors
    bias: Vectors | None
    tanh: bool


def read_layers(folder: Path) -> tuple[Layer, ...]:
    """The Dense modules that modules.json of ``folder`` names, in their order.

    Raises ModelFolderError when their weights are missing or not what config.json says.
    """
    return tuple(_layer(folder / module.folder / WEIGHTS, module) for module in dense_modules(folder))


def through(layers: tuple[Layer, ...], vectors: Vectors) -> Vectors:
    """Pooled vectors [B, K] → [B, M]."""
    for layer in layers:
        vectors = np.asarray(vectors @ layer.weight.T, np.float32)
        vectors = vectors if layer.bias is None else vectors + layer.bias
        vectors = np.tanh(vectors) if layer.tanh else vectors
    return vectors


def _layer(path: Path, module: Dense) -> Layer:
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(size, 2**20)))
        weight = _tensor(path, header["linear.weight"], 8 + size, (module.outputs, module.inputs))
        bias = _tensor(path, header["linear.bias"], 8 + size, (module.outputs,)) if module.bias else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelFolderError(
            f"{path}",
            expected=f"the weights of a Dense module from {module.inputs} to {module.outputs} numbers",
            found=f"{type(error).__name__}: {error}" if path.is_file() else "no such file",
            remedy="fetch the folder again, whole",
        ) from error
    return Layer(weight, bias, module.tanh)


def _tensor(path: Path, entry: dict[str, object], base: int, shape: tuple[int, ...]) -> Vectors:
    dtype, offsets = TYPES.get(str(entry["dtype"])), entry["data_offsets"]
    if dtype is None or entry["shape"] != list(shape) or not isinstance(offsets, list):
        raise ValueError(f"{entry['dtype']} of shape {entry['shape']}")
    values = np.fromfile(path, dtype, int(np.prod(shape)), offset=base + int(offsets[0])).reshape(shape)
    if dtype == TYPES["BF16"]:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return np.asarray(values, np.float32)
