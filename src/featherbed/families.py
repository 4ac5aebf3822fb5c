"""What models of a family have in common that their files need not say, and how their config.json says the rest."""

from __future__ import annotations

from typing import Any

from featherbed.errors import SpecError
from featherbed.values import integer

FAMILIES = (
    "bert", "xlm-roberta", "roberta", "camembert", "mpnet", "nomic_bert", "modernbert", "gemma3_text", "qwen3", "qwen2",
)  # fmt: skip
TYPED = ("bert", "nomic_bert")  # whose graphs take token types
BEHIND_PAD = ("xlm-roberta", "roberta", "camembert", "mpnet")  # whose positions begin behind the pad id
PUBLISHED_KEYS = {  # what some config.json files say (nomic_bert's as it was published), and what others call it
    "n_embd": "hidden_size",
    "dim": "hidden_size",
    "d_model": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "layer_norm_epsilon": "layer_norm_eps",
}

NORM_BEFORE_CUT = ("nomic_bert",)  # whose shorter vectors were trained behind a layer norm
PROMPTS = {"nomic_bert": {"query": "search_query: ", "document": "search_document: "}}


def renamed(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with the keys of PUBLISHED_KEYS under the names that most use."""
    old = {new: config[key] for key, new in PUBLISHED_KEYS.items() if key in config}
    return {**old, **config}


def first_position(config: dict[str, Any]) -> int:
    """The row of the position table that a text's first token takes. Raises SpecError on a pad id that is none."""
    if config.get("model_type") not in BEHIND_PAD:
        return 0
    pad = config.get("pad_token_id", 1)
    if not isinstance(pad, int) or isinstance(pad, bool) or pad < 0:
        raise SpecError(
            "config.json, key 'pad_token_id'",
            expected="a token's id, behind which positions begin",
            found=repr(pad),
            remedy="use the config.json that belongs to the weights",
        )
    return pad + 1 if config["model_type"] != "mpnet" else 2  # upstream's MPNet has the number in its code


def longest(config: dict[str, Any]) -> int:
    """The most tokens that config.json has positions for. Rotary ones have no end: Nomic's n_positions has the say."""
    rows = integer(config, "n_positions" if "n_positions" in config else "max_position_embeddings")
    if rows <= first_position(config):
        raise SpecError(
            "config.json, key 'max_position_embeddings'",
            expected=f"more than {first_position(config)}, where positions begin",
            found=str(rows),
            remedy="use the config.json that belongs to the weights",
        )
    return rows - first_position(config)
