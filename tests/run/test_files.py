"""Files of texts in, files of vectors out: nothing lost, nothing half-written."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featherbed.errors import EngineError, MissingError, OptionError, OutputError, TextError
from featherbed.run import files
from featherbed.run.files import VectorFile, check_inputs, check_output

Vectors = npt.NDArray[np.float32]
TEXTS = ["rain", "", "späť 雨 ☔", 'a "quoted"\nline\u2028end']
VECTORS = np.random.default_rng(5).normal(size=(4, 7)).astype(np.float32)


def read_texts(path: str, field: str = "text") -> list[str]:
    return list(files.read_texts(path, field))


def write_vectors(path: Path, texts: list[str], vectors: Vectors, pieces: int = 1) -> None:
    """All vectors, in so many pieces."""
    cuts = np.linspace(0, len(texts), pieces + 1).round().astype(int)
    with VectorFile(path, vectors.shape[1]) as file:
        for start, end in itertools.pairwise(cuts):
            file.write(texts[start:end], vectors[start:end])
        assert file.rows == len(texts)


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str, bytes | str], str]:
    def write(name: str, content: bytes | str) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return str(path)

    return write


Written = Callable[[str, bytes | str], str]


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ("one\ntwo\n", ["one", "two"]),
        ("one\ntwo", ["one", "two"]),
        ("one\r\ntwo\r\n", ["one", "two"]),
        ("one\r\n\r\ntwo", ["one", "", "two"]),
        ("\none\n\n\ntwo\n\n", ["", "one", "", "", "two", ""]),
        ("\n", [""]),
        ("", []),
        (" one \n\ttwo", [" one ", "\ttwo"]),
        ("one\u2028still one\x0cand\x85still\rone", ["one\u2028still one\x0cand\x85still\rone"]),
        ("\ufeffone\ntwo", ["one", "two"]),
        ("\ufeff", []),
        ("\ufeff\n\ufeff", ["", "\ufeff"]),
    ],
)
def test_a_text_file_has_a_text_a_line(written: Written, content: str, texts: list[str]) -> None:
    assert read_texts(written("a.txt", content)) == texts


@settings(deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_characters="\n\r\ufeff", exclude_categories=["Cs"]))))
def test_any_lines_come_back_whatever_the_line_ends(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "lines.txt"
    for end in ("\n", "\r\n"):
        path.write_bytes("".join(text + end for text in texts).encode("utf-8"))
        assert read_texts(str(path)) == texts


def test_standard_input_has_a_text_a_line_and_stays_open(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "piped").write_bytes("one\r\n\r\nzwölf".encode())
    with (tmp_path / "piped").open(encoding="ascii") as piped:
        monkeypatch.setattr(sys, "stdin", piped)
        assert read_texts("-") == ["one", "", "zwölf"]
        assert read_texts("-") == []
        os.fstat(piped.fileno())


def test_json_lines_have_the_text_in_a_field(written: Written) -> None:
    rows = [{"text": text, "id": at, "body": text.upper()} for at, text in enumerate(TEXTS)]
    lines = "\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    assert read_texts(written("a.jsonl", lines)) == TEXTS
    assert read_texts(written("a.JSONL", lines), "body") == [text.upper() for text in TEXTS]


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "3", '"text"', '{"body": "x"}', '{"text": null}', '{"text": 3}', "[" * 100_000, "9" * 5000],
    ids=lambda line: line[:16],
)
def test_a_bad_json_line_is_named(written: Written, line: str) -> None:
    path = written("a.jsonl", f'{{"text": "fine"}}\n\n{line}\n{{"text": "fine"}}\n')
    with pytest.raises(TextError, match=r"^line 3 of .*a\.jsonl: expected a text under 'text'") as caught:
        read_texts(path)
    assert len(str(caught.value)) < 400


def test_comma_separated_values_have_the_text_in_a_column(written: Written) -> None:
    content = 'id,text,"the body"\n1,"a, b",x\r\n2,"two\nlines",y\n3,,z\n4,"a ""quoted"" word",\n'
    assert read_texts(written("a.csv", content)) == ["a, b", "two\nlines", "", 'a "quoted" word']
    assert read_texts(written("a.csv", "\ufeff" + content), "the body") == ["x", "y", "z", ""]


@pytest.mark.parametrize(
    ("content", "line"),
    [("id,text\n1,a\n2\n", 3), ('id,text\n1,"a\nb"\n2\n', 4), ("id,body\n1,a\n", 2)],
    ids=["a short row", "a short row after two lines in a cell", "no such column"],
)
def test_a_row_without_its_column_is_named(written: Written, content: str, line: int) -> None:
    with pytest.raises(TextError, match=rf"^line {line} of .*a\.csv: expected a text under 'text'"):
        read_texts(written("a.csv", content))


@pytest.mark.parametrize("row", ['1,"a"b', '1,"never closed'])
def test_a_row_that_cannot_be_parsed_is_named(written: Written, row: str) -> None:
    with pytest.raises(TextError, match=r"line 3 of .*a\.csv"):
        read_texts(written("a.csv", f"id,text\n0,fine\n{row}\n"))


def test_a_long_document_in_a_cell_is_read_whole(written: Written) -> None:
    document = "rain " * 40_000
    assert read_texts(written("a.csv", f"id,text\n1,{document}\n")) == [document]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
def test_what_is_not_utf8_is_an_error_that_names_the_line(written: Written, suffix: str) -> None:
    lines = {".txt": "eins\nzwölf\n", ".jsonl": '{"text": "eins"}\n{"text": "zwölf"}\n', ".csv": "text\nzwölf\n"}
    path = written(f"a{suffix}", lines[suffix].encode("latin-1"))
    with pytest.raises(TextError, match=rf"^line 2 of .*a\{suffix}: expected text in UTF-8, found the byte 0xf6"):
        read_texts(path)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
def test_texts_are_read_as_they_are_asked_for(written: Written, suffix: str) -> None:
    first = {".txt": "rain\n", ".jsonl": '{"text": "rain"}\n', ".csv": "text\nrain\n"}[suffix]
    path = written(f"a{suffix}", first.encode() + b"\xff\n")
    texts = files.read_texts(path)
    assert next(texts) == "rain"
    with pytest.raises(TextError, match="expected text in UTF-8"):
        next(texts)


def test_a_file_that_is_not_read_to_its_end_is_closed(written: Written) -> None:
    def is_open() -> bool:
        return Path(path).resolve() in {link.resolve() for link in Path("/proc/self/fd").iterdir()}

    path = written("a.txt", "one\ntwo\n")
    texts = files.read_texts(path)
    assert next(texts) == "one"
    looked = Path("/proc/self/fd").is_dir()
    assert not looked or is_open()
    texts.close()  # type: ignore[attr-defined]  # a generator
    assert not looked or not is_open()


@pytest.mark.parametrize("name", ["a.pdf", "a", "a.txt.gz", ".txt"])
def test_an_unknown_suffix_lists_the_known_ones(written: Written, name: str) -> None:
    path = written(name, "rain")
    for read in (read_texts, lambda path: check_inputs(["-", path])):
        with pytest.raises(OptionError, match=r"expected a file ending in \.txt, \.jsonl, \.csv"):
            read(path)


@pytest.mark.parametrize("name", ["absent.txt", "folder.txt"])
def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.txt").mkdir()
    for read in (read_texts, lambda path: check_inputs([path])):
        with pytest.raises(TextError, match=rf"^input .*{name}: expected a readable file"):
            read(str(tmp_path / name))


def test_standard_input_can_be_named_once(written: Written) -> None:
    check_inputs(["-", written("a.txt", "rain"), written("b.CSV", "text\n")])
    with pytest.raises(OptionError, match=r"^input -: expected standard input once"):
        check_inputs(["-", written("a.txt", "rain"), "-"])


def test_an_array_file_comes_back_bit_by_bit(tmp_path: Path) -> None:
    write_vectors(tmp_path / "v.npy", TEXTS, VECTORS)
    back = np.load(tmp_path / "v.npy", allow_pickle=False)
    assert back.dtype == np.float32
    assert np.array_equal(back, VECTORS)


@settings(deadline=None)
@given(rows=st.integers(0, 40), width=st.integers(1, 9), pieces=st.integers(1, 6))
def test_an_array_written_in_pieces_is_the_array(
    tmp_path_factory: pytest.TempPathFactory, rows: int, width: int, pieces: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "pieces.npy"
    vectors = np.random.default_rng(rows).normal(size=(rows, width)).astype(np.float32)
    write_vectors(path, ["rain"] * rows, np.asfortranarray(vectors), pieces)
    assert np.array_equal(np.load(path, allow_pickle=False), vectors)
    assert np.array_equal(np.load(path, mmap_mode="r"), vectors)
    assert path.stat().st_size == files.NPY_HEAD_BYTES + vectors.nbytes


def test_the_head_of_an_array_has_room_for_any_number_of_rows() -> None:
    file = io.BytesIO()
    head = files._Npy(file, 65_536)
    head.finish(10**15)
    assert len(file.getvalue()) == files.NPY_HEAD_BYTES
    file.seek(0)
    assert np.lib.format.read_magic(file) == (1, 0)
    assert np.lib.format.read_array_header_1_0(file) == ((10**15, 65_536), False, np.dtype("<f4"))


@pytest.mark.parametrize("suffix", [".npy", ".jsonl"])
def test_vectors_are_in_the_file_before_the_last_are_known(tmp_path: Path, suffix: str) -> None:
    vectors = np.ones((10_000, 7), np.float32)
    with VectorFile(tmp_path / f"v{suffix}", 7) as file:
        file.write(["rain"] * len(vectors), vectors)
        (begun,) = tmp_path.iterdir()
        assert begun.name != f"v{suffix}"
        assert begun.stat().st_size > vectors.nbytes // 2
    assert [path.name for path in tmp_path.iterdir()] == [f"v{suffix}"]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_vector_that_is_not_finite_is_named_by_its_place_and_nothing_is_left(tmp_path: Path, bad: float) -> None:
    vectors = np.concatenate([VECTORS, VECTORS])
    vectors[5, 3] = bad
    with pytest.raises(EngineError, match=r"^vector 5: expected finite numbers"):
        write_vectors(tmp_path / "v.npy", TEXTS * 2, vectors, pieces=2)
    assert list(tmp_path.iterdir()) == []


def read_parquet(path: Path) -> tuple[list[str], Vectors, int]:
    """Texts, vectors and the number of row groups."""
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(path)
    vectors = np.array(table["embedding"].to_pylist(), np.float32).reshape(len(table), -1)
    return table["text"].to_pylist(), vectors, parquet.ParquetFile(path).num_row_groups


def test_a_parquet_file_carries_the_texts_and_the_vectors_a_row_group_a_piece(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    texts, vectors = [text.replace("\n", " ") for text in TEXTS * 3], np.concatenate([VECTORS] * 3)
    write_vectors(tmp_path / "v.parquet", texts, vectors, pieces=3)
    found, back, groups = read_parquet(tmp_path / "v.parquet")
    assert (found, groups) == (texts, 3)
    assert np.array_equal(back, vectors)


def test_a_parquet_file_of_no_texts_has_its_columns(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    write_vectors(tmp_path / "v.parquet", [], np.empty((0, 7), np.float32))
    schema = parquet.read_schema(tmp_path / "v.parquet")
    assert schema.names == ["text", "embedding"]
    assert schema.field("embedding").type.list_size == 7


def read_rows(path: Path) -> tuple[list[str], Vectors]:
    rows = [json.loads(line) for line in path.read_text("utf-8").removesuffix("\n").split("\n")]
    assert all(row.keys() == {"text", "embedding"} for row in rows)
    return [row["text"] for row in rows], np.array([row["embedding"] for row in rows], np.float32)


def test_json_lines_carry_the_texts_and_the_vectors(tmp_path: Path) -> None:
    write_vectors(tmp_path / "v.jsonl", TEXTS, VECTORS)
    texts, vectors = read_rows(tmp_path / "v.jsonl")
    assert texts == TEXTS
    assert np.abs(vectors - VECTORS).max() <= 2e-7 * np.abs(VECTORS).max()


def test_json_lines_give_every_float_back_exactly(tmp_path: Path) -> None:
    vectors = np.random.default_rng(6).normal(size=(50, 48)).astype(np.float32)
    write_vectors(tmp_path / "v.jsonl", ["rain"] * 50, vectors)
    assert np.array_equal(read_rows(tmp_path / "v.jsonl")[1], vectors)


def test_what_was_written_as_json_lines_can_be_embedded_again(tmp_path: Path) -> None:
    write_vectors(tmp_path / "v.jsonl", TEXTS, VECTORS)
    assert read_texts(str(tmp_path / "v.jsonl")) == TEXTS


def test_no_texts_make_an_empty_array(tmp_path: Path) -> None:
    write_vectors(tmp_path / "v.npy", [], np.empty((0, 7), np.float32))
    assert np.load(tmp_path / "v.npy").shape == (0, 7)
    write_vectors(tmp_path / "v.jsonl", [], np.empty((0, 7), np.float32))
    assert (tmp_path / "v.jsonl").read_bytes() == b""


def fail(*_: Any, **__: Any) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_then_fail(self: Any, *_: Any, **__: Any) -> NoReturn:
    self._file.write(b"half")
    fail()


FAULTS: dict[str, tuple[object, str, Callable[..., NoReturn]]] = {
    "open": (Path, "open", fail),
    "head": (files._Npy, "_head", half_then_fail),
    "write": (files._Npy, "write", half_then_fail),
    "finish": (files._Npy, "finish", half_then_fail),
    "fsync": (os, "fsync", fail),
    "rename": (Path, "replace", fail),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("old", [b"old", None])
def test_a_failing_write_leaves_the_old_file_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, old: bytes | None
) -> None:
    path = tmp_path / "v.npy"
    if old is not None:
        path.write_bytes(old)
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises(OutputError, match="found No space left on device"):
        write_vectors(path, TEXTS, VECTORS)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == ({} if old is None else {"v.npy": old})
    write_vectors(path, TEXTS, VECTORS)
    assert [p.name for p in tmp_path.iterdir()] == ["v.npy"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
@pytest.mark.parametrize("suffix", [".npy", ".jsonl", ".parquet"])
@pytest.mark.parametrize("old", [b"old", None])
def test_an_interrupt_between_two_pieces_leaves_the_old_file_and_no_temporary(
    tmp_path: Path, suffix: str, error: type[BaseException], old: bytes | None
) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"v{suffix}"
    if old is not None:
        path.write_bytes(old)

    def write_and_stop() -> None:
        with VectorFile(path, 7) as file:
            file.write(TEXTS, VECTORS)
            raise error

    with pytest.raises(error):
        write_and_stop()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == ({} if old is None else {path.name: old})


def test_an_interrupt_at_the_very_end_leaves_the_old_file_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> NoReturn:
        raise KeyboardInterrupt

    path = tmp_path / "v.jsonl"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_vectors(path, TEXTS, VECTORS)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"v.jsonl": b"old"}


def test_a_folder_in_the_place_of_the_output_is_an_error_and_stays(tmp_path: Path) -> None:
    (tmp_path / "v.npy").mkdir()
    for write in (check_output, lambda path: write_vectors(path, TEXTS, VECTORS)):
        with pytest.raises(OutputError, match="found a folder"):
            write(tmp_path / "v.npy")
    assert [p.name for p in tmp_path.iterdir()] == ["v.npy"]
    assert (tmp_path / "v.npy").is_dir()


@pytest.mark.parametrize("name", ["v.csv", "v", "v.npz", "-"])
def test_an_output_of_an_unknown_suffix_lists_the_known_ones(tmp_path: Path, name: str) -> None:
    with pytest.raises(OptionError, match=r"expected a file ending in \.npy, \.jsonl, \.parquet"):
        check_output(tmp_path / name)


def test_an_output_in_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="expected a folder that exists"):
        check_output(tmp_path / "absent" / "v.npy")


def test_an_output_in_the_current_folder_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_output(Path("v.npy"))


@pytest.mark.parametrize("absent", ["pyarrow", "pyarrow.parquet"])
def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absent: str) -> None:
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(MissingError, match=r"pip install 'featherbed\[parquet\]'") as caught:
        check_output(tmp_path / "v.parquet")
    assert caught.value.exit_code == 3
