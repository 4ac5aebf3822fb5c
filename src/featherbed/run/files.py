"""Files of texts in, files of vectors out."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from featherbed.errors import EngineError, MissingError, OptionError, OutputError, TextError

Vectors = npt.NDArray[np.float32]
STDIN = "-"
INPUTS = (".txt", ".jsonl", ".csv")
OUTPUTS = (".npy", ".jsonl", ".parquet")


def read_texts(path: str, field: str = "text") -> list[str]:
    """The texts of one file: a line each (.txt, or "-" for standard input), or ``field`` of .jsonl and .csv.

    Raises TextError, naming the line, when a text is missing or the file cannot be read; OptionError on an
    unknown suffix.
    """
    suffix = ".txt" if path == STDIN else Path(path).suffix.lower()
    if suffix not in INPUTS:
        raise OptionError(
            f"input {path}", expected=f"a file ending in {', '.join(INPUTS)}", found=repr(suffix), remedy="convert it"
        )
    try:
        raw = sys.stdin.buffer.read() if path == STDIN else Path(path).read_bytes()
        text = raw.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(
            f"input {path}", expected="a readable file in UTF-8", found=str(error), remedy="check path and encoding"
        ) from error
    readers: dict[str, Callable[[str, str, str], Iterator[str]]] = {
        ".txt": _lines,
        ".jsonl": _jsonl,
        ".csv": _csv,
    }
    return list(readers[suffix](text, path, field))


def _lines(text: str, path: str, field: str) -> Iterator[str]:
    del path, field  # a line is a text: nothing can be missing
    yield from (line.removesuffix("\r") for line in text.removesuffix("\n").split("\n") if text)


def _jsonl(text: str, path: str, field: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        value = row.get(field) if isinstance(row, dict) else None
        yield _value(value, path, number, field, line)


def _csv(text: str, path: str, field: str) -> Iterator[str]:
    csv.field_size_limit(max(len(text) + 1, csv.field_size_limit()))  # a long text is not a defect
    reader = csv.DictReader(io.StringIO(text), strict=True)
    try:
        for row in reader:
            yield _value(row.get(field), path, reader.line_num, field, ", ".join(reader.fieldnames or ()))
    except csv.Error as error:
        raise TextError(
            f"line {reader.reader.line_num} of {path}",
            expected="comma-separated values with a head",
            found=str(error),
            remedy="mend the file",
        ) from error


def _value(value: object, path: str, number: int, field: str, found: str) -> str:
    if isinstance(value, str):
        return value
    raise TextError(
        f"line {number} of {path}",
        expected=f"a text under {field!r}",
        found=found[:80],
        remedy="name another field with --field, or mend the line",
    )


def check_output(path: Path) -> None:
    """Raises OptionError on an unknown suffix, MissingError without pyarrow for .parquet: before any work."""
    suffix = path.suffix.lower()
    if suffix not in OUTPUTS:
        raise OptionError(
            f"output {path}",
            expected=f"a file ending in {', '.join(OUTPUTS)}",
            found=repr(suffix),
            remedy="choose one of these with -o",
        )
    if not path.absolute().parent.is_dir():
        raise OutputError(
            f"output {path}", expected="a folder that exists", found="none", remedy="make it, or choose another"
        )
    if suffix == ".parquet":
        _pyarrow()


def write_vectors(path: Path, texts: Sequence[str], vectors: Vectors) -> None:
    """Write vectors [N, D]: .npy the array alone; .jsonl and .parquet with the texts.

    A reader sees the old file or the whole new one. Raises OutputError when it cannot be written,
    EngineError when a vector is not finite.
    """
    check_output(path)
    if not np.isfinite(vectors).all():
        row = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
        raise EngineError(
            f"vector {row}", expected="finite numbers", found="NaN or infinity", remedy="run `featherbed verify`"
        )
    writers = {".npy": _write_npy, ".jsonl": _write_jsonl, ".parquet": _write_parquet}
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            writers[path.suffix.lower()](file, texts, vectors)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OutputError(
            f"output {path}",
            expected="room and permission to write",
            found=f"{error.strerror or error}",
            remedy="free space or choose another place with -o",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _write_npy(file: BinaryIO, texts: Sequence[str], vectors: Vectors) -> None:
    del texts
    np.save(file, vectors, allow_pickle=False)


def _write_jsonl(file: BinaryIO, texts: Sequence[str], vectors: Vectors) -> None:
    for text, vector in zip(texts, vectors, strict=True):
        row = {"text": text, "embedding": [float(f"{v:.9g}") for v in vector]}
        file.write(json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n")


def _write_parquet(file: BinaryIO, texts: Sequence[str], vectors: Vectors) -> None:
    arrow, parquet = _pyarrow()
    flat = arrow.array(np.ascontiguousarray(vectors).reshape(-1))
    column = arrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    parquet.write_table(arrow.table({"text": arrow.array(list(texts)), "embedding": column}), file)


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "pyarrow":
            raise  # there, but broken: that must not look like absent
        raise MissingError(
            "output .parquet",
            expected="the package pyarrow",
            found="none",
            remedy="pip install 'featherbed[parquet]', or write .npy or .jsonl",
        ) from error
    return pyarrow, pyarrow.parquet
