"""The files of a model folder that are not graphs: tokenizer, configs, pooling, in every reader's schema."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from featherbed.errors import TokenizerError
from featherbed.folder import dump, write_text
from featherbed.spec import Pooling, Spec, read_json

COPIED = ("config.json", "special_tokens_map.json", "vocab.txt")
MODULE = "sentence_transformers.models"
OLD_MODES = {
    "pooling_mode_cls_token": Pooling.CLS,
    "pooling_mode_mean_tokens": Pooling.MEAN,
    "pooling_mode_max_tokens": None,
    "pooling_mode_mean_sqrt_len_tokens": None,
    "pooling_mode_weightedmean_tokens": None,
    "pooling_mode_lasttoken": Pooling.LAST,
}


def write_configs(source: Path, out: Path, spec: Spec, append_eos: bool = False) -> None:
    """Everything beside the graphs that sentence-transformers, Optimum, fastembed and we read.

    tokenizer.json loses the padding and truncation some checkpoints left in it (MiniLM's pads all to 128), and
    with ``append_eos`` gets the end token that the model wants and the tokenizer does not add by itself.
    """
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    config = read_json(source / "config.json")
    special = {"pad_token_id": spec.pad_id} | ({} if spec.eos_id is None else {"eos_token_id": spec.eos_id})
    _write(out / "config.json", {**config, **special})
    tokenizer = read_json(source / "tokenizer.json")
    if append_eos or tokenizer.get("padding") or tokenizer.get("truncation"):
        changed = {**tokenizer, "padding": None, "truncation": None}
        if append_eos and spec.eos_id is not None:
            changed["post_processor"] = ending(tokenizer, spec.eos_id)
        write_text(out / "tokenizer.json", json.dumps(changed, ensure_ascii=False))
    else:
        shutil.copyfile(source / "tokenizer.json", out / "tokenizer.json")
    path = source / "tokenizer_config.json"
    tokens = read_json(path) if path.is_file() else {"tokenizer_class": "PreTrainedTokenizerFast"}
    tokens.pop("auto_map", None)  # names code that nobody of ours runs
    pad = token_of(tokenizer, spec.pad_id) or tokens.get("pad_token")
    _write(
        out / "tokenizer_config.json",
        {**tokens, "model_max_length": spec.max_length, "padding_side": "right", "pad_token": pad},
    )
    if not (out / "special_tokens_map.json").is_file():  # fastembed reads it
        keys = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
        named = {**tokens, "pad_token": pad}
        _write(out / "special_tokens_map.json", {k: named[k] for k in keys if named.get(k) is not None})
    dense = [(name, "Dense") for name in spec.dense]  # last_hidden_state is what comes before them
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), *dense, (f"{2 + len(dense)}_Normalize", "Normalize")]
    _write(
        out / "modules.json",
        [{"idx": i, "name": str(i), "path": p, "type": f"{MODULE}.{m}"} for i, (p, m) in enumerate(modules)],
    )
    for name in spec.dense:
        (out / name).mkdir()
        for file in ("config.json", "model.safetensors"):
            shutil.copyfile(source / name / file, out / name / file)
    (out / "1_Pooling").mkdir()
    _write(
        out / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": spec.hidden_width,
            **{key: mode is spec.pooling for key, mode in OLD_MODES.items()},
            "pooling_mode": spec.pooling.value,
            "include_prompt": True,
        },
    )
    _write(out / "sentence_bert_config.json", {"max_seq_length": spec.max_length, "do_lower_case": False})
    _write(
        out / "config_sentence_transformers.json",
        {
            "prompts": spec.prompts,
            "default_prompt_name": spec.default_prompt_name,
            "similarity_fn_name": "cosine",
        },
    )


def ending(tokenizer: dict[str, Any], eos_id: int) -> dict[str, Any]:
    """The tokenizer's post-processor, followed by one that appends the end token."""
    name = token_of(tokenizer, eos_id)
    if name is None:
        raise TokenizerError(
            "tokenizer.json",
            expected=f"the end token {eos_id} among added_tokens",
            found="none of that id",
            remedy="use the tokenizer.json that belongs to the weights",
        )

    def piece(kind: str, number: int) -> dict[str, Any]:
        return {"Sequence": {"id": kind, "type_id": number}}

    def end(number: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": number}}

    template = {
        "type": "TemplateProcessing",
        "single": [piece("A", 0), end(0)],
        "pair": [piece("A", 0), piece("B", 1), end(1)],
        "special_tokens": {name: {"id": name, "ids": [eos_id], "tokens": [name]}},
    }
    before = tokenizer.get("post_processor")
    return {"type": "Sequence", "processors": [before, template]} if before else template


def token_of(tokenizer: dict[str, Any], number: int) -> str | None:
    """The added token of this id."""
    return next((str(t["content"]) for t in tokenizer.get("added_tokens") or () if t["id"] == number), None)


def _write(path: Path, value: object) -> None:
    write_text(path, dump(value))
