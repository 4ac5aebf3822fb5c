"""modules.json: what sentence-transformers does after the transformer. Pooling, Dense layers, normalisation."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from featherbed.errors import SpecError, UnknownArchitectureError
from featherbed.values import integer, read_json

FILE = "modules.json"
FOLDER = re.compile(r"\d+_Dense")
IDENTITY, TANH = "Identity", "Tanh"
# config keys of a Dense module that say more than a product and a bias, and the only value built here
PLAIN = {"use_residual": False, "module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}


@dataclass(frozen=True)
class Dense:
    """A linear layer on pooled vectors: its folder, its sizes, whether it has a bias and ends in a tanh."""

    folder: str
    inputs: int
    outputs: int
    bias: bool
    tanh: bool


def modules_in(folder: Path, any_behind: bool = False) -> list[tuple[str, str]]:
    """(kind, path) of each module; none where there is no modules.json.

    ``any_behind`` lets every module follow the pooling: a graph of others may have computed it. Raises SpecError when
    it cannot be read, UnknownArchitectureError on other modules or another order.
    """
    path = folder / FILE
    if not path.is_file():
        return []
    try:
        listed = json.loads(path.read_text("utf-8"))
        modules = [(str(m["type"]).rpartition(".")[2], str(dict(m).get("path", ""))) for m in listed]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SpecError(
            f"{path}", expected="a list of modules", found=str(error), remedy="fetch the file again"
        ) from error
    kinds = " ".join(kind for kind, _ in modules)
    behind = r"( \w+)*" if any_behind else "( Dense)*( Normalize)?"
    if not re.fullmatch(f"Transformer Pooling{behind}", kinds):
        raise UnknownArchitectureError(
            f"{path}",
            expected="the modules Transformer, Pooling, perhaps Dense and perhaps Normalize, in this order",
            found=kinds.replace(" ", ", ") or "none",
            remedy="open an issue that names the model",
        )
    return modules


def dense_modules(folder: Path) -> tuple[Dense, ...]:
    """The Dense modules of a checkpoint or model folder, in the order in which they are applied.

    Raises SpecError when they do not fit together, UnknownArchitectureError on one that is more than a product, a
    bias and a tanh.
    """
    found = tuple(_dense(folder, path) for kind, path in modules_in(folder) if kind == "Dense")
    for one, following in pairwise(found):
        if one.outputs != following.inputs:
            raise SpecError(
                f"{folder / following.folder / 'config.json'}, key 'in_features'",
                expected=f"{one.outputs}, what {one.folder} gives",
                found=str(following.inputs),
                remedy="fetch both folders again",
            )
    return found


def _dense(folder: Path, name: str) -> Dense:
    if not FOLDER.fullmatch(name):
        raise SpecError(
            f"{folder / FILE}",
            expected="a Dense module in a folder called as 2_Dense",
            found=repr(name),
            remedy="rename it, in the file and on disk",
        )
    path = folder / name / "config.json"
    config = read_json(path)
    act = str(config.get("activation_function", TANH)).rpartition(".")[2]
    odd = [f"{key} {config[key]!r}" for key, plain in PLAIN.items() if config.get(key) not in (None, plain)]
    if act not in (IDENTITY, TANH):
        odd.append(f"activation_function {act}")
    if odd:
        raise UnknownArchitectureError(
            f"{path}",
            expected="a product, perhaps a bias, and Identity or Tanh",
            found=", ".join(odd),
            remedy="open an issue that names the model",
        )
    inputs, outputs = integer(config, "in_features"), integer(config, "out_features")
    return Dense(name, inputs, outputs, bool(config.get("bias", True)), act == TANH)
