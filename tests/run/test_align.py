"""Saved weights at addresses that kernels may read them at: the same bytes, elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from featherbed.run.align import BYTES, align


def saved(folder: Path, lengths: list[tuple[int, ...]], gap: int = 0) -> tuple[Any, list[bytes]]:
    """A graph whose i-th weight has ``lengths[i]``: its own bytes, then those of each kernel; and all of these."""
    data = b""
    parts: list[bytes] = []

    def put(length: int) -> int:
        nonlocal data
        data += b"\xff" * gap
        at = len(data)
        parts.append(bytes((len(parts) * 7 + i) % 251 for i in range(length)))
        data += parts[-1]
        return at

    weights = []
    for i, (own, *made) in enumerate(lengths):
        tensor = TensorProto(name=f"w{i}", dims=[own], data_type=TensorProto.UINT8)
        tensor.data_location = TensorProto.EXTERNAL
        values = {"location": "engine.data", "offset": str(put(own)), "length": str(own)}
        if made:
            values["prepacked_0"] = "|".join(["Kernel+7", *(f"{put(n)};{n};{9 + n}" for n in made)])
        for key, value in values.items():
            tensor.external_data.add(key=key, value=value)
        weights.append(tensor)
    (folder / "engine.data").write_bytes(data)
    return helper.make_model(helper.make_graph([], "g", [], [], weights)), parts


def read(model: Any, folder: Path) -> tuple[list[int], list[bytes]]:
    """Offsets of everything a graph names, and the bytes there."""
    data, offsets, parts = (folder / "engine.data").read_bytes(), [], []
    for tensor in model.graph.initializer:
        said = {entry.key: entry.value for entry in tensor.external_data}
        places = [(said["offset"], said["length"])]
        places += [tuple(place.split(";")[:2]) for place in said.get("prepacked_0", "").split("|")[1:]]
        for offset, length in places:
            offsets.append(int(offset))
            parts.append(data[int(offset) : int(offset) + int(length)])
    return offsets, parts


@given(st.lists(st.lists(st.integers(0, 300), min_size=1, max_size=3).map(tuple), min_size=1, max_size=6))
def test_every_byte_is_where_the_graph_says_and_every_address_divides(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[tuple[int, ...]]
) -> None:
    folder = tmp_path_factory.mktemp("saved")
    model, parts = saved(folder, lengths)
    before = (folder / "engine.data").read_bytes()
    crooked = any(offset % BYTES for offset in read(model, folder)[0])
    assert align(model, folder) == crooked
    offsets, found = read(model, folder)
    assert found == parts
    assert not any(offset % BYTES for offset in offsets)
    if not crooked:
        assert (folder / "engine.data").read_bytes() == before
    assert [p.name for p in folder.iterdir()] == ["engine.data"]


def test_lengths_and_hashes_of_what_kernels_made_stay_as_they_were(tmp_path: Path) -> None:
    model, _ = saved(tmp_path, [(10, 126), (64,)])
    assert align(model, tmp_path)
    said = {entry.key: entry.value for entry in model.graph.initializer[0].external_data}
    assert said["prepacked_0"] == "Kernel+7|64;126;135"


def test_a_graph_without_outside_weights_is_left_alone(tmp_path: Path) -> None:
    model = onnx.ModelProto()
    model.graph.initializer.add(name="w", dims=[1], data_type=TensorProto.UINT8, raw_data=b"1")
    assert not align(model, tmp_path)
    assert list(tmp_path.iterdir()) == []
