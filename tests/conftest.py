"""What most tests share: the small checkpoints of tests/fixtures, and model folders built from them once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings
from safetensors import safe_open

import featherbed
from featherbed.recipe import RECIPES

settings.register_profile("shared-machine", deadline=None)  # no test depends on wall-clock time
settings.load_profile("shared-machine")

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ("bert-mean", "bert-cls", "qwen3-tied", "qwen3-biased")


@dataclass(frozen=True)
class Upstream:
    """transformers' own output for a fixture: texts, ids [N, T], mask [N, T], vectors [N, D] unnormalised."""

    texts: list[str]
    ids: npt.NDArray[np.int64]
    mask: npt.NDArray[np.int64]
    vectors: npt.NDArray[np.float32]

    @property
    def rows(self) -> list[list[int]]:
        return [[int(i) for i in row[real > 0]] for row, real in zip(self.ids, self.mask, strict=True)]

    @property
    def unit(self) -> npt.NDArray[np.float32]:
        return np.asarray(self.vectors / np.linalg.norm(self.vectors, axis=1, keepdims=True), np.float32)


def upstream(name: str) -> Upstream:
    with safe_open(FIXTURES / name / "reference.safetensors", "np") as file:
        texts = json.loads(file.metadata()["texts"])
        return Upstream(texts, *(file.get_tensor(k) for k in ("input_ids", "attention_mask", "embeddings")))


@pytest.fixture(scope="session", autouse=True)
def users_caches_are_left_alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Caches are elsewhere for as long as tests run, in processes they start as well."""
    root = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEATHERBED_CACHE", str(root / "featherbed"))
        patch.setenv("XDG_CACHE_HOME", str(root))
        yield


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model folder with every recipe for each fixture, not verified. Do not change them: copy first."""
    root = tmp_path_factory.mktemp("folders")
    built = {}
    for name in NAMES:
        built[name] = featherbed.build(FIXTURES / name, root / name, list(RECIPES), check=False).folder
    return built


@pytest.fixture
def copied(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A private copy of one of ``folders``, to be damaged."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(folders[name], tmp_path / f"{name}-copy"))

    return copy


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[[str], Path]:
    """A private copy of a fixture checkpoint, to be damaged."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(FIXTURES / name, tmp_path / name))

    return copy
