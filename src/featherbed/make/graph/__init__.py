"""Checkpoint → reference graph: one file a family."""

from __future__ import annotations

from featherbed.make.checkpoint import Checkpoint
from featherbed.make.graph import bert, dense, gemma3, modernbert, mpnet, nomic_bert, qwen3, roberta
from featherbed.make.ir import Graph
from featherbed.modules import dense_modules
from featherbed.spec import Spec

BUILDERS = {
    "bert": bert.build,
    "xlm-roberta": roberta.build,
    "roberta": roberta.build,
    "camembert": roberta.build,
    "mpnet": mpnet.build,
    "nomic_bert": nomic_bert.build,
    "modernbert": modernbert.build,
    "gemma3_text": gemma3.build,
    "qwen3": qwen3.build,
    "qwen2": qwen3.build,
}


def reference_graph(checkpoint: Checkpoint, spec: Spec) -> Graph:
    """The graph of upstream's function, weights still unread.

    Raises CheckpointError on missing or misshapen tensors, UnknownArchitectureError on unknown settings.
    """
    graph = BUILDERS[spec.family](checkpoint, spec)
    return dense.apply(graph, checkpoint, dense_modules(checkpoint.folder) if spec.dense else ())
