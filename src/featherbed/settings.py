"""The section [embedding] of featherbed.toml, then the environment (FEATHERBED_*), then a caller: later wins."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from featherbed.errors import OptionError

SECTION, PREFIX = "embedding", "FEATHERBED_"
ELSEWHERE = ("CACHE",)  # of this prefix, and read by others


@dataclass(frozen=True)
class Embedding:
    """What an indexer says of its model: the words of existing ones. Paths are as seen from the file that names them.

    With ``quantized_model_path`` that file is used and ``model`` is not; without, ``model`` in FP32.
    """

    model: str | None = None
    batch_size: int | None = None
    pool_size: int | None = None
    quantized_model_path: Path | None = None
    tokenizer_path: Path | None = None
    tokenizer_config_path: Path | None = None


KEYS = tuple(one.name for one in fields(Embedding))
NUMBERS = ("batch_size", "pool_size")


def read_embedding(path: Path | str | None = None, said: Embedding | None = None) -> Embedding:
    """The settings of a file, where there is one, over them those of the environment, over them what is ``said``.

    Raises OptionError on a file that cannot be read, an unknown section or key, or a value of another kind.
    """
    found = Embedding() if path is None else _of_file(Path(path))
    found = _over(found, _of_environment(environment()))
    return found if said is None else _over(found, said)


def environment() -> dict[str, str]:
    """Variables whose name begins with FEATHERBED_."""
    return {name: value for name, value in os.environ.items() if name.startswith(PREFIX)}


def _over(first: Embedding, second: Embedding) -> Embedding:
    said = {key: getattr(second, key) for key in KEYS if getattr(second, key) is not None}
    return replace(first, **said)


def _of_file(path: Path) -> Embedding:
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise OptionError(
            f"{path}",
            expected="a file in TOML with a section [embedding]",
            found=f"{error.strerror if isinstance(error, OSError) and error.strerror else error}",
            remedy="mend it, or name another with --config",
        ) from error
    for name in document:
        if name != SECTION:
            raise _unknown(f"{path}", f"[{name}]", [SECTION])
    section = document.get(SECTION, {})
    if not isinstance(section, dict):
        raise OptionError(f"{path}", expected=f"a section [{SECTION}]", found=repr(section), remedy="mend the file")
    return _embedding(section, f"{path}, [{SECTION}]", path.parent)


def _of_environment(variables: Mapping[str, str]) -> Embedding:
    said: dict[str, Any] = {}
    for name, value in variables.items():
        key = name.removeprefix(PREFIX)
        if key not in ELSEWHERE and value:  # an empty one is none
            number = key.lower() in NUMBERS and value.strip().lstrip("-").isdigit()
            said[key.lower()] = int(value) if number else value
    return _embedding(said, "the environment", Path())


def _embedding(said: Mapping[str, Any], where: str, home: Path) -> Embedding:
    """Settings from plain values. Raises OptionError on an unknown key, or a value of another kind."""
    values: dict[str, Any] = {}
    for key, value in said.items():
        if key not in KEYS:
            raise _unknown(where, key, list(KEYS))
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not (whole if key in NUMBERS else isinstance(value, str) and value):
            raise OptionError(
                f"{key} in {where}",
                expected="a whole number of at least 1" if key in NUMBERS else "a text",
                found=repr(value),
                remedy="mend it, or leave it out",
            )
        values[key] = home / value if key.endswith("_path") else value
    model = values.get("model")
    if model is not None and (home / model).exists():  # else it is a Hub id, or a path that its reader will name
        values["model"] = str(home / model)
    return Embedding(**values)


def _unknown(where: str, key: str, known: list[str]) -> OptionError:
    near = difflib.get_close_matches(key.strip("[]"), known, 1)
    return OptionError(
        f"{key} in {where}",
        expected=f"one of {', '.join(known)}",
        found="an unknown key",
        remedy=f"did you mean {near[0]}?" if near else "leave it out",
    )
