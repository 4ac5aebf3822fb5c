"""A variant as mteb's model object (mteb itself is no dependency of ours: it brings torch).

mteb.evaluate(MtebModel("folder", "int8"), mteb.get_tasks(["STSBenchmark"]))
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featherbed.check.parity import cosines
from featherbed.errors import MissingError
from featherbed.folder import open_folder
from featherbed.run.embedder import Embedder

Vectors = npt.NDArray[np.float32]
QUERY, DOCUMENT = "query", "document"  # of mteb's PromptType


class MtebModel:
    """mteb's EncoderProtocol. Queries and documents get the folder's own prompts, other texts its default one."""

    def __init__(self, folder: str | Path, variant: str = "auto") -> None:
        """Open a model folder. Raises as Embedder."""
        self._folder = open_folder(Path(folder))
        self._embedder = Embedder(folder, variant)

    def encode(
        self,
        inputs: Iterable[Mapping[str, Sequence[str]]],
        *,
        task_metadata: object,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        batch_size: int | None = None,
        show_progress_bar: bool = False,
    ) -> Vectors:
        """Vectors [N, D] of all batches' texts, in order.

        The protocol also says which task it is, and how large batches should be: the engine chooses its own.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        asked = getattr(prompt_type, "value", prompt_type)
        if asked == QUERY:
            return self._embedder.encode_query(texts)
        return self._embedder.encode_document(texts) if asked == DOCUMENT else self._embedder.encode(texts)

    def similarity(self, embeddings1: Vectors, embeddings2: Vectors) -> Vectors:
        """Cosines [N, M]."""
        return self._embedder.similarity(np.asarray(embeddings1), np.asarray(embeddings2))

    def similarity_pairwise(self, embeddings1: Vectors, embeddings2: Vectors) -> npt.NDArray[np.float64]:
        """Cosines [N] of rows."""
        return cosines(np.atleast_2d(np.asarray(embeddings1)), np.atleast_2d(np.asarray(embeddings2)))

    @property
    def mteb_model_meta(self) -> Any:
        """mteb's ModelMeta: which folder, variant and file the results belong to. Raises MissingError without mteb."""
        try:
            from mteb.models.model_meta import ModelMeta, ScoringFunction  # not one of our extras: it brings torch
        except ModuleNotFoundError as error:
            raise MissingError(
                "mteb_model_meta", expected="the library mteb", found="none", remedy="pip install mteb"
            ) from error
        m, variant = self._folder.manifest, self._embedder.variant
        return ModelMeta(
            loader=None,
            name=f"featherbed/{m.name}-{variant}",
            revision=m.files[m.variants[variant].files[-1]].sha256[:40],
            release_date=None,
            languages=None,
            n_parameters=None,
            memory_usage_mb=None,
            max_tokens=m.spec.max_length,
            embed_dim=m.spec.dim,
            license=None,
            open_weights=True,
            public_training_code=None,
            public_training_data=None,
            framework=["ONNX"],
            similarity_fn_name=ScoringFunction.COSINE,
            use_instructions=any(m.spec.prompts.values()),
            training_datasets=None,
            adapted_from=m.origin.base_model or None,
        )
