"""Rules of other ecosystems, each broken once; and libraries that load, fail, die or are not there."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from featherbed.check import tries
from featherbed.check.conform import CLOSE, FAILS, LOADS, RULES, Peers, Try, conform
from featherbed.check.facts import facts
from featherbed.check.rules import FASTEMBED, OPTIMUM, ST, TEI
from tests.foreign_folder import edit, with_sidecar, without

Copy = Callable[[str], Path]
ROOT = Path(__file__).parents[2]
GRAPH = "onnx/model.onnx"
KNOWN = {
    "tei-onnxruntime"
}  # our attention operator is younger than the onnxruntime of text-embeddings-inference: export


def broken(folder: Path, fails: bool = True) -> set[str]:
    found = conform(folder)
    return {finding.rule.id for finding in found.findings if finding.rule.fails is fails}


def graph(change: Callable[[Any], object]) -> Callable[[Path], object]:
    """A change of the reference's graph."""

    def damage(folder: Path) -> None:
        model = onnx.load(folder / GRAPH)
        change(model.graph)
        onnx.save(model, folder / GRAPH)

    return damage


def file(name: str, change: Callable[[Any], Any]) -> Callable[[Path], object]:
    return lambda folder: edit(folder / name, change)


def gone(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def port(name: str, kind: int = TensorProto.INT64) -> Callable[[Path], object]:
    axes = ["batch_size", "sequence_length"]
    return graph(lambda g: g.input.append(onnx.helper.make_tensor_value_info(name, kind, axes)))


def renamed_output(g: Any) -> None:
    for node in g.node:
        node.output[:] = ["token_embeddings" if name == "last_hidden_state" else name for name in node.output]
        node.input[:] = ["token_embeddings" if name == "last_hidden_state" else name for name in node.input]
    g.output[0].name = "token_embeddings"


def no_end(folder: Path) -> None:
    edit(folder / "1_Pooling" / "config.json", lambda _: {"pooling_mode_lasttoken": True, "pooling_mode": "lasttoken"})
    edit(folder / "tokenizer.json", lambda t: {**t, "post_processor": None})


DAMAGES: dict[str, Callable[[Path], object]] = {
    "json": lambda folder: (folder / "config.json").write_text("{", "utf-8"),
    "config": file("config.json", without("model_type")),
    "tei-config": file("config.json", without("num_hidden_layers")),
    "tokenizer": gone("tokenizer.json"),
    "max-length": file("tokenizer_config.json", lambda c: {**c, "model_max_length": 10**30}),
    "padding": file("tokenizer_config.json", without("padding_side")),
    "pad-id": file("config.json", without("pad_token_id")),
    "end-token": no_end,
    "special-tokens": gone("special_tokens_map.json"),
    "modules": file("modules.json", lambda m: [{**one, "type": "sentence_transformers.base.Pooling"} for one in m]),
    "pooling": file("1_Pooling/config.json", lambda c: {**c, "pooling_mode": "cls"}),
    "pooling-old-keys": file("1_Pooling/config.json", lambda c: {"pooling_mode": c["pooling_mode"]}),
    "prompts": file("config_sentence_transformers.json", lambda c: {**c, "prompts": {"query": 1}}),
    "graph": lambda folder: (folder / GRAPH).write_bytes(b"version https://git-lfs"),
    "inputs": port("task_id"),
    "positions": port("position_ids"),
    "kv-inputs": port("past_key_values.0.key", TensorProto.FLOAT),
    "half-kv": port("past_key_values.0.key", TensorProto.FLOAT16),
    "hidden-output": graph(renamed_output),
    "float-output": graph(lambda g: setattr(g.output[1].type.tensor_type, "elem_type", TensorProto.UINT8)),
    "static-axes": graph(lambda g: setattr(g.input[0].type.tensor_type.shape.dim[0], "dim_value", 1)),
    "sidecar": lambda folder: with_sidecar(folder, GRAPH).unlink(),
    "sidecar-name": lambda folder: with_sidecar(folder, GRAPH, "model.onnx.data"),
    "data-format": lambda folder: with_sidecar(folder, GRAPH),
    "tei-file": gone(GRAPH),
}
BAKED = {"strategy": {"Fixed": 128}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"}
NOTES: dict[str, Callable[[Path], object]] = {
    "baked-padding": file("tokenizer.json", lambda t: {**t, "padding": BAKED}),
    "other-modules": file("modules.json", lambda m: [*m, {"type": "sentence_transformers.models.Dense", "path": "3"}]),
    "pooling-new-key": file("1_Pooling/config.json", without("pooling_mode")),
    "sequence-length": gone("sentence_bert_config.json"),
    "web-kernel": graph(lambda g: g.node.append(helper.make_node("GatherBlockQuantized", ["c", "i", "s"], ["x"]))),
    "onnx-folder": lambda folder: (folder / GRAPH).rename(folder / "model.onnx"),
}


@pytest.fixture
def sound(copied: Copy) -> Path:
    """A folder that nobody but text-embeddings-inference has a fault to find with; its manifest is out of the way."""
    folder = copied("bert-mean")
    edit(folder / "config.json", lambda c: {**c, "architectures": ["BertModel"]})
    (folder / "featherbed.json").unlink()
    return folder


@pytest.mark.parametrize("name", ["bert-mean", "bert-cls", "qwen3-tied"])
def test_what_we_build_breaks_no_rule_but_the_age_of_one_onnxruntime(copied: Copy, name: str) -> None:
    folder = copied(name)
    assert broken(folder) - {"tei-config"} == KNOWN  # these checkpoints have no architectures in their config
    variants = conform(folder).variants
    assert variants[:2] == ("fp32", "int8")


@pytest.mark.parametrize("rule", DAMAGES)
def test_each_rule_sees_its_fault(sound: Path, rule: str) -> None:
    assert broken(sound) == KNOWN
    DAMAGES[rule](sound)
    assert rule in broken(sound)


@pytest.mark.parametrize("rule", NOTES)
def test_a_note_is_no_failure(sound: Path, rule: str) -> None:
    assert rule not in broken(sound, fails=False)
    NOTES[rule](sound)
    assert rule in broken(sound, fails=False)
    assert rule not in broken(sound)


def test_every_rule_is_broken_by_a_test_and_is_on_the_page() -> None:
    page = (ROOT / "docs" / "guide" / "conform.md").read_text("utf-8")
    seen_elsewhere = {"suffix", "web-default", "tei-name", *KNOWN}  # by every folder of ours
    assert {rule.id for rule in RULES} == {*DAMAGES, *NOTES, *seen_elsewhere}
    assert set(re.findall(r"^\| `([a-z-]+)` \|", page, re.M)) >= {rule.id for rule in RULES}


def test_a_fault_concerns_those_who_look_there(sound: Path) -> None:
    DAMAGES["positions"](sound)
    found = conform(sound, [GRAPH])
    assert {found.verdict(ecosystem, GRAPH) for ecosystem in (ST, FASTEMBED, OPTIMUM)} == {FAILS}
    (finding,) = (f for f in found.findings if f.rule.id == "positions")
    assert TEI not in finding.rule.concerns
    assert finding.to_json()["variant"] == GRAPH


def test_a_library_that_is_here_loads_it_and_one_that_is_not_is_not_tried(folders: dict[str, Path]) -> None:
    found = conform(folders["bert-mean"], ["int8"], Peers(Path(sys.executable)))
    tried = {one.peer: one for one in found.tried}
    assert tried["onnxruntime"].passed
    assert (tried["onnxruntime"].cosine or 0) >= CLOSE
    assert found.verdict("onnxruntime", "int8") == LOADS
    assert tried["fastembed"].passed is None
    assert "fastembed" in tried["fastembed"].missing
    assert found.to_json()["tries"]["int8"]["fastembed"]["not_tried"]


def test_a_library_that_refuses_a_file_says_why(copied: Copy) -> None:
    folder = copied("bert-mean")
    DAMAGES["positions"](folder)
    found = facts(folder, ["fp32"])
    answer = tries.in_python(Path(sys.executable), "onnxruntime", tries.job(found, found.graphs[0], tries.TEXTS))
    assert "position_ids" in answer.error


@pytest.mark.parametrize(
    ("script", "part"),
    [
        ("import sys; sys.exit(7)", "ended with 7"),
        ("print('no json')", "ended with 0"),
        ("print('[1]')", "ended with 0"),
    ],
)
def test_a_process_that_dies_is_an_answer(script: str, part: str) -> None:
    assert part in tries.answered([sys.executable, "-c", script], {}).error


def test_a_python_that_is_not_there_is_said_as_missing(tmp_path: Path) -> None:
    assert tries.in_python(tmp_path / "python", "onnxruntime", {}).missing == str(tmp_path / "python")


def test_vectors_that_are_not_ours_fail_and_nan_is_no_vector() -> None:
    mine = np.eye(2)
    assert tries.cosine(mine[::-1], mine) == 0
    assert tries.cosine(np.full((2, 2), np.nan), mine) == 0
    assert tries.cosine(np.eye(3), mine) == 0
    assert tries.cosine(3 * mine, mine) == 1
    one = Try("fastembed", "int8", 0.5, "", "", {})
    assert one.passed is False
    assert Try("fastembed", "int8", None, "", "", {}).passed
