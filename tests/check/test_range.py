"""What a file computes in float16 is asked of the file itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import featherbed
from featherbed.check.range import check_range
from featherbed.errors import OptionError
from featherbed.folder import graph_name
from featherbed.make.variant import made
from featherbed.make.write import write_graph
from featherbed.recipe import RECIPES
from featherbed.steps import Static
from tests.conftest import FIXTURES, NAMES, planted, reference_of, upstream


@pytest.mark.parametrize("recipe", ["fp16", "q4f16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_within_the_range_tells_its_largest_value(folders: dict[str, Path], name: str, recipe: str) -> None:
    largest = check_range(folders[name] / graph_name(RECIPES[recipe].suffix), upstream(name).rows, 0)
    assert 1 < largest < 1000


@pytest.mark.parametrize("limit", [0, 10**9])
def test_weights_beside_a_graph_are_found_and_shapes_may_be_fixed(tmp_path: Path, limit: int) -> None:
    steps = (*RECIPES["fp16"].steps, Static(2, 40))
    write_graph(
        made(reference_of(FIXTURES / "bert-cls"), steps, None).graph, tmp_path / "m.onnx", {}, inline_limit_bytes=limit
    )
    assert (tmp_path / "m.onnx_data").is_file() == (limit == 0)
    assert check_range(tmp_path / "m.onnx", upstream("bert-cls").rows, 0) > 1


def test_a_build_whose_activations_pass_float16_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    source = planted("qwen3-tied", "norms", factor=1e5)  # a norm's output, which float16 must carry
    with pytest.raises(OptionError, match=r"model_fp16 in float16: expected values within ±65504.*found .* at \S+"):
        featherbed.build(source, tmp_path / "out", ["fp16"], check=False)
    assert not (tmp_path / "out").exists()


def test_massive_activations_of_a_gated_layer_are_taken(tmp_path: Path) -> None:
    source = planted("qwen3-tied", "down", factor=3000.0)
    folder = featherbed.build(source, tmp_path / "out", ["fp16"], check=False).folder
    vectors = [featherbed.Embedder(folder, v).encode(upstream("qwen3-tied").texts) for v in ("fp32", "fp16")]
    assert float((vectors[0] * vectors[1]).sum(1).min()) >= 0.999
    assert np.isfinite(vectors[1]).all()
