"""What lies in a folder, ours or another's, as far as it can be read: graphs, configs, tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from featherbed.check.inspect import Inspection, inspect_file
from featherbed.errors import FeatherbedError, ModelFolderError, OptionError
from featherbed.folder import MANIFEST, ONNX, open_folder
from featherbed.spec import Pooling, pooling_in

UNLIMITED = 1e12  # of tokens: transformers' way of saying that nobody said
POOLING = "1_Pooling/config.json"
CONFIGS = (
    "config.json", "tokenizer_config.json", "special_tokens_map.json", "sentence_bert_config.json",
    "config_sentence_transformers.json", "modules.json", POOLING,
)  # fmt: skip
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class GraphFile:
    """One .onnx file: the variant it is (its file's name where nobody says), and what is in it, or why not."""

    variant: str
    file: str  # inside the folder, with /
    seen: Inspection | None
    why: str = ""


@dataclass(frozen=True)
class Facts:
    """A folder: its graphs, and its JSON files by name: None where there is none, a text where it is no JSON."""

    path: Path
    graphs: tuple[GraphFile, ...]
    files: dict[str, Any]

    def said(self, name: str) -> dict[str, Any]:
        """The object in a JSON file; empty where there is no such file, or something else in it."""
        found = self.files.get(name)
        return found if isinstance(found, dict) else {}

    @cached_property
    def tokenizer(self) -> dict[str, Any]:
        """tokenizer.json, read when somebody asks: a large one takes a second."""
        found = read(self.path / TOKENIZER)
        return found if isinstance(found, dict) else {}

    @property
    def pooling(self) -> Pooling | None:
        """Where the files name one that is built here, and do not disagree."""
        try:
            return pooling_in(self.said(POOLING), self.path / POOLING)
        except FeatherbedError:
            return None

    @property
    def max_length(self) -> int | None:
        """Tokens that a text may have: the least that a file says."""
        said = (
            self.said("sentence_bert_config.json").get("max_seq_length"),
            self.said("tokenizer_config.json").get("model_max_length"),
            self.said("config.json").get("max_position_embeddings"),
        )
        limits = [int(v) for v in said if isinstance(v, (int, float)) and not isinstance(v, bool) and 0 < v < UNLIMITED]
        return min(limits, default=None)

    def token(self, key: str) -> str | None:
        """The text of ``pad_token`` and its like, from the tokenizer's config or the map of special tokens."""
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            value = self.said(name).get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                return value
        return None

    def token_id(self, text: str | None) -> int | None:
        """The id of an added token."""
        added = self.tokenizer.get("added_tokens") or ()
        return next((t["id"] for t in added if t.get("content") == text and isinstance(t.get("id"), int)), None)


def read(path: Path) -> Any:
    """What a JSON file holds: None where there is none, and the reason as a text where it cannot be read."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"


def facts(folder: Path, variants: list[str] | None = None) -> Facts:
    """The facts of a folder, of all its graphs or of those called so.

    Raises ModelFolderError when it has no .onnx file, OptionError on a variant that is not there.
    """
    found = _names(folder)
    if not found:
        raise ModelFolderError(
            f"{folder}",
            expected="a folder with .onnx files in it or in its onnx/",
            found="no such folder" if not folder.is_dir() else "none",
            remedy="make them with `featherbed build CHECKPOINT`, or say another folder",
        )
    for name in variants or ():
        if name not in found:
            raise OptionError(
                f"variant {name!r} of {folder}",
                expected=f"one of {', '.join(found)}",
                found="no such variant",
                remedy="choose one of these",
            )
    wanted = {name: file for name, file in found.items() if not variants or name in variants}
    graphs = tuple(_graph(folder, name, file) for name, file in wanted.items())
    return Facts(folder, graphs, {name: read(folder / name) for name in CONFIGS})


def _names(folder: Path) -> dict[str, str]:
    """Variant → file. A graph that no manifest names is called by its file."""
    ours: dict[str, str] = {}
    if (folder / MANIFEST).is_file():
        ours = {name: one.files[0] for name, one in open_folder(folder).manifest.variants.items()}
    there = [p.relative_to(folder).as_posix() for at in (folder, folder / ONNX) for p in sorted(at.glob("*.onnx"))]
    return ours | {file: file for file in there if file not in ours.values()}


def _graph(folder: Path, name: str, file: str) -> GraphFile:
    try:
        return GraphFile(name, file, inspect_file(folder / file))
    except FeatherbedError as error:
        return GraphFile(name, file, None, f"expected {error.expected}, found {error.found}")
