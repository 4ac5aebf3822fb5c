"""Plant outliers in a checkpoint without changing what it computes: what large models have, in a small one.

    python benchmarks/plant.py CHECKPOINT OUT --factor 30 --where norms down values

Some channels grow by the factor where they are made and shrink by it where they are read, so that float32 vectors
stay the same up to rounding; whoever rounds weights or activations to integers meets the outliers. Every other file
is copied: a config.json that says bfloat16 still does, of weights that are float32 now.

norms   (qwen3)        gains of the norms before attention and MLP; columns of the linear layers that read them
down    (qwen3)        rows of up_proj; columns of down_proj, whose input then has outliers
values  (qwen3, bert)  rows of the value projection; columns of the output projection
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featherbed.make.checkpoint import SINGLE, Checkpoint, open_checkpoint
from featherbed.spec import integer

Places = npt.NDArray[np.int64]
Block = npt.NDArray[np.float32]

SEED = 20261122
CHANNELS = 4  # of a norm, of an MLP, of an attention
WHERE = ("norms", "down", "values")
# a buffer of old BERT checkpoints: 0, 1, 2 …, integers that no runtime reads
UNREAD = ("embeddings.position_ids", "bert.embeddings.position_ids")
NOT_IN_BERT = {
    "norms": "the residual sum reads a norm's output as well, and cannot be divided",
    "down": "GELU stands between the two linear layers, and k · GELU(x) is not GELU(k · x)",
}


@dataclass(frozen=True)
class Scale:
    """Places along one axis of a tensor, multiplied by ``by``."""

    tensor: str
    axis: int  # 0: rows, outputs of a linear layer; 1: columns, its inputs
    places: Places
    by: float


def scales(checkpoint: Checkpoint, where: Sequence[str], factor: float) -> list[Scale]:
    """Everything to multiply. Each place has draws of its own, whatever else is planted.

    Raises SystemExit where the function would change.
    """
    config, family = checkpoint.config, checkpoint.config.get("model_type")
    if family not in ("qwen3", "bert"):
        raise SystemExit(f"plant: expected model_type qwen3 or bert in config.json, found {family!r}")
    for name in where:
        if family == "bert" and name in NOT_IN_BERT:
            raise SystemExit(f"plant: {name} cannot be planted in a bert checkpoint: {NOT_IN_BERT[name]}; try values")
    found: list[Scale] = []
    for name in dict.fromkeys(where):
        rng = np.random.default_rng([SEED, WHERE.index(name)])
        for layer in range(integer(config, "num_hidden_layers")):
            found += list(_at_layer(checkpoint, name, layer, factor, rng))
    return found


def _at_layer(
    checkpoint: Checkpoint, where: str, layer: int, factor: float, rng: np.random.Generator
) -> Iterator[Scale]:
    config = checkpoint.config
    qwen3 = config["model_type"] == "qwen3"
    width, heads = integer(config, "hidden_size"), integer(config, "num_attention_heads")
    root = _root(checkpoint, "model." if qwen3 else "bert.")
    at = f"{root}layers.{layer}" if qwen3 else f"{root}encoder.layer.{layer}"
    if where == "norms":
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            places = _draw(rng, width)
            yield Scale(f"{at}.{norm}.weight", 0, places, factor)
            yield from (Scale(f"{at}.{reader}.weight", 1, places, 1 / factor) for reader in readers)
    elif where == "down":
        places = _draw(rng, integer(config, "intermediate_size"))
        yield Scale(f"{at}.mlp.up_proj.weight", 0, places, factor)
        yield Scale(f"{at}.mlp.down_proj.weight", 1, places, 1 / factor)
    else:
        size = integer(config, "head_dim", width // heads) if qwen3 else width // heads
        kv_heads = integer(config, "num_key_value_heads", heads) if qwen3 else heads
        value = f"{at}.self_attn.v_proj" if qwen3 else f"{at}.attention.self.value"
        out = f"{at}.self_attn.o_proj" if qwen3 else f"{at}.attention.output.dense"
        places = _draw(rng, kv_heads * size)
        yield Scale(f"{value}.weight", 0, places, factor)
        if checkpoint.has(f"{value}.bias"):
            yield Scale(f"{value}.bias", 0, places, factor)
        yield Scale(f"{out}.weight", 1, readers_of(places, heads, kv_heads, size), 1 / factor)


def _root(checkpoint: Checkpoint, root: str) -> str:
    return root if any(name.startswith(root) for name in checkpoint.entries) else ""


def _draw(rng: np.random.Generator, count: int) -> Places:
    return np.sort(rng.choice(count, CHANNELS, replace=False))


def readers_of(rows: Places, heads: int, kv_heads: int, size: int) -> Places:
    """Columns of the output projection that read these rows of the value projection.

    Query head q attends to the key-value head q // (heads / kv_heads): each row has as many readers.
    """
    shared = heads // kv_heads
    head, within = np.divmod(rows, size)
    queries = head[:, None] * shared + np.arange(shared)  # [rows, shared]
    return np.asarray((queries * size + within[:, None]).reshape(-1), np.int64)


def scaled(blocks: Iterator[Block], todo: Sequence[Scale], shape: tuple[int, ...]) -> Iterator[Block]:
    """Row blocks of a tensor with its scales applied; float64 in between, so that each number is rounded once."""
    by = [np.ones(shape[axis]) if axis < len(shape) else np.ones(1) for axis in (0, 1)]
    for one in todo:
        by[one.axis][one.places] *= one.by
    start = 0
    for block in blocks:
        rows = by[0][start : start + len(block)]
        start += len(block)
        whole = rows * block if block.ndim == 1 else rows[:, None] * block * by[1]
        yield np.ascontiguousarray(whole, np.float32)


def plant(source: Path, out: Path, where: Sequence[str], factor: float) -> None:
    """Write a copy of the checkpoint ``source``, in float32, with outliers. Raises SystemExit where that cannot be."""
    if out.exists() or out.resolve().is_relative_to(source.resolve()):
        raise SystemExit(f"plant: expected a new folder outside {source} to write, found {out}")
    if not (math.isfinite(factor) and factor > 0):
        raise SystemExit(f"plant: expected a factor above 0, found {factor}")
    checkpoint = open_checkpoint(source)
    if {entry.path.name for entry in checkpoint.entries.values()} != {SINGLE}:
        raise SystemExit(f"plant: expected all weights of {source} in {SINGLE}, found shards")
    todo = scales(checkpoint, where, factor)
    missing = [one.tensor for one in todo if not checkpoint.has(one.tensor)]
    if missing:
        raise SystemExit(f"plant: expected {missing[0]} among the tensors of {source}, found no such tensor")
    shutil.copytree(source, out, ignore=lambda at, _: [SINGLE] if Path(at) == source else [])
    write(checkpoint, todo, out / SINGLE)


def write(checkpoint: Checkpoint, todo: Sequence[Scale], path: Path) -> None:
    """All tensors as float32 safetensors, a few rows in memory at a time."""
    names = [name for name in checkpoint.entries if name not in UNREAD]
    weights = [checkpoint.weight(name, checkpoint.entries[name].shape) for name in names]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers has refused files that do not say it
    offset = 0
    for weight in weights:
        header[weight.name] = {
            "dtype": "F32", "shape": weight.shape, "data_offsets": [offset, offset + weight.size_bytes],
        }  # fmt: skip
        offset += weight.size_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for weight in weights:
            mine = [one for one in todo if one.tensor == weight.name]
            for block in scaled(weight.read(), mine, weight.shape):
                file.write(block.tobytes())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help=f"a folder with {SINGLE}")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--factor", type=float, required=True, help="how large: 30, 100")
    parser.add_argument("--where", nargs="+", choices=WHERE, required=True)
    options = parser.parse_args()
    plant(options.checkpoint, options.out, options.where, options.factor)


if __name__ == "__main__":
    main()
