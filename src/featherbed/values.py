"""JSON objects from files, and numbers out of them: read, or refused with what was found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from featherbed.errors import FeatherbedError, SpecError


def read_json(path: Path, error: type[FeatherbedError] = SpecError) -> dict[str, Any]:
    """A JSON object from a file.

    Raises ``error`` when the file is missing, a git-lfs pointer, not JSON, or not an object.
    """
    text = ""
    try:
        text = path.read_text("utf-8")
        value = json.loads(text, parse_constant=_refuse_constant)
        found = "" if isinstance(value, dict) else type(value).__name__
    except FileNotFoundError:
        found = "no such file"
    except (OSError, ValueError, RecursionError) as failure:
        lfs = text.startswith("version https://git-lfs")
        found = "a git-lfs pointer (run `git lfs pull`)" if lfs else f"{type(failure).__name__}: {failure}"
    if found:
        raise error(f"{path}", expected="a JSON object", found=found, remedy="fetch it again, whole")
    return dict(value)


def _refuse_constant(word: str) -> float:
    """NaN and Infinity are no JSON."""
    raise ValueError(f"{word}, which is no JSON")


def integer(config: dict[str, Any], key: str, default: int | None = None) -> int:
    """A positive whole number of config.json.

    Raises SpecError when it is missing without a default, or something else.
    """
    value = config.get(key, default)
    if value is None and default is not None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SpecError(
            f"config.json, key {key!r}",
            expected="a positive whole number",
            found="nothing" if value is None else repr(value),
            remedy="use the config.json that belongs to the weights",
        )
    return value


def number(config: dict[str, Any], key: str, default: float) -> float:
    """A positive number of config.json; ``default`` where it is missing.

    Raises SpecError on anything else.
    """
    value = config.get(key, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise SpecError(
            f"config.json, key {key!r}",
            expected="a positive number",
            found=repr(value),
            remedy="use the config.json that belongs to the weights",
        )
    return float(value)
