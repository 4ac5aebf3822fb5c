"""One model file in another's library: run by whatever Python has that library, never imported by ours.

    PYTHON python.py PEER < job.json

The job: folder, file (inside it), texts as [kind, text] with kind "query" or "document", prompts by kind, pooling, dim,
max_length, pad_id, output, beside (sidecars). The last line of standard output is {"vectors", "batched", "versions"},
{"error"}, or {"missing"} where the library is not here. Vectors are of one text at a time, ``batched`` of all at once:
a graph with a static batch ends in an error, and one whose rows depend on their company shows it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

Job = dict[str, Any]
Embed = Callable[[list[list[str]]], Any]  # [kind, text] each → [N, D]


def plain_onnxruntime(job: Job) -> Embed:
    """A session with default options, the tokenizer's own library, numpy."""
    import onnxruntime as ort
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(job["folder"]) / "tokenizer.json"))
    tokenizer.enable_padding(pad_id=job["pad_id"])
    tokenizer.enable_truncation(job["max_length"])
    session = ort.InferenceSession(str(Path(job["folder"]) / job["file"]), providers=["CPUExecutionProvider"])
    inputs = {port.name for port in session.get_inputs()}

    def embed(rows: list[list[str]]) -> Any:
        encoded = tokenizer.encode_batch([job["prompts"].get(kind, "") + text for kind, text in rows])
        ids = np.array([row.ids for row in encoded], np.int64)
        mask = np.array([row.attention_mask for row in encoded], np.int64)
        feeds = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in inputs:
            feeds["token_type_ids"] = np.zeros_like(ids)
        (found,) = session.run([job["output"]], feeds)
        return pooled(np.asarray(found, np.float32), mask, job["pooling"])

    return embed


def pooled(found: Any, mask: Any, pooling: str) -> Any:
    """Vectors of what a graph gave: as they are, or by the pooling from hidden states."""
    if found.ndim == 2:
        return found
    if pooling == "cls":
        return found[:, 0]
    if pooling == "lasttoken":
        last = mask.shape[1] - 1 - np.argmax(mask[:, ::-1], axis=1)
        return found[np.arange(len(found)), last]
    weights = mask[..., None].astype(np.float32)
    return (found * weights).sum(1) / weights.sum(1)


def sentence_transformers(job: Job) -> Embed:
    """SentenceTransformer(DIR, backend="onnx"), its own prompts and pooling."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        job["folder"],
        backend="onnx",
        device="cpu",
        local_files_only=True,
        model_kwargs={"file_name": job["file"], "provider": "CPUExecutionProvider", "export": False},
    )

    def embed(rows: list[list[str]]) -> Any:
        found: list[Any] = [None] * len(rows)
        for kind, encode in (("query", model.encode_query), ("document", model.encode_document)):
            places = [place for place, row in enumerate(rows) if row[0] == kind]
            if places:
                vectors = encode([rows[place][1] for place in places], show_progress_bar=False)
                for place, vector in zip(places, vectors, strict=True):
                    found[place] = vector
        return np.asarray(found)

    return embed


def fastembed(job: Job) -> Embed:
    """TextEmbedding with a custom model, as our card prints it."""
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

    poolings = {"mean": PoolingType.MEAN, "cls": PoolingType.CLS, "lasttoken": PoolingType.LAST_TOKEN}
    made = job["output"] == "sentence_embedding"
    TextEmbedding.add_custom_model(
        "tried/here",
        pooling=PoolingType.DISABLED if made else poolings[job["pooling"]],
        normalization=True,
        sources=ModelSource(hf="tried/here"),
        dim=job["dim"],
        model_file=job["file"],
        additional_files=job["beside"],
        output_name=job["output"],
    )
    model = TextEmbedding("tried/here", specific_model_path=job["folder"], local_files_only=True)
    return lambda rows: np.asarray(list(model.embed([job["prompts"].get(kind, "") + text for kind, text in rows])))


def optimum(job: Job) -> Embed:
    """ORTModelForFeatureExtraction and transformers' tokenizer; it reads ``last_hidden_state``."""
    from optimum.onnxruntime import ORTModelForFeatureExtraction
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["folder"], local_files_only=True)
    folder, _, name = job["file"].rpartition("/")
    model = ORTModelForFeatureExtraction.from_pretrained(
        job["folder"], subfolder=folder, file_name=name, local_files_only=True, export=False
    )

    def embed(rows: list[list[str]]) -> Any:
        texts = [job["prompts"].get(kind, "") + text for kind, text in rows]
        inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="np")
        hidden = np.asarray(model(**inputs)["last_hidden_state"], np.float32)
        return pooled(hidden, inputs["attention_mask"], job["pooling"])

    return embed


PEERS: dict[str, tuple[Callable[[Job], Embed], tuple[str, ...]]] = {
    "onnxruntime": (plain_onnxruntime, ("onnxruntime", "tokenizers")),
    "sentence-transformers": (sentence_transformers, ("sentence-transformers", "optimum-onnx", "onnxruntime")),
    "fastembed": (fastembed, ("fastembed", "onnxruntime")),
    "optimum": (optimum, ("optimum-onnx", "transformers", "onnxruntime")),
}


def tried(peer: str, job: Job) -> dict[str, Any]:
    """What a library makes of a file."""
    load, packages = PEERS[peer]
    try:
        versions = {name: version(name) for name in packages}
    except PackageNotFoundError as error:
        return {"missing": f"{error.name}"}
    try:
        embed = load(job)
        single = np.concatenate([np.asarray(embed([row]), np.float64) for row in job["texts"]])
        batched = np.asarray(embed(job["texts"]), np.float64)
    except ImportError as error:
        return {"missing": f"{error}"}
    except Exception as error:  # a library may end in any way: that is what is to be found out
        return {"error": f"{type(error).__name__}: {error}"[:2000], "versions": versions}
    return {"vectors": single.tolist(), "batched": batched.tolist(), "versions": versions}


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    answers.write(json.dumps(tried(sys.argv[1], json.load(sys.stdin))) + "\n")
    answers.flush()
