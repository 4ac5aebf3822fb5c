"""The files beside the graphs, as sentence-transformers, Optimum, fastembed and transformers.js want them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tokenizers

import featherbed
from featherbed.make.assemble import write_configs
from featherbed.make.write import write_graph
from featherbed.spec import Pooling, Spec, pooling_in, read_spec
from tests.conftest import FIXTURES, NAMES

OLD_KEYS = {
    "pooling_mode_cls_token": Pooling.CLS,
    "pooling_mode_mean_tokens": Pooling.MEAN,
    "pooling_mode_max_tokens": None,
    "pooling_mode_mean_sqrt_len_tokens": None,
    "pooling_mode_weightedmean_tokens": None,
    "pooling_mode_lasttoken": Pooling.LAST,
}


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def change(path: Path, **values: object) -> None:
    """Put values into a JSON file; None takes a key out."""
    old = read(path) if path.is_file() else {}
    new = {key: value for key, value in {**old, **values}.items() if value is not None}
    path.write_text(json.dumps(new), "utf-8")


@pytest.fixture
def written(tmp_path: Path) -> Callable[[Path], tuple[Path, Spec]]:
    """The configs written for a checkpoint folder, and its spec."""

    def write(source: Path) -> tuple[Path, Spec]:
        out, spec = tmp_path / "out", read_spec(source)
        out.mkdir()
        write_configs(source, out, spec)
        return out, spec

    return write


Written = Callable[[Path], tuple[Path, Spec]]


@pytest.mark.parametrize("name", NAMES)
def test_modules_have_the_type_names_that_every_sentence_transformers_reads(written: Written, name: str) -> None:
    out, _ = written(FIXTURES / name)
    assert read(out / "modules.json") == [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]


@pytest.mark.parametrize("name", NAMES)
def test_pooling_is_written_in_the_old_schema_and_the_new(written: Written, name: str) -> None:
    out, spec = written(FIXTURES / name)
    assert read(out / "1_Pooling" / "config.json") == {
        "word_embedding_dimension": spec.dim,
        **{key: pooling is spec.pooling for key, pooling in OLD_KEYS.items()},
        "pooling_mode": spec.pooling.value,
        "include_prompt": True,
    }


@pytest.mark.parametrize("schema", ["old", "new", "none"])
def test_either_schema_of_the_checkpoint_becomes_both(
    checkpoint: Callable[[str], Path], written: Written, schema: str
) -> None:
    folder = checkpoint("qwen3-tied")
    path = folder / "1_Pooling" / "config.json"
    if schema == "none":
        path.unlink()
    else:
        values = {"old": {"pooling_mode_lasttoken": True}, "new": {"pooling_mode": "lasttoken"}}[schema]
        path.write_text(json.dumps(values), "utf-8")
    out, _ = written(folder)
    found = read(out / "1_Pooling" / "config.json")
    assert found["pooling_mode"] == "lasttoken"
    assert [key for key in OLD_KEYS if found[key]] == ["pooling_mode_lasttoken"]
    for key in OLD_KEYS:  # each schema by itself says the same
        del found[key]
    assert pooling_in(found, path) is Pooling.LAST


@pytest.mark.parametrize(("name", "pad"), [("bert-mean", "[PAD]"), ("qwen3-tied", "<|endoftext|>")])
def test_the_tokenizer_config_is_explicit(written: Written, name: str, pad: str) -> None:
    out, spec = written(FIXTURES / name)
    found = read(out / "tokenizer_config.json")
    assert found["padding_side"] == "right"
    assert found["pad_token"] == pad
    assert found["model_max_length"] == spec.max_length == 64


def test_a_model_max_length_that_says_nothing_becomes_a_real_one(
    checkpoint: Callable[[str], Path], written: Written
) -> None:
    folder = checkpoint("qwen3-tied")
    change(folder / "tokenizer_config.json", model_max_length=1e30)
    out, _ = written(folder)
    assert read(out / "tokenizer_config.json")["model_max_length"] == 128
    assert read(out / "sentence_bert_config.json")["max_seq_length"] == 128


def test_a_checkpoint_without_a_tokenizer_config_gets_one(checkpoint: Callable[[str], Path], written: Written) -> None:
    folder = checkpoint("bert-mean")
    (folder / "tokenizer_config.json").unlink()
    out, _ = written(folder)
    assert read(out / "tokenizer_config.json") == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 64,
        "padding_side": "right",
        "pad_token": "[PAD]",
    }


def test_a_pad_that_is_known_by_number_only_gets_its_name(checkpoint: Callable[[str], Path], written: Written) -> None:
    folder = checkpoint("bert-mean")
    change(folder / "tokenizer_config.json", pad_token=None)
    change(folder / "config.json", pad_token_id=3)
    out, _ = written(folder)
    assert read(out / "tokenizer_config.json")["pad_token"] == "[SEP]"


def test_names_of_code_are_dropped_and_the_rest_is_kept(checkpoint: Callable[[str], Path], written: Written) -> None:
    folder = checkpoint("qwen3-tied")
    change(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.Tokenizer", None]},
        tokenizer_class="Qwen2TokenizerFast",
        chat_template="{{ x }}",
    )
    (folder / "evil.py").write_text("raise SystemExit", "utf-8")
    out, _ = written(folder)
    found = read(out / "tokenizer_config.json")
    assert "auto_map" not in found
    assert found["tokenizer_class"] == "Qwen2TokenizerFast"
    assert not list(out.rglob("*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_padding_and_truncation_are_gone_from_the_tokenizer_and_nothing_else(written: Written, name: str) -> None:
    out, _ = written(FIXTURES / name)
    before, found = read(FIXTURES / name / "tokenizer.json"), read(out / "tokenizer.json")
    if name.startswith("bert"):  # these have both, as MiniLM's has
        assert before["padding"]
        assert before["truncation"]
    assert found == {**before, "padding": None, "truncation": None}
    opened = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    assert opened.padding is None
    assert opened.truncation is None


def test_a_tokenizer_that_needs_no_change_is_copied_byte_for_byte(written: Written) -> None:
    out, _ = written(FIXTURES / "qwen3-tied")
    assert (out / "tokenizer.json").read_bytes() == (FIXTURES / "qwen3-tied" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_upstreams_config_is_kept_with_its_special_ids(written: Written, name: str) -> None:
    out, spec = written(FIXTURES / name)
    before = read(FIXTURES / name / "config.json")
    assert read(out / "config.json") == {**before, "pad_token_id": spec.pad_id}


def test_special_ids_known_from_the_tokenizer_alone_are_put_into_the_config(
    checkpoint: Callable[[str], Path], written: Written
) -> None:
    folder = checkpoint("qwen3-tied")
    change(folder / "config.json", pad_token_id=None, eos_token_id=None)
    change(folder / "tokenizer_config.json", eos_token="<|im_end|>")
    out, spec = written(folder)
    assert (spec.pad_id, spec.eos_id) == (0, 1)
    found = read(out / "config.json")
    assert found["pad_token_id"] == 0
    assert found["eos_token_id"] == 1


@pytest.mark.parametrize("name", NAMES)
def test_lengths_and_prompts_are_where_sentence_transformers_looks(written: Written, name: str) -> None:
    out, spec = written(FIXTURES / name)
    assert read(out / "sentence_bert_config.json") == {"max_seq_length": spec.max_length, "do_lower_case": False}
    assert read(out / "config_sentence_transformers.json") == {
        "prompts": {"query": "find: ", "document": ""},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }


def test_prompts_are_byte_exact(checkpoint: Callable[[str], Path], written: Written) -> None:
    folder = checkpoint("qwen3-tied")
    prompts = {"query": "Instruct: finde\nQuery:", "document": " ", "ü": "漢字\t\u2028"}
    change(folder / "config_sentence_transformers.json", prompts=prompts, default_prompt_name="document")
    out, _ = written(folder)
    found = read(out / "config_sentence_transformers.json")
    assert found["prompts"] == prompts
    assert found["default_prompt_name"] == "document"


@pytest.mark.parametrize("name", NAMES)
def test_what_was_written_reads_back_as_the_same_spec(written: Written, name: str) -> None:
    out, spec = written(FIXTURES / name)
    assert read_spec(out) == spec


def test_a_vocabulary_and_a_special_tokens_map_come_along_and_weights_do_not(
    checkpoint: Callable[[str], Path], written: Written
) -> None:
    folder = checkpoint("bert-mean")
    (folder / "vocab.txt").write_text("[PAD]\n", "utf-8")
    (folder / "special_tokens_map.json").write_text('{"pad_token": "[PAD]"}', "utf-8")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    out, _ = written(folder)
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()) == [
        "1_Pooling/config.json",
        "config.json",
        "config_sentence_transformers.json",
        "modules.json",
        "sentence_bert_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    ]


def test_a_folder_with_sidecars_tells_transformers_js(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folders: dict[str, Path]
) -> None:
    monkeypatch.setattr("featherbed.pipeline.variants.write_graph", partial(write_graph, inline_limit_bytes=0))
    out = featherbed.build(FIXTURES / "bert-cls", tmp_path / "m", ["int8"], check=False).folder
    assert sorted(path.name for path in (out / "onnx").iterdir()) == [
        "model.onnx",
        "model.onnx_data",
        "model_int8.onnx",
        "model_int8.onnx_data",
        "model_quantized.onnx",
        "model_quantized.onnx_data",
    ]
    names = ("model.onnx", "model_int8.onnx", "model_quantized.onnx")
    said = {"use_external_data_format": dict.fromkeys(names, True)}
    assert read(out / "config.json")["transformers.js_config"] == said
    assert "transformers.js_config" not in read(folders["bert-cls"] / "config.json")
