"""What a folder says of itself, mended: configs and tokenizer as every reader takes them, from what is there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeGuard

from featherbed.make.assemble import MODULE, OLD_MODES, ending
from featherbed.spec import Pooling

POOLING, TOKENIZER = "1_Pooling/config.json", "tokenizer.json"
KINDS = ("Transformer", "Pooling", "Normalize")
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
ARCHITECTURES = {
    "bert": "BertModel", "qwen2": "Qwen2Model", "qwen3": "Qwen3Model", "roberta": "RobertaModel",
    "xlm-roberta": "XLMRobertaModel", "mpnet": "MPNetModel", "nomic_bert": "NomicBertModel",
    "modernbert": "ModernBertModel", "gemma3_text": "Gemma3TextModel",
}  # fmt: skip
OFFSET_FAMILIES = ("roberta", "xlm-roberta", "camembert", "mpnet")  # their positions begin behind the padding's id
MOST = 2**53  # a whole number beyond it is no limit


@dataclass(frozen=True)
class Change:
    """A file, what is new in it, and for whose sake."""

    file: str
    what: str
    why: str


@dataclass(frozen=True)
class Known:
    """What the folder's own files say, one place or another; None where none does.

    ``appends`` says that the tokenizer ends texts with a special token; ``sidecars`` maps graphs' names to whether each
    has one.
    """

    pooling: Pooling | None
    pad: str | None
    pad_id: int | None
    eos_id: int | None
    appends: bool
    sidecars: dict[str, bool]


@dataclass
class Desk:
    """JSON files by name while they are being mended: only those that changed are written."""

    files: dict[str, Any]
    changed: set[str] = field(default_factory=set)
    changes: list[Change] = field(default_factory=list)

    def said(self, name: str) -> dict[str, Any]:
        """The object in a file, or an empty one."""
        value = self.files.get(name)
        return value if isinstance(value, dict) else {}

    def put(self, name: str, value: Any, what: str, why: str) -> None:
        """A file's new content. What is no change is none."""
        if self.files.get(name) != value:
            self.files[name] = value
            self.changed.add(name)
            self.changes.append(Change(name, what, why))

    def set(self, name: str, key: str, value: Any, why: str) -> None:
        """One key of a file."""
        self.put(name, {**self.said(name), key: value}, f"{key} is {value!r}", why)


def mend(desk: Desk, known: Known) -> None:
    """Everything that follows from what is known. What does not is left as it is, for `conform` to name."""
    limit = _limit(desk, known)
    if desk.said("config.json"):
        _config(desk, known)
    _tokenizer_config(desk, known, limit)
    if desk.said(TOKENIZER):
        _tokenizer(desk, known)
    if desk.files.get("special_tokens_map.json") is None:
        named = {key: desk.said("tokenizer_config.json").get(key) for key in SPECIAL}
        found = {key: value for key, value in named.items() if value is not None}
        desk.put("special_tokens_map.json", found, "written", "fastembed before 0.9 does not open without it")
    if known.pooling is not None:
        _pooling(desk, known.pooling)
    _modules(desk, known.pooling)
    if limit is not None and not isinstance(desk.said("sentence_bert_config.json").get("max_seq_length"), int):
        desk.set("sentence_bert_config.json", "max_seq_length", limit, "text-embeddings-inference reads it")


def _limit(desk: Desk, known: Known) -> int | None:
    """Tokens that a text may have."""
    said = desk.said("sentence_bert_config.json").get("max_seq_length")
    positions = desk.said("config.json").get("max_position_embeddings")
    if _whole(positions) and desk.said("config.json").get("model_type") in OFFSET_FAMILIES:
        positions -= (known.pad_id if known.pad_id is not None else 1) + 1
    limits = [value for value in (said, positions) if _whole(value)]
    return min(limits, default=None)


def _whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < MOST


def _config(desk: Desk, known: Known) -> None:
    if not isinstance(desk.said("config.json").get("pad_token_id"), int) and known.pad_id is not None:
        desk.set("config.json", "pad_token_id", known.pad_id, "fastembed and text-embeddings-inference pad with it")
    architecture = ARCHITECTURES.get(str(desk.said("config.json").get("model_type")))
    if not desk.said("config.json").get("architectures") and architecture:
        desk.set("config.json", "architectures", [architecture], "text-embeddings-inference does not start without")
    section = desk.said("config.json").get("transformers.js_config") or {}
    said = section.get("use_external_data_format") if isinstance(section, dict) else None
    before = said if isinstance(said, dict) else {}
    wanted = {name: before.get(name, True) or True for name, has in known.sidecars.items() if has}
    others = {name: has for name, has in before.items() if name not in known.sidecars and name.endswith(".onnx")}
    wanted = {**others, **wanted}
    if wanted != (said or {}):
        section = {**(section if isinstance(section, dict) else {}), "use_external_data_format": wanted}
        desk.set("config.json", "transformers.js_config", section, "transformers.js fetches the sidecars it is told of")


def _tokenizer_config(desk: Desk, known: Known, limit: int | None) -> None:
    name = "tokenizer_config.json"
    if desk.files.get(name) is None:
        desk.put(name, {"tokenizer_class": "PreTrainedTokenizerFast"}, "written", "everybody's tokenizer reads it")
    if not _whole(desk.said(name).get("model_max_length")) and limit is not None:
        desk.set(name, "model_max_length", limit, "fastembed refuses a tokenizer without, others never cut a text")
    if desk.said(name).get("padding_side") not in ("left", "right"):
        desk.set(name, "padding_side", "right", "a batch is padded on a side that was chosen")
    if desk.said(name).get("pad_token") is None and known.pad is not None:
        desk.set(name, "pad_token", known.pad, "a batch cannot be padded without")


def _tokenizer(desk: Desk, known: Known) -> None:
    for key in ("padding", "truncation"):
        if desk.said(TOKENIZER).get(key):
            desk.set(TOKENIZER, key, None, "every text was padded or cut to what the file was saved with")
    if known.pooling is Pooling.LAST and not known.appends and known.eos_id is not None:
        whole = {**desk.said(TOKENIZER), "post_processor": ending(desk.said(TOKENIZER), known.eos_id)}
        desk.put(TOKENIZER, whole, f"texts end with the token {known.eos_id}", "the vector is the last token's")


def _pooling(desk: Desk, pooling: Pooling) -> None:
    """Both schemas. Other keys stay."""
    before = desk.said(POOLING)
    width = before.get("word_embedding_dimension", before.get("embedding_dimension"))
    width = width if width is not None else desk.said("config.json").get("hidden_size")
    both = {
        **before,
        **({} if width is None else {"word_embedding_dimension": width}),
        **{key: mode is pooling for key, mode in OLD_MODES.items()},
        "pooling_mode": pooling.value,
    }
    why = "text-embeddings-inference reads the booleans only, newer sentence-transformers write pooling_mode only"
    desk.put(POOLING, both, f"{pooling.value} in both schemas", why)


def _modules(desk: Desk, pooling: Pooling | None) -> None:
    modules = desk.files.get("modules.json")
    if isinstance(modules, list):
        named = [_named(module) for module in modules]
        desk.put("modules.json", named, "types by the names that every version reads", "versions differ in theirs")
    elif modules is None and pooling is not None:
        paths = ("", "1_Pooling", "2_Normalize")
        whole = [
            {"idx": i, "name": str(i), "path": path, "type": f"{MODULE}.{kind}"}
            for i, (kind, path) in enumerate(zip(KINDS, paths, strict=True))
        ]
        desk.put("modules.json", whole, "written", "without it sentence-transformers pools by mean")


def _named(module: Any) -> Any:
    kind = str(module.get("type")) if isinstance(module, dict) else ""
    last = kind.rpartition(".")[2]
    foreign = kind.startswith("sentence_transformers.") and last in KINDS
    return {**module, "type": f"{MODULE}.{last}"} if foreign else module
