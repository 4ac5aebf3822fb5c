"""A checkpoint folder: its config and its tensors, mapped from safetensors and never read whole.

We parse the safetensors header ourselves: numpy has no bfloat16, a 600 MB table must come in row blocks,
and each defect deserves a sentence of its own. A test holds this reader against the safetensors library.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featherbed.errors import CheckpointError
from featherbed.make.ir import Weight
from featherbed.modules import dense_modules
from featherbed.spec import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LFS_MARK = b"version https://git-lfs"
HEADER_LIMIT = 100 * 2**20  # the safetensors format's own limit
BF16_EXPONENT = np.uint16(0x7F80)  # all ones: infinity or NaN
BLOCK_BYTES = 16 * 2**20  # float32 bytes a block: large enough for the disk, small beside a table

DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


@dataclass(frozen=True)
class Entry:
    """One tensor in one file: where its bytes lie and what they are."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # from the start of the file


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json and weights; ``entries`` has every tensor by its upstream name.

    Those of Dense modules stand there behind their folder: ``2_Dense/linear.weight``.
    """

    folder: Path
    config: dict[str, Any]
    entries: dict[str, Entry]

    def has(self, name: str) -> bool:
        """Whether a tensor of this name exists."""
        return name in self.entries

    def weight(self, name: str, shape: tuple[int, ...]) -> Weight:
        """The tensor ``name`` as a float32 weight, checked to be of ``shape``; read when written.

        Raises CheckpointError when it is missing, or of another shape or type.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise CheckpointError(
                f"tensor {name!r} of {self.folder}",
                expected=f"float weights of shape {list(shape)}",
                found=f"no such tensor among {len(self.entries)}",
                remedy="fetch the checkpoint again, or check that config.json belongs to these weights",
            )
        if entry.shape != shape:
            raise CheckpointError(
                f"tensor {name!r} in {entry.path.name}",
                expected=f"shape {list(shape)} as config.json says",
                found=f"shape {list(entry.shape)}",
                remedy="check that config.json belongs to these weights",
            )
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"tensor {name!r} in {entry.path.name}",
                expected=f"one of {', '.join(DTYPES)}",
                found=entry.dtype,
                remedy="start from the unquantized checkpoint",
            )
        return Weight(name, np.dtype("<f4"), shape, lambda: blocks(name, entry))


def blocks(name: str, entry: Entry) -> Iterator[npt.NDArray[np.float32]]:
    """A tensor as float32 row blocks of about ``BLOCK_BYTES``; bfloat16 widens exactly.

    Raises CheckpointError on NaN and infinity: rounded to integers they would no longer be seen.
    """
    if 0 in entry.shape:
        return
    mapped = np.memmap(entry.path, DTYPES[entry.dtype], "r", entry.offset, entry.shape or (1,))
    row_bytes = 4 * math.prod(entry.shape[1:])
    step = max(1, BLOCK_BYTES // row_bytes)
    for start in range(0, mapped.shape[0], step):
        rows = np.asarray(mapped[start : start + step])
        if entry.dtype == "BF16":
            finite = bool(((rows & BF16_EXPONENT) != BF16_EXPONENT).all())
            block = (rows.astype(np.uint32) << 16).view(np.float32)
        else:
            finite = bool(np.isfinite(rows).all())
            block = np.ascontiguousarray(rows, dtype=np.float32)
        if not finite:
            raise CheckpointError(
                f"tensor {name!r} in {entry.path.name}",
                expected="finite numbers",
                found=f"NaN or infinity in rows {start} to {start + len(rows) - 1}",
                remedy="fetch the file again, or ask its author",
            )
        yield block


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read config.json and all tensor headers of a checkpoint folder.

    Raises CheckpointError when the folder, the config or a weights file is missing, cut off or not what it says.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"checkpoint {folder}",
            expected="a folder with config.json, tokenizer.json and model.safetensors",
            found="a file" if folder.exists() else "nothing there",
            remedy="give the folder of a checkpoint, or a Hub id such as owner/name",
        )
    config = read_json(folder / "config.json", CheckpointError)
    entries: dict[str, Entry] = {}
    for path in _weight_files(folder):
        entries.update(_read_header(path))
    for module in dense_modules(folder):
        tensors = _read_header(_present(folder / module.folder / SINGLE))
        entries.update({f"{module.folder}/{name}": entry for name, entry in tensors.items()})
    return Checkpoint(folder, config, entries)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        mapping = read_json(folder / INDEX, CheckpointError).get("weight_map")
        values = list(mapping.values()) if isinstance(mapping, dict) else []
        names = sorted({value for value in values if isinstance(value, str)})
        other = [repr(value) for value in values if not isinstance(value, str)]
        if other:
            names = []
        for name in names:
            if Path(name).name != name or name in {"", ".."}:
                raise CheckpointError(
                    f"{INDEX}",
                    expected="names of files in the same folder",
                    found=repr(name),
                    remedy="fetch the checkpoint again from a source you trust",
                )
        missing = [name for name in names if not (folder / name).is_file()]
        if not names or missing:
            raise CheckpointError(
                f"{folder / INDEX}",
                expected="a weight_map whose files are all there",
                found=f"{missing[0]} missing" if missing else (other or ["no weight_map"])[0],
                remedy="fetch the missing shards",
            )
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    other = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".pkl", ".gguf", ".onnx"})
    raise CheckpointError(
        f"checkpoint {folder}",
        expected=f"{SINGLE} or {INDEX}",
        found=f"{other[0]}, which we do not open" if other else "neither",
        remedy="fetch the safetensors weights of the model",
    )


def _present(path: Path) -> Path:
    if not path.is_file():
        raise CheckpointError(
            f"{path}",
            expected="the weights of a Dense module, which modules.json names",
            found="no such file",
            remedy="fetch the checkpoint again, whole",
        )
    return path


def _read_header(path: Path) -> dict[str, Entry]:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start and LFS_MARK.startswith(start):
            raise CheckpointError(
                f"{path}",
                expected="safetensors weights",
                found=f"a git-lfs pointer of {size} bytes",
                remedy="run `git lfs pull` in the checkpoint's repository",
            )
        length = int.from_bytes(start, "little") if len(start) == 8 else 0
        if not 2 <= length <= min(HEADER_LIMIT, size - 8):
            raise CheckpointError(
                f"{path}",
                expected="a safetensors header within the file",
                found=f"a file of {size} bytes whose header would be {length} bytes",
                remedy="fetch the file again: it is cut off, or not safetensors",
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        entries = {name: _entry(path, 8 + length, item) for name, item in header.items()}
        end = 8 + length + _contiguous(sorted(item["data_offsets"] for item in header.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}",
            expected="a safetensors header in JSON",
            found=f"{type(error).__name__}: {error}",
            remedy="fetch the file again",
        ) from error
    if size != end:
        raise CheckpointError(
            f"{path}",
            expected=f"{end} bytes as its header says",
            found=f"{size} bytes",
            remedy="fetch the file again: it is cut off" if size < end else "fetch the file again",
        )
    return entries


def _contiguous(spans: list[list[int]]) -> int:
    """The end of all tensors' bytes. Raises ValueError where they overlap or leave holes."""
    end = 0
    for begin, following in spans:
        if begin != end:
            raise ValueError(f"tensors that {'overlap' if begin < end else 'leave a hole'} at byte {begin}")
        end = following
    return end


def _entry(path: Path, base: int, item: dict[str, Any]) -> Entry:
    shape, (begin, end), dtype = tuple(item["shape"]), item["data_offsets"], str(item["dtype"])
    if not all(type(n) is int for n in (*shape, begin, end)):
        raise TypeError(f"sizes that are not whole numbers: {shape}, {begin}, {end}")
    if begin < 0 or end < begin or min(shape, default=0) < 0:
        raise ValueError(f"offsets {begin}..{end} of shape {shape}")
    if dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{end - begin} bytes for {dtype} of shape {shape}")
    return Entry(path, dtype, shape, base + begin)
