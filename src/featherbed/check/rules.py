"""What others ask of a folder's configs and tokenizer, as rules: what is looked at, for whom, what happens otherwise.

Looked up in the sources of sentence-transformers 5.7 with optimum-onnx 0.1, fastembed 0.9.1, transformers.js 4.3 and
text-embeddings-inference (backends/ort/src/lib.rs, router/src/lib.rs, backends/src/lib.rs at 0d124dc).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from featherbed.check.facts import POOLING, TOKENIZER, UNLIMITED, Facts
from featherbed.errors import FeatherbedError
from featherbed.spec import OLD_KEYS, Pooling, pooling_in

ST, FASTEMBED, JS = "sentence-transformers", "fastembed", "transformers.js"
TEI, OPTIMUM = "text-embeddings-inference", "optimum"
ECOSYSTEMS = (ST, FASTEMBED, JS, TEI, OPTIMUM)
Found = tuple[str, str]  # the variant it is of ("" for the folder's own files), what was found
MODULES = ("Transformer", "Pooling", "Normalize")
MODULE_PREFIX = "sentence_transformers.models."


@dataclass(frozen=True)
class Rule:
    """What is looked at, for whom, what happens where it does not hold, and what to do.

    ``fails`` is False for what needs an option or a word of caution only; ``mends`` says that repair sees to it.
    """

    id: str
    looks_at: str
    concerns: tuple[str, ...]
    otherwise: str
    remedy: str
    look: Callable[[Facts], Iterator[Found]]
    fails: bool = True
    mends: bool = True


def _unreadable(facts: Facts) -> Iterator[Found]:
    for name, value in facts.files.items():
        wanted = list if name == "modules.json" else dict
        if value is not None and not isinstance(value, wanted):
            yield "", f"{name}: {value if isinstance(value, str) else type(value).__name__}"


def _config(facts: Facts) -> Iterator[Found]:
    if facts.files["config.json"] is None:
        yield "", "no config.json"
    elif not isinstance(facts.said("config.json").get("model_type"), str):
        yield "", "config.json without model_type"


def _tei_config(facts: Facts) -> Iterator[Found]:
    config = facts.said("config.json")
    # the aliases that its Config has
    known = (("architectures",), ("hidden_size", "n_embd"), ("num_hidden_layers", "n_layer"))
    for keys in (*known, ("max_position_embeddings", "max_trained_positions")):
        if not any(config.get(key) for key in keys):
            yield "", f"config.json without {keys[0]}"


def _tokenizer(facts: Facts) -> Iterator[Found]:
    if "model" not in facts.tokenizer:
        there = (facts.path / TOKENIZER).is_file()
        yield "", f"{TOKENIZER} is no tokenizer in Hugging Face's format" if there else f"no {TOKENIZER}"


def _max_length(facts: Facts) -> Iterator[Found]:
    said = facts.said("tokenizer_config.json").get("model_max_length")
    if not (isinstance(said, int) and not isinstance(said, bool) and 0 < said < UNLIMITED):
        yield "", f"model_max_length in tokenizer_config.json is {'missing' if said is None else repr(said)}"


def _padding(facts: Facts) -> Iterator[Found]:
    said = facts.said("tokenizer_config.json")
    if said.get("padding_side") not in ("left", "right"):
        yield "", f"padding_side in tokenizer_config.json is {said.get('padding_side')!r}"
    pad = facts.token("pad_token")
    if said.get("pad_token") is None:
        yield "", "no pad_token in tokenizer_config.json"
    elif facts.tokenizer and pad is not None and not _in_vocabulary(facts, pad):
        yield "", f"pad_token {pad!r} is not in {TOKENIZER}"


def _in_vocabulary(facts: Facts, token: str) -> bool:
    vocabulary = facts.tokenizer.get("model", {}).get("vocab") or {}
    words = vocabulary if isinstance(vocabulary, dict) else {entry[0] for entry in vocabulary}
    return facts.token_id(token) is not None or token in words


def _pad_id(facts: Facts) -> Iterator[Found]:
    if facts.said("config.json") and not isinstance(facts.said("config.json").get("pad_token_id"), int):
        yield "", "no pad_token_id in config.json"


def _baked(facts: Facts) -> Iterator[Found]:
    for key in ("padding", "truncation"):
        if facts.tokenizer.get(key):
            yield "", f"{TOKENIZER} has {key} of its own"


def appends_token(processor: Any) -> bool:
    """Whether a tokenizer's post-processor puts a special token at the end of a text."""
    if not isinstance(processor, dict):
        return False
    if processor.get("type") == "Sequence":
        return any(appends_token(one) for one in processor.get("processors") or ())
    if processor.get("type") == "TemplateProcessing":
        return "SpecialToken" in ((processor.get("single") or [{}])[-1])
    return processor.get("type") in ("BertProcessing", "RobertaProcessing")


def _end_token(facts: Facts) -> Iterator[Found]:
    if facts.pooling is Pooling.LAST and facts.tokenizer and not appends_token(facts.tokenizer.get("post_processor")):
        yield "", f"pooling takes the last token, and {TOKENIZER} appends no end token"


def _special_tokens(facts: Facts) -> Iterator[Found]:
    if facts.files["special_tokens_map.json"] is None:
        yield "", "no special_tokens_map.json"


def _modules(facts: Facts) -> Iterator[Found]:
    modules = facts.files["modules.json"]
    if not isinstance(modules, list):
        yield "", "no modules.json"
        return
    for module in modules:
        kind = str(module.get("type")) if isinstance(module, dict) else repr(module)
        if kind.rpartition(".")[2] in MODULES and not kind.startswith(MODULE_PREFIX):
            yield "", f"the module {kind}"
        if kind.endswith(".Pooling") and not (facts.path / str(module.get("path")) / "config.json").is_file():
            yield "", f"no config.json in {module.get('path')!r}, where modules.json has the pooling"


def _other_modules(facts: Facts) -> Iterator[Found]:
    modules = facts.files["modules.json"]
    for module in modules if isinstance(modules, list) else ():
        kind = str(module.get("type")).rpartition(".")[2] if isinstance(module, dict) else ""
        if kind not in MODULES:
            yield "", f"the module {kind}"


def _pooling(facts: Facts) -> Iterator[Found]:
    if not facts.said(POOLING):
        yield "", f"no {POOLING}"
        return
    try:
        pooling_in(facts.said(POOLING), facts.path / POOLING)
    except FeatherbedError as error:
        yield "", f"{POOLING}: {error.found}"


def _pooling_old(facts: Facts) -> Iterator[Found]:
    missing = [key for key in OLD_KEYS if key not in facts.said(POOLING)]
    if facts.said(POOLING) and missing:
        yield "", f"{POOLING} without {', '.join(missing)}"


def _pooling_new(facts: Facts) -> Iterator[Found]:
    if facts.said(POOLING) and "pooling_mode" not in facts.said(POOLING):
        yield "", f"{POOLING} without pooling_mode"


def _sequence_length(facts: Facts) -> Iterator[Found]:
    if not isinstance(facts.said("sentence_bert_config.json").get("max_seq_length"), int):
        yield "", "no max_seq_length in sentence_bert_config.json"


def _prompts(facts: Facts) -> Iterator[Found]:
    said = facts.said("config_sentence_transformers.json")
    prompts, default = said.get("prompts"), said.get("default_prompt_name")
    if prompts is not None and not (isinstance(prompts, dict) and all(isinstance(v, str) for v in prompts.values())):
        yield "", f"prompts {prompts!r}"
    elif default is not None and default not in (prompts or {}):
        yield "", f"default_prompt_name {default!r}, and no prompt of that name"


UPSTREAM = "take the file from the upstream model"
REPAIR = "featherbed repair"
CONFIG_RULES = (
    Rule("json", "every config", ECOSYSTEMS, "the file cannot be read", UPSTREAM, _unreadable, mends=False),
    Rule("config", "config.json, model_type", (ST, JS, TEI, OPTIMUM), "the architecture is unknown",
         UPSTREAM, _config, mends=False),
    Rule("tei-config", "config.json", (TEI,), "it does not start: its configuration asks for the key",
         UPSTREAM, _tei_config),
    Rule("tokenizer", TOKENIZER, ECOSYSTEMS, "no fast tokenizer",
         "save it with transformers' AutoTokenizer(…).save_pretrained", _tokenizer, mends=False),
    Rule("max-length", "tokenizer_config.json, model_max_length", (FASTEMBED, JS, OPTIMUM),
         "fastembed refuses it; others never cut a text, and positions run out", REPAIR, _max_length),
    Rule("padding", "tokenizer_config.json, padding_side and pad_token", ECOSYSTEMS,
         "a batch cannot be padded, or on a side that nobody chose", REPAIR, _padding),
    Rule("pad-id", "config.json, pad_token_id", (FASTEMBED, TEI), "pads with the end token, or with id 0",
         REPAIR, _pad_id),
    Rule("baked-padding", f"{TOKENIZER}, padding and truncation", (FASTEMBED, JS),
         "every text is padded or cut to what the file was saved with", REPAIR, _baked, fails=False),
    Rule("end-token", f"{TOKENIZER}, post_processor", ECOSYSTEMS, "the vector is another token's", REPAIR, _end_token),
    Rule("special-tokens", "special_tokens_map.json", (FASTEMBED,), "fastembed before 0.9 does not open it",
         REPAIR, _special_tokens),
    Rule("modules", "modules.json, the modules' types and folders", (ST,),
         "another major version cannot import the type; without the file it pools by mean and does not normalise",
         REPAIR, _modules),
    Rule("other-modules", "modules.json", (FASTEMBED, JS, OPTIMUM),
         "only sentence-transformers runs this module: others give another vector, unless the graph has it inside",
         "build it with featherbed, or see that sentence_embedding has it inside", _other_modules,
         fails=False, mends=False),
    Rule("pooling", POOLING, (ST, TEI),
         "text-embeddings-inference does not start, or takes the first token; sentence-transformers pools by mean",
         "say which: featherbed repair --pooling mean", _pooling),
    Rule("pooling-old-keys", f"{POOLING}, the booleans", (TEI,), "it does not start: it reads these keys only",
         REPAIR, _pooling_old),
    Rule("pooling-new-key", f"{POOLING}, pooling_mode", (ST,), "versions to come may read it only",
         REPAIR, _pooling_new, fails=False),
    Rule("sequence-length", "sentence_bert_config.json, max_seq_length", (TEI,),
         "takes texts as long as there are positions", REPAIR, _sequence_length, fails=False),
    Rule("prompts", "config_sentence_transformers.json, prompts", (ST, TEI), "it does not load",
         "make prompts map names to texts, and default_prompt_name one of them", _prompts, mends=False),
)  # fmt: skip
