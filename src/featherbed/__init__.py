"""featherbed: small, fast ONNX files of text-embedding models, each proven against the original.

The names below load their rooms on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featherbed.check.bench import bench
    from featherbed.check.card import card
    from featherbed.check.inspect import inspect
    from featherbed.errors import FeatherbedError
    from featherbed.pipeline.build import build
    from featherbed.pipeline.evaluate import evaluate
    from featherbed.pipeline.ready import Embedder
    from featherbed.pipeline.tune import tune
    from featherbed.pipeline.verify import verify

__version__ = "0.1.0"

_ROOMS = {
    "Embedder": "pipeline.ready",
    "FeatherbedError": "errors",
    "bench": "check.bench",
    "build": "pipeline.build",
    "card": "check.card",
    "evaluate": "pipeline.evaluate",
    "inspect": "check.inspect",
    "tune": "pipeline.tune",
    "verify": "pipeline.verify",
}

__all__ = [
    "Embedder", "FeatherbedError", "__version__", "bench", "build", "card", "evaluate", "inspect", "tune", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return getattr(importlib.import_module(f"featherbed.{_ROOMS[name]}"), name)
    raise AttributeError(f"module 'featherbed' has no attribute {name!r}")
