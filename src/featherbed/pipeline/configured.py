"""The Embedder that an indexer's settings mean."""

from __future__ import annotations

import logging
from pathlib import Path

from featherbed.choice import AUTO
from featherbed.errors import OptionError
from featherbed.folder import open_folder
from featherbed.pipeline.ready import ready
from featherbed.progress import Progress, silent
from featherbed.recipe import REFERENCE
from featherbed.run.apart import Files
from featherbed.run.embedder import Embedder
from featherbed.run.foreign import Foreign
from featherbed.settings import Embedding

LOG = logging.getLogger("featherbed")
TEXT_TOKENS = 128  # of a text in a batch of ``batch_size``: memory goes by tokens here, not by rows


def configured(
    settings: Embedding,
    variant: str = "",
    *,
    threads: int | None = None,
    provider: str = "auto",
    foreign: Foreign | None = None,
    progress: Progress = silent,
) -> Embedder:
    """Open what the settings name: the file of ``quantized_model_path``, or else ``model`` in ``variant`` or FP32.

    ``foreign`` says what files of others leave open.

    Raises OptionError when they name neither, ModelFolderError and TokenizerError on a path that cannot be read, and as
    ``featherbed.Embedder``.
    """
    model, chosen = _located(settings, variant, progress)
    return Embedder(
        model,
        chosen,
        threads=threads,
        pool_size=settings.pool_size,
        provider=provider,
        batch_tokens=settings.batch_size * TEXT_TOKENS if settings.batch_size else None,
        foreign=foreign,
    )


def _located(settings: Embedding, variant: str, progress: Progress) -> tuple[str | Path | Files, str]:
    apart = settings.tokenizer_path or settings.tokenizer_config_path
    if settings.quantized_model_path is not None:
        if settings.model is not None:
            used = settings.quantized_model_path
            LOG.warning("model %s is ignored: quantized_model_path %s is used", settings.model, used)
        return _files(settings, settings.quantized_model_path), AUTO
    if settings.model is None:
        raise OptionError(
            "model",
            expected="model or quantized_model_path in [embedding]",
            found="neither",
            remedy="name one, in featherbed.toml, in FEATHERBED_MODEL or with --model",
        )
    if settings.model.endswith(".onnx"):
        return _files(settings, Path(settings.model)), AUTO
    model, chosen = ready(settings.model, variant or REFERENCE, progress)
    if apart:
        return _files(settings, open_folder(Path(model)).graph_path(chosen)), AUTO
    return model, chosen


def _files(settings: Embedding, graph: Path) -> Files:
    files = Files(graph, settings.tokenizer_path, settings.tokenizer_config_path)
    files.check()
    return files
