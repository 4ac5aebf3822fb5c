"""BERT encoders (MiniLM, bge, e5): learned positions, token types.

Function: transformers' BertModel on the same ids and mask, right padding; for any other padding, what
BertModel gives for the same tokens padded right.
"""

from __future__ import annotations

from featherbed.make.checkpoint import Checkpoint
from featherbed.make.graph.encoder import Encoder, check_encoder
from featherbed.make.ir import Graph
from featherbed.spec import Spec, integer


def build(checkpoint: Checkpoint, spec: Spec) -> Graph:
    """The reference graph of a bert checkpoint.

    Raises CheckpointError when a tensor is missing or of another shape, UnknownArchitectureError on settings
    that are not built here.
    """
    check_encoder(checkpoint)
    made = Encoder(checkpoint, spec, "bert.")
    words, placed = made.words(), made.positions(0)
    kinds = integer(checkpoint.config, "type_vocab_size", 2)
    types = made.b.weight(made.weight("embeddings.token_type_embeddings.weight", kinds, made.width))
    typed = made.b.node("Gather", types, made.aligned.move("token_type_ids"), attributes={"axis": 0})
    return made.finish(made.start(words, typed, placed), token_types=True)
