"""A Hub id wherever a folder is taken: ready variants are used as they are, a plain checkpoint is built once."""

from __future__ import annotations

from pathlib import Path

from featherbed.choice import AUTO
from featherbed.folder import MANIFEST, open_folder
from featherbed.hub.client import default_root
from featherbed.hub.links import leads_out, unlinked
from featherbed.hub.names import hub_id
from featherbed.hub.store import MODEL_FOLDER, Store
from featherbed.pipeline.pull import commit_of, fetched
from featherbed.progress import Progress, silent
from featherbed.run import embedder
from featherbed.run.foreign import Foreign
from featherbed.run.session import Memory


def ready(source: Path | str, variant: str = AUTO, progress: Progress = silent) -> tuple[Path | str, str]:
    """(model folder, variant) of a folder or .onnx file, or of a Hub id.

    A folder is left as it is, but for one whose sidecars are links that onnxruntime refuses (``unlinked``). An id
    with ready variants is fetched, and "auto" is what it means among all that are published; of a checkpoint, fp32 and
    the variant that is asked for are built in the cache, and verified. Raises as ``pull`` and ``build``.
    """
    wanted = hub_id(source)
    if wanted is None:
        if (Path(source) / MANIFEST).is_file() and leads_out(model := open_folder(Path(source))):
            return unlinked(Store(default_root()), model), variant
        return source, variant
    store = Store(default_root())
    commit, failed = commit_of(store, wanted)
    record = fetched(store, wanted, commit, failed, [variant], progress)
    if record.kind == MODEL_FOLDER:
        return store.folder(wanted.name, commit), record.auto if variant == AUTO else variant
    from featherbed.pipeline.built import built  # here: whoever only runs a model needs nothing that makes one

    return built(store, record, variant, progress), variant


class Embedder(embedder.Embedder):
    """Turns texts into vectors with one variant of a model folder, of a Hub id, or with a bare .onnx file.

    Safe to use from many threads at once: they share one session.
    """

    def __init__(
        self,
        model: str | Path,
        variant: str = AUTO,
        *,
        threads: int | None = None,
        pool_size: int | None = None,
        provider: str = "auto",
        batch_tokens: int | None = None,
        memory: Memory | None = None,
        foreign: Foreign | None = None,
        progress: Progress = silent,
    ) -> None:
        """Open ``model``: a model folder, a Hub id ``owner/name[@revision]``, a folder of others, or an .onnx file.

        Of an id, what is needed is fetched once; a checkpoint without variants is built once, which takes minutes, and
        ``progress`` is told. The other arguments, and what is raised, are of ``featherbed.run.embedder.Embedder``; of
        an id, HubError too.
        """
        folder, variant = ready(model, variant, progress)
        super().__init__(
            folder,
            variant,
            threads=threads,
            pool_size=pool_size,
            provider=provider,
            batch_tokens=batch_tokens,
            memory=memory,
            foreign=foreign,
        )
