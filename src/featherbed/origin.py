"""Origin: which upstream model a folder was made from, and under which licence, as the checkpoint's own card says."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from featherbed.errors import CheckpointError

CARD = "README.md"
REVISION = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Origin:
    """A Hub id and its revision, a licence as the Hub spells it, languages by their codes; "" and () where unknown."""

    base_model: str = ""
    revision: str = ""
    license: str = ""
    languages: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "languages": list(self.languages)}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Origin:
        """Of ``to_json``; {} is one of which nothing is known."""
        words = {key: str(raw.get(key, "")) for key in ("base_model", "revision", "license")}
        return cls(**words, languages=tuple(str(one) for one in raw.get("languages", ())))


UNKNOWN = Origin()


def read_origin(folder: Path, base_model: str = "") -> Origin:
    """The origin of a checkpoint: licence and languages of the card in it, where there is one.

    The revision is the folder's name in huggingface_hub's cache. Raises CheckpointError when the card's front matter is
    no YAML.
    """
    front = front_matter(folder / CARD)
    said, languages = front.get("license"), front.get("language")
    if said == "other" and isinstance(front.get("license_name"), str):
        said = front["license_name"]
    revision = folder.resolve().name if base_model and REVISION.fullmatch(folder.resolve().name) else ""
    spoken = languages if isinstance(languages, list) else [languages]
    return Origin(
        base_model,
        revision,
        said if isinstance(said, str) else "",
        tuple(one for one in spoken if isinstance(one, str)),
    )


def front_matter(card: Path) -> dict[str, Any]:
    """What stands between the lines of three dashes at a card's top; {} without a card, or without such lines."""
    if not card.is_file():
        return {}
    parts = re.match(r"---\r?\n(.*?)\r?\n---\s*(\r?\n|$)", card.read_text("utf-8", errors="replace"), re.S)
    try:
        found = yaml.safe_load(parts.group(1)) if parts else {}
    except yaml.YAMLError as error:
        raise CheckpointError(
            f"{card}",
            expected="YAML between the lines of three dashes",
            found=str(error).splitlines()[0],
            remedy="mend the card, or take it away",
        ) from error
    return found if isinstance(found, dict) else {}
