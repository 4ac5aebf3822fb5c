"""A checkpoint's reference graph: from a family's builder, or through torch where there is none."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from featherbed.errors import MissingError
from featherbed.families import FAMILIES
from featherbed.make.checkpoint import Checkpoint
from featherbed.make.graph import reference_graph
from featherbed.make.ir import Graph
from featherbed.spec import Spec

LOG = logging.getLogger("featherbed")


@contextmanager
def opened(checkpoint: Checkpoint, spec: Spec) -> Iterator[Graph]:
    """The reference graph, its weights readable until the block ends.

    Raises CheckpointError, UnknownArchitectureError, or MissingError without torch where no family fits.
    """
    if spec.family in FAMILIES:
        yield reference_graph(checkpoint, spec)
        return
    try:
        from featherbed.make.export import exported  # the other way to torch: an extra
    except MissingError as error:
        raise MissingError(
            f"model_type {spec.family!r} in {checkpoint.folder / 'config.json'}",
            expected=error.expected,
            found=error.found,
            remedy=error.remedy,
        ) from error
    LOG.warning("model_type %r is none of the families built here: it is exported through torch", spec.family)
    with tempfile.TemporaryDirectory(prefix="featherbed-export-") as place:
        yield exported(checkpoint, spec, Path(place))


def torch_only(spec: Spec) -> bool:
    """Whether a graph of this spec came through torch: then it is held against torch's own vectors."""
    return spec.family not in FAMILIES
