"""A graph that was written, once more in operators that an older onnxruntime has; weights go over as they are.

Attention and tables become operators of the standard. Products with weights in blocks stay: onnxruntime has them in
4 bits since 1.17, in 8 since 1.22; the standard's, which unpack the whole weight on every run, take five times as long
for one short text (docs/lab.md).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from featherbed.errors import FeatherbedError, ModelFolderError
from featherbed.folder import FileRecord
from featherbed.make.graph.standard import BLOCKS, standard
from featherbed.make.read import read_foreign
from featherbed.make.write import write_graph
from featherbed.recipe import recorded
from featherbed.steps import Standard

KEPT = (BLOCKS, "MatMulBnb4")
RECIPE = "featherbed.recipe"


def rewrite(source: Path, target: Path, metadata: dict[str, str]) -> dict[str, FileRecord]:
    """Write the graph at ``source`` to ``target`` in operators of the standard, and those of ``KEPT``.

    ``metadata`` is what ``source`` says of itself: its recipe gets the step. Weights are read from the file while they
    are written. Returns the record of each file by name. Raises ModelFolderError on a graph that cannot be read so,
    OptionError on an operator that nothing here writes, OutputError.
    """
    try:
        graph, _ = read_foreign(source)
    except Exception as error:  # protobuf's, onnx's and the file system's: they share no base
        raise ModelFolderError(
            f"{source}",
            expected="a graph that can be written again in standard operators",
            found=f"{type(error).__name__}: {error}",
            remedy="choose another variant, or build it anew with featherbed",
        ) from error
    return write_graph(standard(graph, KEPT), target, _with_step(metadata))


def _with_step(metadata: dict[str, str]) -> dict[str, str]:
    """Metadata whose recipe has the step; where it has none that we can read, as it was."""
    try:
        plain = json.loads(metadata[RECIPE])
        recipe = recorded(plain)
    except (KeyError, ValueError, TypeError, FeatherbedError):
        return metadata
    steps = (*(step for step in recipe.steps if not isinstance(step, Standard)), Standard(blocks=True))
    whole = {**plain, "steps": replace(recipe, steps=steps).to_json()["steps"]}
    return {**metadata, RECIPE: json.dumps(whole, sort_keys=True)}
