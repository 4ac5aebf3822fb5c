"""What a runtime must know that the graph does not say: pooling, prompts, lengths, special ids.

Read from the files of a checkpoint or model folder, never typed. Files that disagree are an error that
names both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from featherbed.errors import OptionError, SpecError, TokenizerError, UnknownArchitectureError
from featherbed.families import FAMILIES, NORM_BEFORE_CUT, PROMPTS, TYPED, longest, renamed
from featherbed.modules import Dense, dense_modules, modules_in
from featherbed.values import integer as integer
from featherbed.values import number as number
from featherbed.values import read_json as read_json


class Pooling(StrEnum):
    """How hidden states become one vector. Values are sentence-transformers' words."""

    LAST = "lasttoken"
    MEAN = "mean"
    CLS = "cls"


OLD_KEYS = {
    "pooling_mode_lasttoken": Pooling.LAST,
    "pooling_mode_mean_tokens": Pooling.MEAN,
    "pooling_mode_cls_token": Pooling.CLS,
}
OTHER_OLD_KEYS = ("pooling_mode_max_tokens", "pooling_mode_mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens")
FAMILY_POOLING = {  # bert and modernbert are not here: MiniLM pools by mean, bge by CLS
    "qwen3": Pooling.LAST,
    "qwen2": Pooling.LAST,
    "mpnet": Pooling.MEAN,
    "nomic_bert": Pooling.MEAN,
    "gemma3_text": Pooling.MEAN,
}


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


# what the fields of a Spec may be, as JSON has them
SOUND: dict[str, Callable[[Any], bool]] = {
    "family": lambda value: isinstance(value, str),
    **dict.fromkeys(("dim", "vocab_size", "max_length"), lambda value: _whole(value, 1)),
    "pad_id": lambda value: _whole(value, 0),
    "eos_id": lambda value: value is None or _whole(value, 0),
    **dict.fromkeys(("token_types", "norm_before_cut"), lambda value: isinstance(value, bool)),
    "prompts": lambda value: isinstance(value, dict) and all(isinstance(text, str) for text in value.values()),
    "default_prompt_name": lambda value: value is None or isinstance(value, str),
    "dense": lambda value: isinstance(value, list | tuple) and all(isinstance(name, str) for name in value),
    "hidden_dim": lambda value: value is None or _whole(value, 1),
}


@dataclass(frozen=True)
class Spec:
    """The contract of one embedding model.

    ``dim`` is the vector's size, ``vocab_size`` the rows of the embedding table, ``max_length`` the most
    tokens a text may have, special tokens included. ``eos_id`` is the id every text must end with (None
    where the model wants none). ``prompts`` maps a prompt's name to the bytes put before a text.
    ``norm_before_cut`` says that a vector goes through a layer norm before components are cut off (Nomic's Matryoshka).
    ``dense`` are the folders of the Dense modules behind the pooling, and ``hidden_dim`` the size of hidden states
    where it is not ``dim``.
    """

    family: str
    dim: int
    vocab_size: int
    max_length: int
    pooling: Pooling
    pad_id: int
    eos_id: int | None
    token_types: bool
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    norm_before_cut: bool = False
    dense: tuple[str, ...] = ()
    hidden_dim: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values for the manifest; of Dense modules only where there are some."""
        return {key: value for key, value in asdict(self).items() if value or key not in ("dense", "hidden_dim")}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Spec:
        """The opposite of ``to_json``.

        Raises SpecError when a key is missing or unknown, or has a value of another kind.
        """
        try:
            for key, sound in SOUND.items():
                if key in values and not sound(values[key]):
                    raise ValueError(f"{key}: {values[key]!r}")
            dense = tuple(values.get("dense", ()))
            return cls(**{**values, "pooling": Pooling(values["pooling"]), "dense": dense})
        except (TypeError, KeyError, ValueError) as error:
            raise SpecError(
                "spec in the manifest",
                expected=f"sound values of the keys {', '.join(cls.__dataclass_fields__)}",
                found=str(error),
                remedy="build the folder again with this version",
            ) from error

    @property
    def hidden_width(self) -> int:
        """The size of a hidden state."""
        return self.hidden_dim or self.dim

    @property
    def max_batch_tokens_hint(self) -> int:
        """Tokens a run should hold so that the widest activations stay near the caches."""
        return 2048 if self.dim <= 512 else 1024


def read_spec(folder: Path, pooling: str | None = None, any_family: bool = False) -> Spec:
    """The spec of a checkpoint folder in sentence-transformers' or transformers' layout.

    ``pooling`` decides where the files are silent; where they speak it must agree.
    ``any_family`` reads checkpoints of all architectures, for those who need no builder of ours.
    Raises SpecError when files are silent or disagree, TokenizerError without a tokenizer.json,
    UnknownArchitectureError for a family that is not built here.
    """
    config = read_json(folder / "config.json")
    family = config.get("model_type")
    if family not in FAMILIES and not (any_family and isinstance(family, str) and family):
        raise UnknownArchitectureError(
            f"model_type in {folder / 'config.json'}",
            expected=f"one of {', '.join(FAMILIES)}",
            found=repr(family),
            remedy="choose a model of these families",
        )
    check_modules(folder)
    return spec_of(folder, config, pooling, dense_modules(folder))


def spec_of(folder: Path, config: dict[str, Any], pooling: str | None, dense: tuple[Dense, ...] = ()) -> Spec:
    """The spec of a folder with this config.json, of whatever family, and these Dense modules.

    Raises as ``read_spec``.
    """
    family = str(config.get("model_type"))
    tokens = _optional(folder / "tokenizer_config.json")
    if not (folder / "tokenizer.json").is_file():
        raise TokenizerError(
            f"{folder}",
            expected="tokenizer.json",
            found="none",
            remedy="fetch it, or save it with transformers' AutoTokenizer(...).save_pretrained",
        )
    tokenizer = read_json(folder / "tokenizer.json", TokenizerError)
    sentence = _optional(folder / "config_sentence_transformers.json")
    pad, eos = _special_ids(config, tokens, tokenizer)
    found = _pooling(folder, family, pooling)
    prompts, default_name = _prompts(folder, sentence)
    width = integer(renamed(config), "hidden_size")
    dim = dense[-1].outputs if dense else width
    return Spec(
        family=family,
        dim=dim,
        vocab_size=integer(config, "vocab_size"),
        max_length=_max_length(folder, config, tokens),
        pooling=found,
        pad_id=pad,
        eos_id=eos if found is Pooling.LAST else None,
        token_types=family in TYPED,
        prompts=prompts or PROMPTS.get(family, {}),
        default_prompt_name=default_name,
        norm_before_cut=family in NORM_BEFORE_CUT,
        dense=tuple(module.folder for module in dense),
        hidden_dim=width if width != dim else None,
    )


def check_modules(folder: Path, any_behind: bool = False) -> None:
    """Whatever sentence-transformers would do beside what we do must not be lost; ``any_behind`` the pooling may be."""
    kinds = [kind for kind, _ in modules_in(folder, any_behind)]
    for name, key, sound in (
        ("1_Pooling/config.json", "include_prompt", (None, True)),
        ("sentence_bert_config.json", "do_lower_case", (None, False)),
        ("config_sentence_transformers.json", "similarity_fn_name", (None, "cosine", "dot_score", "dot")),
    ):
        value = _optional(folder / name).get(key)
        if value not in sound:
            raise UnknownArchitectureError(
                f"{key} in {folder / name}",
                expected=" or ".join(repr(v) for v in sound if v is not None),
                found=repr(value),
                remedy="open an issue that names the model",
            )
    dot = str(_optional(folder / "config_sentence_transformers.json").get("similarity_fn_name")).startswith("dot")
    if dot and kinds and "Normalize" not in kinds:
        raise UnknownArchitectureError(
            f"similarity_fn_name in {folder / 'config_sentence_transformers.json'}",
            expected="cosine, or a Normalize module: our vectors have length 1",
            found="dot product of vectors that are not normalised",
            remedy="open an issue that names the model",
        )


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def pooling_in(config: dict[str, Any], path: Path) -> Pooling:
    """The pooling a 1_Pooling/config.json means: the old booleans, the new key, or both.

    Raises SpecError when they are silent, disagree, or name a pooling that is not built here.
    """
    old = {OLD_KEYS[k] for k in OLD_KEYS if config.get(k)}
    other = [k for k in OTHER_OLD_KEYS if config.get(k)]
    new = config.get("pooling_mode")
    names = {p.value for p in old} | ({str(new)} if new else set())
    if other or len(names) != 1 or names - {p.value for p in Pooling}:
        raise SpecError(
            f"{path}",
            expected=f"exactly one pooling of {', '.join(p.value for p in Pooling)}",
            found=", ".join(sorted(names) + other) or "none",
            remedy="mend the file so that the old booleans and pooling_mode agree",
        )
    return Pooling(names.pop())


def _pooling(folder: Path, family: str, asked: str | None) -> Pooling:
    if asked is not None and asked not in {p.value for p in Pooling}:
        raise OptionError(
            "--pooling",
            expected=f"one of {', '.join(p.value for p in Pooling)}",
            found=repr(asked),
            remedy="choose one of these",
        )
    path = folder / "1_Pooling" / "config.json"
    if path.is_file():
        said = pooling_in(read_json(path), path)
        if asked is not None and Pooling(asked) is not said:
            raise SpecError(
                "--pooling",
                expected=f"{said.value} as {path} says",
                found=asked,
                remedy="leave the option out, or mend the file",
            )
        return said
    if asked is not None:
        return Pooling(asked)
    if family in FAMILY_POOLING:
        return FAMILY_POOLING[family]
    raise SpecError(
        f"pooling of {folder}",
        expected="1_Pooling/config.json",
        found="no such file, and models of this family differ",
        remedy="say --pooling mean or --pooling cls",
    )


def _prompts(folder: Path, sentence: dict[str, Any]) -> tuple[dict[str, str], str | None]:
    prompts, default = sentence.get("prompts") or {}, sentence.get("default_prompt_name")
    sound = isinstance(prompts, dict) and all(isinstance(v, str) for v in prompts.values())
    if not sound or (default is not None and not (isinstance(default, str) and default in prompts)):
        raise SpecError(
            f"{folder / 'config_sentence_transformers.json'}",
            expected="prompts that map names to texts, and a default_prompt_name among them",
            found=f"prompts {prompts!r}, default_prompt_name {default!r}",
            remedy="mend the file",
        )
    try:
        "".join((*prompts, *prompts.values())).encode("utf-8")
    except UnicodeEncodeError as error:
        raise SpecError(
            f"{folder / 'config_sentence_transformers.json'}",
            expected="prompts that UTF-8 can carry",
            found="a lone surrogate",
            remedy="mend the file",
        ) from error
    return dict(prompts), default


def _max_length(folder: Path, config: dict[str, Any], tokens: dict[str, Any]) -> int:
    positions = longest(config)
    file, key = "sentence_bert_config.json", "max_seq_length"
    said: Any = _optional(folder / file).get(key)
    if said is None:
        file, key = "tokenizer_config.json", "model_max_length"
        said = tokens.get(key)
    if said is None or (isinstance(said, (int, float)) and said > 1e12):  # transformers' way of saying nothing
        return positions
    whole = isinstance(said, (int, float)) and not isinstance(said, bool) and said == int(said)
    if not whole or said < 1:
        raise SpecError(
            f"{folder / file}, key {key!r}",
            expected="a positive whole number",
            found=repr(said),
            remedy="mend the file",
        )
    return min(int(said), positions)


def _special_ids(config: dict[str, Any], tokens: dict[str, Any], tokenizer: dict[str, Any]) -> tuple[int, int | None]:
    """(pad id, end-of-text id) by name from tokenizer_config.json, else by number from config.json."""
    try:
        ids = {str(t["content"]): int(t["id"]) for t in tokenizer.get("added_tokens") or ()}
    except (KeyError, TypeError, ValueError) as error:
        raise TokenizerError(
            "added_tokens in tokenizer.json",
            expected="entries with content and id",
            found=str(error),
            remedy="fetch the file again",
        ) from error

    def named(key: str) -> int | None:
        token = tokens.get(key)
        content = token.get("content") if isinstance(token, dict) else token
        return ids.get(content) if isinstance(content, str) else None

    def numbered(key: str) -> int | None:
        value = config.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    eos = numbered("eos_token_id")
    eos = eos if eos is not None else named("eos_token")
    pad = named("pad_token")
    pad = pad if pad is not None else numbered("pad_token_id")
    pad = pad if pad is not None else eos
    if pad is None:
        raise SpecError(
            "padding",
            expected="pad_token in tokenizer_config.json or pad_token_id in config.json",
            found="neither",
            remedy="mend one of them",
        )
    rows = integer(config, "vocab_size")
    for name, row in (("pad", pad), ("end-of-text", eos)):
        if row is not None and not 0 <= row < rows:
            raise SpecError(
                f"the {name} token's id",
                expected=f"a row of the table of {rows}",
                found=str(row),
                remedy="use the config.json and tokenizer that belong to the weights",
            )
    return pad, eos
