"""RoBERTa's encoders (XLM-R and the multilingual models on it, CamemBERT): BERT, positions begin behind the pad id.

Function: transformers' XLMRobertaModel, RobertaModel or CamembertModel on the same tokens padded right. Token types
are no input: all are of the first type, whose row is added.
"""

from __future__ import annotations

from featherbed.families import first_position
from featherbed.make.checkpoint import Checkpoint
from featherbed.make.graph.encoder import Encoder, check_encoder
from featherbed.make.ir import Graph
from featherbed.spec import Spec
from featherbed.values import integer


def build(checkpoint: Checkpoint, spec: Spec) -> Graph:
    """The reference graph of an xlm-roberta, roberta or camembert checkpoint.

    Raises CheckpointError when a tensor is missing or of another shape, UnknownArchitectureError on settings
    that are not built here.
    """
    check_encoder(checkpoint)
    made = Encoder(checkpoint, spec, "roberta.")
    words, placed = made.words(), made.positions(first_position(checkpoint.config))
    kinds = integer(checkpoint.config, "type_vocab_size", 2)
    types = made.b.weight(made.weight("embeddings.token_type_embeddings.weight", kinds, made.width))
    typed = made.b.node("Gather", types, made.b.const([0]), attributes={"axis": 0})  # [1, D]
    return made.finish(made.start(words, typed, placed))
