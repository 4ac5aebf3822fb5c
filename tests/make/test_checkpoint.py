"""The checkpoint reader against the safetensors library, and each way a checkpoint can be broken."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from featherbed.errors import CheckpointError
from featherbed.make import checkpoint as module
from featherbed.make.checkpoint import open_checkpoint
from tests.conftest import FIXTURES, NAMES

Bits = npt.NDArray[np.uint32]


def safetensors(path: Path, header: object, data: bytes) -> Path:
    """A file of this header, as JSON or as it is, and these bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def folder_of(folder: Path, header: object, data: bytes) -> Path:
    """A checkpoint folder of one such file."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}", "utf-8")
    safetensors(folder / "model.safetensors", header, data)
    return folder


def tensor(dtype: str, shape: list[Any], begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def bits(array: npt.ArrayLike) -> Bits:
    return np.ascontiguousarray(array, np.float32).view(np.uint32)


def refused(act: Callable[[], object]) -> str:
    """The one line of the CheckpointError that ``act`` ends in."""
    with pytest.raises(CheckpointError) as caught:
        act()
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert ": expected " in text
    assert ", found " in text
    assert caught.value.exit_code == 2
    return text


# what is read


@pytest.mark.parametrize("name", ["bert-mean", "bert-cls", "qwen3-biased"])
def test_every_tensor_of_a_fixture_is_what_the_safetensors_library_reads(name: str) -> None:
    opened = open_checkpoint(FIXTURES / name)
    seen: set[str] = set()
    for path in sorted((FIXTURES / name).glob("model*.safetensors")):
        with safe_open(path, "np") as theirs:
            for key in theirs.keys():  # noqa: SIM118 - the handle itself is not iterable
                expected = theirs.get_tensor(key)
                ours = opened.weight(key, expected.shape).array()
                assert ours.dtype == np.float32
                assert np.array_equal(bits(ours), bits(expected.astype(np.float32))), key
                seen.add(key)
    assert seen == set(opened.entries)
    assert len(seen) > 10


def test_shards_are_read_as_one_checkpoint() -> None:
    opened = open_checkpoint(FIXTURES / "qwen3-biased")
    assert {entry.path.name for entry in opened.entries.values()} == {
        f"model-0000{part}-of-00003.safetensors" for part in (1, 2, 3)
    }


def test_bfloat16_widens_as_two_zero_bytes_behind_each_value() -> None:
    opened = open_checkpoint(FIXTURES / "qwen3-tied")
    for name, entry in opened.entries.items():
        assert entry.dtype == "BF16"
        raw = entry.path.read_bytes()[entry.offset : entry.offset + 2 * int(np.prod(entry.shape))]
        plain = [struct.unpack("<I", b"\0\0" + raw[at : at + 2])[0] for at in range(0, len(raw), 2)]
        assert bits(opened.weight(name, entry.shape).array()).ravel().tolist() == plain


@given(patterns=st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=40))
def test_every_bfloat16_pattern_keeps_its_bits(tmp_path_factory: pytest.TempPathFactory, patterns: list[int]) -> None:
    size = len(patterns)
    header = {"w": tensor("BF16", [size], 0, 2 * size)}
    folder = folder_of(tmp_path_factory.mktemp("bf16"), header, struct.pack(f"<{size}H", *patterns))
    weight = open_checkpoint(folder).weight("w", (size,))
    if any(pattern & 0x7F80 == 0x7F80 for pattern in patterns):  # infinity or NaN
        with pytest.raises(CheckpointError, match="NaN or infinity"):
            weight.array()
    else:
        assert bits(weight.array()).tolist() == [pattern << 16 for pattern in patterns]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4)])
def test_a_file_of_the_library_reads_back_whatever_its_shape(
    tmp_path: Path, dtype: type[np.floating[Any]], shape: tuple[int, ...]
) -> None:
    value = np.asarray(np.random.default_rng(1).standard_normal(shape), dtype)
    other = np.arange(6, dtype=np.float32)
    save_file({"a": other, "w": value}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text("{}", "utf-8")
    read = open_checkpoint(tmp_path).weight("w", shape).array()
    assert read.shape == shape
    assert np.array_equal(bits(read), bits(value.astype(np.float32)))


@given(rows=st.integers(1, 60), columns=st.integers(1, 9), limit=st.integers(1, 300), dtype=st.sampled_from("fhb"))
def test_blocks_of_a_large_tensor_concatenate_exactly(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, limit: int, dtype: str
) -> None:
    value = np.random.default_rng(rows * columns).integers(0, 0x7C00, rows * columns).astype("<u2")
    kind, data, width = {
        "f": ("F32", value.astype("<f4").tobytes(), 4),
        "h": ("F16", value.view("<f2").tobytes(), 2),
        "b": ("BF16", value.tobytes(), 2),
    }[dtype]
    header = {"w": tensor(kind, [rows, columns], 0, width * rows * columns)}
    folder = folder_of(tmp_path_factory.mktemp("blocks"), header, data)
    weight = open_checkpoint(folder).weight("w", (rows, columns))
    whole = weight.array()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_BYTES", limit)
        parts = list(weight.read())
    assert all(part.nbytes <= max(limit, 4 * columns) for part in parts)
    assert all(part.flags.c_contiguous and part.dtype == np.float32 for part in parts)
    assert np.array_equal(bits(np.concatenate(parts)), bits(whole))
    assert weight.size_bytes == whole.nbytes


def test_a_tensor_larger_than_the_memory_is_not_read_whole(tmp_path: Path) -> None:
    rows, size = 2**26, 2**38  # a hole of 256 GiB
    raw = json.dumps({"w": tensor("F32", [rows, 1024], 0, size)}).encode()
    (tmp_path / "config.json").write_text("{}", "utf-8")
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + size)
    first = next(open_checkpoint(tmp_path).weight("w", (rows, 1024)).read())
    assert first.nbytes <= module.BLOCK_BYTES
    assert not first.any()


# what is refused


def test_a_missing_folder_is_said_to_be_missing(tmp_path: Path) -> None:
    assert "nothing there" in refused(lambda: open_checkpoint(tmp_path / "nowhere"))


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"x")
    assert "a file" in refused(lambda: open_checkpoint(tmp_path / "a.safetensors"))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (None, "no such file"),
        ("", "JSONDecodeError"),
        ("{", "JSONDecodeError"),
        ("[1]", "list"),
        ("[" * 100_000, "RecursionError"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        ("<!DOCTYPE html>\n<html>\n</html>\n", "JSONDecodeError"),
    ],
)
def test_a_config_that_is_no_object_is_refused(checkpoint: Callable[[str], Path], text: str | None, found: str) -> None:
    folder = checkpoint("bert-cls")
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text, "utf-8")
    line = refused(lambda: open_checkpoint(folder))
    assert "config.json" in line
    assert found in line


@pytest.mark.parametrize("part", range(64))
def test_a_file_cut_at_any_64th_of_its_length_is_refused(checkpoint: Callable[[str], Path], part: int) -> None:
    folder = checkpoint("qwen3-tied")
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) * part // 64])
    assert "model.safetensors" in refused(lambda: open_checkpoint(folder))


def test_bytes_behind_the_last_tensor_are_refused(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("bert-cls")
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    size = (folder / "model.safetensors").stat().st_size
    assert f"expected {size - 1} bytes as its header says, found {size} bytes" in refused(
        lambda: open_checkpoint(folder)
    )


@pytest.mark.parametrize("length", [0, 1, 2**20, 100 * 2**20 + 1, 2**63, 2**64 - 1])
def test_a_header_length_that_lies_is_refused(checkpoint: Callable[[str], Path], length: int) -> None:
    folder = checkpoint("bert-cls")
    path = folder / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    assert f"header would be {length} bytes" in refused(lambda: open_checkpoint(folder))


@pytest.mark.parametrize("change", [-3, -1, 1, 3])
def test_a_header_length_that_is_a_little_off_is_refused(checkpoint: Callable[[str], Path], change: int) -> None:
    folder = checkpoint("bert-cls")
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    trimmed = len(raw[8 : 8 + length].rstrip())  # the library pads its header with spaces
    path.write_bytes((trimmed + change).to_bytes(8, "little") + raw[8 : 8 + trimmed] + raw[8 + length :])
    refused(lambda: open_checkpoint(folder))


@pytest.mark.parametrize(
    "header",
    [
        b"not json at all",
        b"\xff\xfe\xfa\xfb",
        b'{"w": ',
        b"[]",
        b"null",
        b"3",
        b'{"w": null}',
        b'{"w": [1, 2]}',
        b'{"w": {}}',
        b'{"w": {"dtype": "F32", "shape": [1]}}',
        b'{"w": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}',
        b'{"w": {"dtype": "F32", "shape": ["a"], "data_offsets": [0, 4]}}',
        b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}',
        b"[" * 100_000,
    ],
    ids=lambda header: header[:60].decode("latin-1"),
)
def test_a_header_that_is_no_table_of_tensors_is_refused(tmp_path: Path, header: bytes) -> None:
    line = refused(lambda: open_checkpoint(folder_of(tmp_path / "c", header, bytes(4))))
    assert "safetensors header" in line


@pytest.mark.parametrize(
    "header",
    [
        {"w": tensor("F32", [2, 2], 0, 12)},
        {"w": tensor("F32", [2, 2], 0, 20)},
        {"w": tensor("F32", [2, 2], -4, 12)},
        {"w": tensor("F32", [2, 2], 16, 0)},
        {"w": tensor("F32", [-2, -2], 0, 16)},
        {"w": tensor("F32", [2**32, 2**32], 0, 16)},
        {"w": tensor("F32", [2, 2], 2**40, 2**40 + 16)},
        {"w": tensor("F32", [2, 2], "0", "16")},
        {"w": tensor("F32", [2, 2], 0, float("inf"))},
        {"w": tensor("F32", [float("inf")], 0, 16)},
        {"w": tensor("F32", [float("nan")], 0, 16)},
        {"w": tensor("BF16", [2, 2], 0, 16)},
    ],
    ids=str,
)
def test_offsets_that_lie_are_refused(tmp_path: Path, header: dict[str, Any]) -> None:
    refused(lambda: open_checkpoint(folder_of(tmp_path / "c", header, bytes(16))))


@pytest.mark.parametrize(
    "header",
    [
        {"a": tensor("F32", [4], 0, 16), "b": tensor("F32", [4], 0, 16)},
        {"a": tensor("F32", [4], 0, 16), "b": tensor("F32", [4], 8, 24)},
        {"a": tensor("F32", [2], 0, 8), "b": tensor("F32", [2], 16, 24)},
        {"b": tensor("F32", [2], 16, 24)},
    ],
    ids=["twice the same", "overlapping", "a hole", "a hole at the front"],
)
def test_tensors_that_overlap_or_leave_holes_are_refused_as_the_library_does(
    tmp_path: Path, header: dict[str, Any]
) -> None:
    end = max(item["data_offsets"][1] for item in header.values())
    folder = folder_of(tmp_path / "c", header, bytes(end))
    with pytest.raises(SafetensorError), safe_open(folder / "model.safetensors", "np"):
        pass
    refused(lambda: open_checkpoint(folder))


@given(seed=st.integers(0, 2**32), count=st.integers(1, 4))
def test_a_damaged_header_gives_our_error_or_the_bytes_of_the_tensor(
    tmp_path_factory: pytest.TempPathFactory, seed: int, count: int
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    value = np.arange(12, dtype=np.float32).reshape(3, 4)
    header = {"v": tensor("F16", [4], 0, 8), "w": tensor("F32", [3, 4], 8, 56)}
    path = folder_of(folder, header, bytes(8) + value.tobytes()) / "model.safetensors"
    raw = bytearray(path.read_bytes())
    rng = np.random.default_rng(seed)
    for at in rng.integers(0, len(raw) - 56, count):
        raw[at] = rng.choice(np.frombuffer(b'0123456789[]{}",:- FBIw\0\xff', np.uint8))
    path.write_bytes(bytes(raw))
    try:
        read, text = open_checkpoint(folder).weight("w", (3, 4)).array().tobytes(), ""
    except CheckpointError as error:
        read, text = bytes(raw[-48:]), str(error)
    assert read == bytes(raw[-48:])
    assert "\n" not in text


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1200\n", "git lfs pull"),
        (b"version https", "git lfs pull"),
        (b"<!DOCTYPE html>\n<html><body>404</body></html>\n", "not safetensors"),
        (b"", "not safetensors"),
        (b"PK\x03\x04\0\0\0\0\0\0\0\0", "not safetensors"),
    ],
    ids=["a git-lfs pointer", "a cut git-lfs pointer", "an HTML page", "nothing", "a zip file"],
)
def test_a_file_that_is_not_safetensors_is_named_for_what_it_is(
    checkpoint: Callable[[str], Path], content: bytes, remedy: str
) -> None:
    folder = checkpoint("bert-cls")
    (folder / "model.safetensors").write_bytes(content)
    assert remedy in refused(lambda: open_checkpoint(folder))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.gguf"])
def test_a_checkpoint_in_a_format_that_runs_code_is_named_and_not_opened(
    checkpoint: Callable[[str], Path], name: str
) -> None:
    folder = checkpoint("bert-cls")
    (folder / "model.safetensors").rename(folder / name)
    assert f"{name}, which we do not open" in refused(lambda: open_checkpoint(folder))


def test_a_folder_without_weights_is_refused(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("bert-cls")
    (folder / "model.safetensors").unlink()
    assert "found neither" in refused(lambda: open_checkpoint(folder))


def test_a_missing_shard_is_named(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("qwen3-biased")
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors missing" in refused(lambda: open_checkpoint(folder))


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "a/../../outside.safetensors",
        "sub/m.safetensors",
        "..",
        ".",
        "",
        7,
        None,
    ],
)
def test_a_shard_name_that_leaves_the_folder_is_refused_unread(checkpoint: Callable[[str], Path], name: object) -> None:
    folder = checkpoint("qwen3-biased")
    (folder.parent / "outside.safetensors").write_bytes(b"never read this")
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"w": name}}), "utf-8")
    assert repr(name) in refused(lambda: open_checkpoint(folder))


@pytest.mark.parametrize(
    "index",
    [
        {},
        {"weight_map": None},
        {"weight_map": []},
        {"weight_map": {}},
        {"weight_map": {"w": ["a", "b"]}},
        {"weight_map": {"w": {}}},
        {"weight_map": {"v": None, "w": "model-00001-of-00003.safetensors"}},
    ],
    ids=str,
)
def test_an_index_without_a_weight_map_of_names_is_refused(
    checkpoint: Callable[[str], Path], index: dict[str, object]
) -> None:
    folder = checkpoint("qwen3-biased")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    assert "model.safetensors.index.json" in refused(lambda: open_checkpoint(folder))


def test_a_missing_tensor_is_named() -> None:
    opened = open_checkpoint(FIXTURES / "bert-cls")
    assert not opened.has("encoder.layer.9.w")
    line = refused(lambda: opened.weight("encoder.layer.9.w", (2, 3)))
    assert "'encoder.layer.9.w'" in line
    assert "shape [2, 3]" in line


def test_a_tensor_of_another_shape_is_refused_with_both_shapes() -> None:
    opened = open_checkpoint(FIXTURES / "bert-cls")
    line = refused(lambda: opened.weight("embeddings.word_embeddings.weight", (384, 47)))
    assert "expected shape [384, 47] as config.json says, found shape [384, 48]" in line


@pytest.mark.parametrize("dtype", ["I8", "F64", "F8_E4M3", "I64"])
def test_a_type_that_is_no_float_weight_is_refused_when_it_is_asked_for(tmp_path: Path, dtype: str) -> None:
    size = {"I8": 1, "F8_E4M3": 1}.get(dtype, 8)
    header = {"v": tensor("F32", [1], 0, 4), "w": tensor(dtype, [4], 4, 4 + 4 * size)}
    opened = open_checkpoint(folder_of(tmp_path / "c", header, bytes(4 + 4 * size)))
    assert opened.weight("v", (1,)).array().tolist() == [0.0]
    line = refused(lambda: opened.weight("w", (4,)))
    assert f"expected one of F32, F16, BF16, found {dtype}" in line


@pytest.mark.parametrize("name", NAMES)
def test_opening_leaves_the_checkpoint_as_it_was(checkpoint: Callable[[str], Path], name: str) -> None:
    folder = checkpoint(name)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    opened = open_checkpoint(folder)
    for entry_name, entry in opened.entries.items():
        block = next(opened.weight(entry_name, entry.shape).read())
        assert block.size
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
