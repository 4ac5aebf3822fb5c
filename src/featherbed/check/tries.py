"""A model file, loaded in the libraries of others, each in a process of its own, in a Python or Node that has it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featherbed.check.facts import Facts, GraphFile
from featherbed.errors import FeatherbedError
from featherbed.folder import MANIFEST
from featherbed.run.embedder import DOCUMENT_PROMPTS, QUERY_PROMPTS, Embedder
from featherbed.spec import Pooling

SCRIPTS = Path(__file__).parent / "peers"
PYTHON_PEERS = ("onnxruntime", "sentence-transformers", "fastembed", "optimum")
NODE_PEER = "transformers.js"
TIMEOUT_S = 600
SENTENCE = "sentence_embedding"
Text = tuple[str, str]  # kind, "query" or "document"; text
TEXTS: tuple[Text, ...] = (
    ("query", "how do I rotate a matrix?"),
    ("document", "numpy.rot90 turns an array by 90 degrees."),
    ("document", "Rain fell all night, and in the morning the path to the well was a brook of its own."),
)


@dataclass(frozen=True)
class Answer:
    """What a library made of a file: vectors [N, D] of texts one by one, and of all at once; or why there are none.

    ``missing`` names what is not installed: then nothing was tried.
    """

    vectors: npt.NDArray[np.float64] | None = None
    batched: npt.NDArray[np.float64] | None = None
    error: str = ""
    missing: str = ""
    versions: dict[str, str] = field(default_factory=dict)


def job(found: Facts, graph: GraphFile, texts: Sequence[Text]) -> dict[str, Any]:
    """What the scripts of ``peers/`` are told: everything from the folder's own files."""
    prompts = found.said("config_sentence_transformers.json").get("prompts") or {}

    def prompt(names: tuple[str, ...]) -> str:
        return str(next((prompts[name] for name in names if prompts.get(name)), ""))

    ports = graph.seen.outputs if graph.seen else {}
    pad = found.said("config.json").get("pad_token_id")
    pad = pad if isinstance(pad, int) else found.token_id(found.token("pad_token"))
    whole = found.path.resolve()
    return {
        "folder": str(whole),
        "above": str(whole.parent),
        "name": whole.name,
        "file": graph.file,
        "beside": [_beside(graph.file, name) for name in (graph.seen.sidecars if graph.seen else ())],
        "texts": [list(text) for text in texts],
        "prompts": {"query": prompt(QUERY_PROMPTS), "document": prompt(DOCUMENT_PROMPTS)},
        "pooling": (found.pooling or Pooling.MEAN).value,
        "dim": int(found.said("config.json").get("hidden_size") or 0),
        "max_length": found.max_length or 512,
        "pad_id": pad or 0,
        "output": SENTENCE if SENTENCE in ports else next(iter(ports), None),
    }


def _beside(file: str, name: str) -> str:
    return Path(file).with_name(Path(name).name).as_posix()


def in_python(python: Path, peer: str, told: dict[str, Any]) -> Answer:
    """The answer of a library that ``python`` has."""
    return answered([str(python), str(SCRIPTS / "python.py"), peer], told)


def in_node(node: str, packages: Path, told: dict[str, Any]) -> Answer:
    """The answer of transformers.js below ``packages``/node_modules."""
    return answered([node, str(SCRIPTS / "node.mjs"), str(packages)], told)


def answered(command: list[str], told: dict[str, Any]) -> Answer:
    """The answer of a script. A process that dies is an answer too."""
    try:
        ended = subprocess.run(command, input=json.dumps(told).encode(), capture_output=True, timeout=TIMEOUT_S)
    except FileNotFoundError:
        return Answer(missing=command[0])
    except (OSError, subprocess.TimeoutExpired) as error:
        return Answer(error=f"{type(error).__name__}: {error}")
    lines = ended.stdout.decode("utf-8", "replace").strip().splitlines()
    try:
        return parsed(json.loads(lines[-1]))
    except (IndexError, ValueError, AttributeError):
        tail = ended.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        return Answer(error=" ".join([f"the process ended with {ended.returncode}", *tail]))


def parsed(answer: dict[str, Any]) -> Answer:
    """An answer from its JSON."""
    single, batched = (np.asarray(answer[key], np.float64) if key in answer else None for key in ("vectors", "batched"))
    versions = answer.get("versions", {})
    return Answer(single, batched, str(answer.get("error", "")), str(answer.get("missing", "")), versions)


def ours(found: Facts, graph: GraphFile, texts: Sequence[Text]) -> npt.NDArray[np.float64]:
    """featherbed's own vectors [N, D] of a graph, each text alone. Raises what Embedder raises."""
    named = (found.path / MANIFEST).is_file() and graph.variant != graph.file
    model = Embedder(found.path, graph.variant) if named else Embedder(found.path / graph.file)
    calls = {"query": model.encode_query, "document": model.encode_document}
    return np.stack([np.asarray(calls[kind](text), np.float64) for kind, text in texts])


def own(found: Facts, graph: GraphFile, texts: Sequence[Text]) -> tuple[npt.NDArray[np.float64] | None, str]:
    """``ours``, or None and why we cannot run it."""
    try:
        return ours(found, graph, texts), ""
    except FeatherbedError as error:
        return None, str(error)


def cosine(theirs: npt.NDArray[np.float64] | None, mine: npt.NDArray[np.float64] | None) -> float | None:
    """The worst row's cosine. NaN, another shape and rows of zeros are 0: no vector of ours."""
    if theirs is None or mine is None:
        return None
    if theirs.shape != mine.shape or not np.isfinite(theirs).all():
        return 0.0
    lengths = np.linalg.norm(theirs, axis=1) * np.linalg.norm(mine, axis=1)
    return float(np.min(np.sum(theirs * mine, axis=1) / np.where(lengths > 0, lengths, np.inf)))
