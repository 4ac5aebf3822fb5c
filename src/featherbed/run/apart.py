"""A graph, its tokenizer and its tokenizer's config, each wherever it lies, and what can be wrong with their paths."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from featherbed.errors import ModelFolderError, SpecError, TokenizerError
from featherbed.run.foreign import Foreign, Found, found

CONFIGS = (
    "config.json", "tokenizer_config.json", "modules.json", "sentence_bert_config.json",
    "config_sentence_transformers.json", "1_Pooling/config.json",
)  # fmt: skip
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"


@dataclass(frozen=True)
class Files:
    """An .onnx file and, where they lie apart from it, its tokenizer.json and tokenizer_config.json.

    Other configs are looked for beside the tokenizer, then beside the graph, then above it.
    """

    graph: Path
    tokenizer: Path | None = None
    tokenizer_config: Path | None = None

    def check(self) -> None:
        """Raises ModelFolderError or TokenizerError, which say which path cannot be read, and why."""
        if why := unreadable(self.graph):
            raise ModelFolderError(
                f"cannot read ONNX file {self.graph}",
                expected="a file that can be read",
                found=why,
                remedy="mend quantized_model_path, or leave it out for FP32",
            )
        for name, path in ((TOKENIZER, self.tokenizer), (TOKENIZER_CONFIG, self.tokenizer_config)):
            why = "" if path is None else unreadable(path) or _no_object(path)
            if why:
                key = "tokenizer_path" if name == TOKENIZER else "tokenizer_config_path"
                raise TokenizerError(
                    f"cannot read {name} {path}",
                    expected="a JSON object that can be read",
                    found=why,
                    remedy=f"mend {key}, or leave it out for the one beside the model",
                )

    def found(self, name: str) -> Path | None:
        """Where a file of this name lies: as said, or the nearest."""
        said = {TOKENIZER: self.tokenizer, TOKENIZER_CONFIG: self.tokenizer_config}.get(name)
        if said is not None:
            return said
        homes = ([self.tokenizer.parent] if self.tokenizer else []) + [self.graph.parent, self.graph.parent.parent]
        return next((home / name for home in homes if (home / name).is_file()), None)

    def tokenizer_path(self) -> Path:
        """The tokenizer.json; where there is none, where it should be."""
        return self.found(TOKENIZER) or self.graph.with_name(TOKENIZER)

    def of_others(self, said: Foreign) -> Found:
        """What the configs say of the graph, as if they lay in one folder. Raises as ``foreign.found``."""
        if self.found(CONFIGS[0]) is None:
            raise SpecError(
                f"{CONFIGS[0]} of {self.graph}",
                expected="one beside the tokenizer, beside the graph or above it",
                found="none",
                remedy="put the model's config.json there",
            )
        with tempfile.TemporaryDirectory() as name:
            home = Path(name)
            for config in (*CONFIGS, TOKENIZER):
                path = self.found(config)
                if path is not None:
                    (home / config).parent.mkdir(exist_ok=True)
                    shutil.copyfile(path, home / config)
            return replace(found(self.graph, said, home), home=self.tokenizer_path())


def unreadable(path: Path) -> str:
    """Why a file cannot be read; "" when it can."""
    try:
        if not path.exists():
            return "no such file"
        if not path.is_file():
            return "a folder, and no file" if path.is_dir() else "no file"
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        return f"{error.strerror or error}"
    if not head:
        return "an empty file"
    return "a git-lfs pointer (run `git lfs pull`)" if head.startswith(b"version https://git-lfs") else ""


def _no_object(path: Path) -> str:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"no JSON: {error}"
    return "" if isinstance(value, dict) else f"{type(value).__name__}, and no object"
