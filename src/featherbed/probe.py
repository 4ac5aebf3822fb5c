"""Probes: named, versioned texts to judge by, or to calibrate with. Two ship with the package; more come from files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featherbed.errors import ProbeError

SHIPPED = Path(__file__).parent / "probes" / "everyday.jsonl"
SHIPPED_NAME, SHIPPED_VERSION = "everyday", "1"
CALIBRATION = Path(__file__).parent / "probes" / "calibration.jsonl"
CALIBRATION_NAME, CALIBRATION_VERSION = "calibration", "2"
TEXT_KEYS = ("text", "sentence1", "sentence2", "anchor", "positive", "negative")


@dataclass(frozen=True)
class Probe:
    """``texts`` are distinct; ``triplets`` are (anchor, positive, negative) as places among them."""

    name: str
    version: str
    sha256: str
    texts: tuple[str, ...]
    triplets: tuple[tuple[int, int, int], ...]

    def to_json(self) -> dict[str, Any]:
        """What a report says of its probe."""
        return {
            "name": self.name,
            "version": self.version,
            "sha256": self.sha256,
            "texts": len(self.texts),
            "triplets": len(self.triplets),
        }


def shipped() -> Probe:
    """The probe of the package: our own short texts in five languages and code, and longer passages."""
    return read_probe([SHIPPED], name=SHIPPED_NAME, version=SHIPPED_VERSION)


def shipped_calibration() -> Probe:
    """The package's texts to calibrate with: our own, in fourteen languages and code, none of them in ``shipped``."""
    return read_probe([CALIBRATION], name=CALIBRATION_NAME, version=CALIBRATION_VERSION)


def read_probe(paths: Sequence[Path], name: str | None = None, version: str = "") -> Probe:
    """A probe from JSON lines; all files together make one.

    A line is an object with any of ``text``, ``sentence1`` and ``sentence2``, or ``anchor``, ``positive``
    and ``negative``. Raises ProbeError, naming file and line, on anything else or when there is no text.
    """
    places: dict[str, int] = {}
    triplets: list[tuple[int, int, int]] = []
    digest = hashlib.sha256()
    for path in paths:
        try:
            raw = path.read_bytes()
            lines = raw.decode("utf-8").split("\n")  # not splitlines: texts may hold U+2028
        except (OSError, UnicodeDecodeError) as error:
            raise ProbeError(
                f"probe {path}", expected="a file of JSON lines in UTF-8", found=str(error), remedy="check the path"
            ) from error
        digest.update(raw)
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            row = _row(path, number, line)
            at = [places.setdefault(row[k], len(places)) for k in TEXT_KEYS if k in row]
            if "anchor" in row:
                triplets.append((at[-3], at[-2], at[-1]))
    if not places:
        raise ProbeError(
            "probe", expected="at least one text", found="none", remedy=f"write lines with {', '.join(TEXT_KEYS)}"
        )
    name = name if name is not None else "+".join(p.name for p in paths)
    return Probe(name, version, digest.hexdigest(), tuple(places), tuple(triplets))


def _row(path: Path, number: int, line: str) -> dict[str, str]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    keys = set(row) & set(TEXT_KEYS) if isinstance(row, dict) else set()
    whole = len(keys & {"anchor", "positive", "negative"}) in (0, 3)
    if not keys or not whole or not all(isinstance(row[k], str) for k in keys):
        raise ProbeError(
            f"line {number} of {path}",
            expected='an object such as {"text": "…"} or one with anchor, positive and negative',
            found=line[:60],
            remedy="mend or remove the line",
        )
    return {k: row[k] for k in keys}
