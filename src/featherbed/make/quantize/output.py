"""The vector once more in u8, beside the float outputs: what indexes that keep bytes take as it is.

    code = clip(round(component / scale) + zero_point, 0, 255)
    component ≈ (code − zero_point) · scale

One scale and zero point a model, of what its components are on calibration texts: published files of this kind have
the same output, found so. Codes are no vector: cosines are of what they stand for.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from featherbed.make.ir import Graph, Node, Port, scalar
from featherbed.make.quantize.unsigned import grid
from featherbed.steps import QuantizedOutput

SENTENCE, CODES = "sentence_embedding", "sentence_embedding_quantized"


def chosen(step: QuantizedOutput, vectors: npt.NDArray[np.float32]) -> QuantizedOutput:
    """The step with the scale and zero point of these vectors [N, D]."""
    low, high = float(vectors.min()), float(vectors.max())
    more = step.margin * (high - low)
    scale, zero = grid(low - more, high + more)
    return replace(step, scale=float(scale), zero_point=int(zero))


def apply(graph: Graph, step: QuantizedOutput) -> Graph:
    """The graph with the output ``sentence_embedding_quantized`` behind the others."""
    scale = scalar(f"{CODES}.scale", step.scale, np.float32)
    zero = scalar(f"{CODES}.zero", step.zero_point, np.uint8)
    codes = Node("QuantizeLinear", (SENTENCE, scale.name, zero.name), (CODES,))
    axes = next(port.axes for port in graph.outputs if port.name == SENTENCE)
    outputs = (*graph.outputs, Port(CODES, np.dtype(np.uint8), axes))
    more = graph.replaced([*graph.nodes, codes], graph.weights | {scale.name: scale, zero.name: zero})
    return replace(more, outputs=outputs)
