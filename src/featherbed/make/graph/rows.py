"""Rows of a table in codes, looked up and multiplied by their scales: operators of the standard only.

Codes are looked up first and become float behind that, so the table stays in its bits, on the disk and in memory. They
lie in stretches of columns that share a scale: a product stretches it over them, which no other way does as fast.
"""

from __future__ import annotations

import math

import numpy as np

from featherbed.make.graph.pen import Pen


def stretch(width: int, block: int) -> int:
    """How many columns the equal pieces of a row have, each under one scale: a block, where blocks fit into it."""
    return math.gcd(width, min(width, block))


def scaled(pen: Pen, codes: str, scales: str, shape: tuple[int, int], out: str) -> None:
    """Codes [B, T, stretches, stretch], zero points taken off, times scales [B, T, blocks, 1] → ``out`` [B, T, width].

    Codes are floats by now, and ``shape`` is width and block. Where blocks do not fit into a row, a stretch is shorter
    than a block.
    """
    width, block = shape
    size = stretch(width, block)
    if size < min(width, block):
        scales = pen.node("Gather", scales, pen.const(np.arange(0, width, size) // block), attributes={"axis": 2})
    pen.node("Reshape", pen.node("Mul", codes, scales), pen.const([0, 0, width]), out=out)
