"""MPNet encoders (all-mpnet-base-v2): positions behind the pad id, scores biased by how far apart tokens are.

Function: transformers' MPNetModel on the same tokens padded right.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from featherbed.errors import UnknownArchitectureError
from featherbed.families import first_position
from featherbed.make.checkpoint import Checkpoint
from featherbed.make.graph.encoder import Encoder, Names, check_encoder
from featherbed.make.ir import Array, Graph, Weight
from featherbed.spec import Spec

NAMES = Names(("attention.attn.q", "attention.attn.k", "attention.attn.v"), "attention.attn.o", "attention.LayerNorm")
BUCKETS, FARTHEST = 32, 128  # tokens that are farther apart are as far as these


def buckets(distances: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The bucket of each distance, key minus query: 16 for either side, 8 of them exact, the rest by its logarithm.

    In float32, as upstream: at powers of two the logarithm decides between two buckets.
    """
    side, exact = BUCKETS // 2, BUCKETS // 4
    far = np.abs(distances)
    logarithm = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(exact))
    scaled = logarithm / np.float32(math.log(FARTHEST / exact)) * np.float32(side - exact)
    rough = np.minimum(exact + scaled.astype(np.int64), side - 1)
    return np.where(far < exact, far, rough) + np.where(distances > 0, side, 0)


def build(checkpoint: Checkpoint, spec: Spec) -> Graph:
    """The reference graph of an mpnet checkpoint.

    Raises CheckpointError when a tensor is missing or of another shape, UnknownArchitectureError on settings
    that are not built here.
    """
    check_encoder(checkpoint)
    count = checkpoint.config.get("relative_attention_num_buckets", BUCKETS)
    if count != BUCKETS:
        raise UnknownArchitectureError(
            "config.json of an mpnet model",
            expected=f"relative_attention_num_buckets {BUCKETS}: upstream counts with {BUCKETS} whatever it says",
            found=repr(count),
            remedy="open an issue that names the model",
        )
    made = Encoder(checkpoint, spec, "mpnet.", NAMES)
    x = made.start(made.words(), made.positions(first_position(checkpoint.config)))
    return made.finish(x, _position_bias(made))


def _position_bias(made: Encoder) -> str:
    """[1, heads, T, T]: what each head adds to the score of two tokens; made once a run, for all layers."""
    b, positions = made.b, made.aligned.positions
    table = _by_distance(made.weight("encoder.relative_attention_bias.weight", BUCKETS, made.heads))
    keys, queries = (b.node("Unsqueeze", positions, b.const([axis])) for axis in (0, 1))
    apart = b.node("Clip", b.node("Sub", keys, queries), b.const(-FARTHEST), b.const(FARTHEST - 1))
    rows = b.node("Gather", b.weight(table), b.node("Add", apart, b.const(FARTHEST)), attributes={"axis": 0})
    by_head = b.node("Transpose", rows, attributes={"perm": (2, 0, 1)})
    return b.node("Unsqueeze", by_head, b.const([0]))


def _by_distance(bias: Weight) -> Weight:
    """[256, heads]: the rows of a table [32, heads] for every distance from −128 to 127, which is as far as 128.

    Its bytes are a multiple of 64, as those of all our float weights: onnxruntime 1.31 saves prepacked weights one
    behind the other, and its float kernel ends the process where they begin elsewhere.
    """
    at = buckets(np.arange(-FARTHEST, FARTHEST))

    def read() -> Iterator[Array]:
        yield bias.array()[at]

    return Weight(f"{bias.name}.by_distance", bias.dtype, (len(at), *bias.shape[1:]), read)
