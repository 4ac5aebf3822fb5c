"""Files of texts in, files of vectors out; both a piece at a time, so that memory does not grow with the files."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from featherbed.errors import EngineError, MissingError, OptionError, OutputError, TextError

Vectors = npt.NDArray[np.float32]
STDIN = "-"
INPUTS = (".txt", ".jsonl", ".csv")
BOM = b"\xef\xbb\xbf"
MOST_FIELD = 2**31 - 1  # what the csv module takes on every system
NPY_HEAD_BYTES = 128  # with room for any number of rows: it is known at the end


def check_inputs(paths: Sequence[str]) -> None:
    """Raises OptionError on an unknown suffix or standard input named twice, TextError on a file that cannot be opened:
    before any work."""
    if list(paths).count(STDIN) > 1:
        raise OptionError(
            "input -", expected="standard input once", found="it named again", remedy="it can be read once only"
        )
    for path in paths:
        _check_suffix(f"input {path}", _suffix(path), INPUTS, "convert it")
        if path != STDIN:
            with _readable(path), Path(path).open("rb"):
                pass


def read_texts(path: str, field: str = "text") -> Iterator[str]:
    """The texts of one file: a line each (.txt, or "-" for standard input), or ``field`` of .jsonl and .csv.

    They are read as they are asked for. Raises TextError, naming the line, when a text is missing or the file cannot
    be read; OptionError on an unknown suffix.
    """
    _check_suffix(f"input {path}", _suffix(path), INPUTS, "convert it")
    readers: dict[str, Callable[[Iterator[str], str, str], Iterator[str]]] = {
        ".txt": _plain,
        ".jsonl": _jsonl,
        ".csv": _csv,
    }
    yield from readers[_suffix(path)](_lines(path), path, field)


def _suffix(path: str) -> str:
    return ".txt" if path == STDIN else Path(path).suffix.lower()


def _check_suffix(subject: str, suffix: str, known: Sequence[str], remedy: str) -> None:
    if suffix not in known:
        expected = f"a file ending in {', '.join(known)}"
        raise OptionError(subject, expected=expected, found=repr(suffix), remedy=remedy)


@contextmanager
def _readable(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TextError(
            f"input {path}", expected="a readable file", found=str(error), remedy="check the path"
        ) from error


def _lines(path: str) -> Iterator[str]:
    """The lines of a file with their ends; nothing but a line feed ends one."""
    with _readable(path), _standard_input() if path == STDIN else Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            raw = line.removeprefix(BOM) if number == 1 else line
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise TextError(
                    f"line {number} of {path}",
                    expected="text in UTF-8",
                    found=f"the byte 0x{raw[error.start]:02x}",
                    remedy="convert the file",
                ) from error
            if text:  # nothing but a byte order mark is no line
                yield text


def _standard_input() -> BinaryIO:
    """A reader of its own: a thread that waits in sys.stdin's own one ends the process with an abort."""
    return os.fdopen(sys.stdin.fileno(), "rb", closefd=False)


def _plain(lines: Iterator[str], path: str, field: str) -> Iterator[str]:
    del path, field  # a line is a text: nothing can be missing
    yield from (line.removesuffix("\n").removesuffix("\r") for line in lines)


def _jsonl(lines: Iterator[str], path: str, field: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        value = row.get(field) if isinstance(row, dict) else None
        yield _value(value, path, number, field, line)


def _csv(lines: Iterator[str], path: str, field: str) -> Iterator[str]:
    with _readable(path):
        longest = min(Path(path).stat().st_size + 1, MOST_FIELD)
    csv.field_size_limit(max(longest, csv.field_size_limit()))  # a long text is not a defect
    reader = csv.DictReader(lines, strict=True)
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
        found=found[:80].strip(),
        remedy="name another field with --field, or mend the line",
    )


def check_output(path: Path) -> None:
    """Raises OptionError on an unknown suffix, OutputError on a folder or in none, MissingError without pyarrow for
    .parquet: before any work."""
    _check_suffix(f"output {path}", path.suffix.lower(), tuple(FORMATS), "choose one of these with -o")
    if path.is_dir():
        raise OutputError(f"output {path}", expected="a file's name", found="a folder", remedy="choose another with -o")
    if not path.absolute().parent.is_dir():
        raise OutputError(
            f"output {path}", expected="a folder that exists", found="none", remedy="make it, or choose another"
        )
    if path.suffix.lower() == ".parquet":
        _pyarrow()


class VectorFile:
    """A file of vectors, open for writing: .npy the array alone; .jsonl and .parquet with the texts.

    A reader of ``path`` sees the old file or, once the ``with`` block has ended well, the whole new one. What an
    error or an interrupt leaves behind is removed.
    """

    def __init__(self, path: Path, width: int) -> None:
        """Raises as ``check_output``."""
        check_output(path)
        self._path, self._width = path, width
        self._temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        self.rows = 0

    def __enter__(self) -> VectorFile:
        """Begin. Raises OutputError when there is no room or permission."""
        with self._writable():
            self._file = self._temporary.open("wb")
            try:
                self._format = FORMATS[self._path.suffix.lower()](self._file, self._width)
            except BaseException:
                self._drop()
                raise
        return self

    def write(self, texts: Sequence[str], vectors: Vectors) -> None:
        """The next texts and their vectors [n, D].

        Raises OutputError when they cannot be written, EngineError when a vector is not finite.
        """
        wrong = ~np.isfinite(vectors).all(axis=1)
        if wrong.any():
            raise EngineError(
                f"vector {self.rows + int(np.argmax(wrong))}",
                expected="finite numbers",
                found="NaN or infinity",
                remedy="run `featherbed verify`",
            )
        with self._writable():
            self._format.write(texts, vectors)
        self.rows += len(vectors)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Put the whole file in its place, or take away what was begun. Raises OutputError when that fails."""
        try:
            with self._writable() if kind is None else suppress(Exception):
                self._format.finish(self.rows)
                self._file.flush()
                if kind is None:
                    os.fsync(self._file.fileno())
                    self._file.close()
                    self._temporary.replace(self._path)
        finally:
            self._drop()

    def _drop(self) -> None:
        with suppress(OSError):  # what a full disk did not take
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    @contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"output {self._path}",
                expected="room and permission to write",
                found=f"{error.strerror or error}",
                remedy="free space or choose another place with -o",
            ) from error


class _Npy:
    """NumPy's format 1.0, whose head is written again when the number of rows is known."""

    def __init__(self, file: BinaryIO, width: int) -> None:
        self._file, self._width = file, width
        self._head(0)

    def _head(self, rows: int) -> None:
        fields = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {self._width}), }}"
        text = fields.ljust(NPY_HEAD_BYTES - 11) + "\n"
        self._file.write(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode("ascii"))

    def write(self, texts: Sequence[str], vectors: Vectors) -> None:
        del texts
        self._file.write(np.ascontiguousarray(vectors, "<f4").data)

    def finish(self, rows: int) -> None:
        self._file.seek(0)
        self._head(rows)


class _Jsonl:
    """An object a line: text and embedding."""

    def __init__(self, file: BinaryIO, width: int) -> None:
        del width
        self._file = file

    def write(self, texts: Sequence[str], vectors: Vectors) -> None:
        for text, vector in zip(texts, vectors, strict=True):
            row = {"text": text, "embedding": [float(f"{v:.9g}") for v in vector]}
            self._file.write(json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n")

    def finish(self, rows: int) -> None:
        del rows


class _Parquet:
    """Columns text and embedding; what is written at a time is a row group."""

    def __init__(self, file: BinaryIO, width: int) -> None:
        self._arrow, parquet = _pyarrow()
        kind = self._arrow.list_(self._arrow.float32(), width)
        self._schema = self._arrow.schema([("text", self._arrow.string()), ("embedding", kind)])
        self._writer = parquet.ParquetWriter(file, self._schema)

    def write(self, texts: Sequence[str], vectors: Vectors) -> None:
        flat = self._arrow.array(np.ascontiguousarray(vectors).reshape(-1))
        column = self._arrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
        columns = [self._arrow.array(list(texts), self._arrow.string()), column]
        self._writer.write_table(self._arrow.table(columns, schema=self._schema))

    def finish(self, rows: int) -> None:
        del rows
        self._writer.close()


FORMATS: dict[str, type[_Npy] | type[_Jsonl] | type[_Parquet]] = {
    ".npy": _Npy,
    ".jsonl": _Jsonl,
    ".parquet": _Parquet,
}


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
