"""What most tests share: the small checkpoints of tests/fixtures, and model folders built from them once."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import plant
import pytest
from filelock import FileLock
from hypothesis import settings
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import featherbed
from featherbed.make.calibrate.texts import Calibration, calibration
from featherbed.make.checkpoint import SINGLE, open_checkpoint
from featherbed.make.graph import reference_graph
from featherbed.make.graph.lower import lower
from featherbed.make.ir import Graph
from featherbed.make.variant import made
from featherbed.make.write import model_bytes
from featherbed.probe import read_probe
from featherbed.recipe import RECIPES
from featherbed.run.tokens import Tokenizer
from featherbed.spec import read_spec

settings.register_profile("shared-machine", deadline=None)  # no test depends on wall-clock time
settings.load_profile("shared-machine")

Vectors = npt.NDArray[np.float32]
FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ("bert-mean", "bert-cls", "qwen3-tied", "qwen3-biased")
CALIBRATION = FIXTURES / "calibration.jsonl"  # a dozen short texts: the shipped ones take seconds a recipe


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


def reference_of(folder: Path) -> Graph:
    """The reference graph of a checkpoint."""
    return reference_graph(open_checkpoint(folder), read_spec(folder))


@cache
def texts_for(folder: Path, probe: Path = CALIBRATION) -> Calibration:
    """The texts of ``probe`` as calibration for a checkpoint."""
    spec = read_spec(folder)
    return calibration(read_probe([probe]), Tokenizer(folder, spec), spec, 2**16)


@cache
def planted(name: str, *where: str, factor: float = 30.0) -> Path:
    """A fixture whose norms, up projections or values make outliers, and that computes the same; made once."""
    root = Path(tempfile.mkdtemp(prefix="planted-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    whole = Path(shutil.copytree(FIXTURES / name, root / "whole"))
    shards = sorted(whole.glob("model-*.safetensors"))
    if shards:
        save_file({key: value for shard in shards for key, value in load_file(shard).items()}, whole / SINGLE)
        for path in (*shards, whole / "model.safetensors.index.json"):
            path.unlink()
    plant.plant(whole, root / name, where, factor)
    return root / name


def ran(graph: Graph, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64]) -> tuple[Vectors, Vectors]:
    """onnxruntime's (last_hidden_state [B, T, D], sentence_embedding [B, D]) of a graph."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session: Any = ort.InferenceSession(model_bytes(lower(graph)), options, providers=["CPUExecutionProvider"])
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    declared = [port.name for port in session.get_inputs()]
    hidden, vectors = session.run(["last_hidden_state", "sentence_embedding"], {name: feeds[name] for name in declared})
    return hidden, vectors


def cosines_of(found: Vectors, expected: Vectors) -> npt.NDArray[np.float64]:
    """Cosines of rows [N, D], in float64."""
    a, b = found.astype(np.float64), expected.astype(np.float64)
    return np.asarray((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1), np.float64)


def assert_same_function(found: Graph, expected: Graph, name: str) -> None:
    """Every real token's hidden state and every vector: cosine > 0.99999 (pitfall 16)."""
    known = upstream(name)
    hidden, vectors = ran(found, known.ids, known.mask)
    expected_hidden, expected_vectors = ran(expected, known.ids, known.mask)
    real = known.mask > 0
    assert cosines_of(vectors, expected_vectors).min() > 0.99999
    assert cosines_of(hidden[real], expected_hidden[real]).min() > 0.99999
    sizes = np.linalg.norm(hidden[real], axis=1) / np.linalg.norm(expected_hidden[real], axis=1)
    assert np.abs(sizes - 1).max() < 1e-4


@cache
def made_by(name: str, recipe: str) -> Graph:
    """A fixture's graph after a recipe, in onnxruntime's operators; made once."""
    return made(reference_of(FIXTURES / name), RECIPES[recipe].steps, texts_for(FIXTURES / name)).graph


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
    """A model folder with every recipe for each fixture, not verified. Do not change them: copy first.

    Built once a run: processes of pytest-xdist share them.
    """
    own = tmp_path_factory.getbasetemp()
    root = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "folders"
    for name in NAMES:
        root.mkdir(exist_ok=True)
        with FileLock(root / f"{name}.lock"):
            if not (root / name).is_dir():
                featherbed.build(FIXTURES / name, root / name, list(RECIPES), check=False, calibration=CALIBRATION)
    return {name: root / name for name in NAMES}


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
