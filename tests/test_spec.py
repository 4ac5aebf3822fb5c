"""The spec: read from the files of a checkpoint, silent or contradicting files refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featherbed.errors import FeatherbedError, OptionError, SpecError, TokenizerError, UnknownArchitectureError
from featherbed.families import FAMILIES
from featherbed.spec import Pooling, Spec, integer, number, pooling_in, read_json, read_spec
from tests.conftest import FIXTURES

Checkpoint = Callable[[str], Path]
OLD = {
    Pooling.LAST: "pooling_mode_lasttoken",
    Pooling.MEAN: "pooling_mode_mean_tokens",
    Pooling.CLS: "pooling_mode_cls_token",
}


def change(path: Path, **values: object) -> None:
    """Put values into a JSON file; None takes a key out."""
    old = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    new = {key: value for key, value in {**old, **values}.items() if value is not None}
    path.write_text(json.dumps(new), "utf-8")


def refused(kind: type[FeatherbedError], act: Callable[[], object]) -> str:
    """The one line of the error that ``act`` ends in."""
    with pytest.raises(FeatherbedError) as caught:
        act()
    assert type(caught.value) is kind
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert ": expected " in text
    assert ", found " in text
    assert caught.value.exit_code == 2
    return text


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("bert-mean", Spec("bert", 48, 384, 64, Pooling.MEAN, 0, None, True)),
        ("bert-cls", Spec("bert", 48, 384, 64, Pooling.CLS, 0, None, True)),
        ("qwen3-tied", Spec("qwen3", 48, 384, 64, Pooling.LAST, 0, 0, False)),
        ("qwen3-biased", Spec("qwen3", 72, 384, 64, Pooling.LAST, 0, 0, False)),
    ],
)
def test_the_fixtures_read_as_they_were_made(name: str, spec: Spec) -> None:
    prompts = {"query": "find: ", "document": ""}
    assert read_spec(FIXTURES / name) == Spec(**{**vars(spec), "prompts": prompts})


# pooling


@pytest.mark.parametrize("pooling", list(Pooling))
@pytest.mark.parametrize("schema", ["old", "new", "both", "old with its other keys false"])
def test_both_schemas_of_pooling_are_read(pooling: Pooling, schema: str, tmp_path: Path) -> None:
    old: dict[str, Any] = {OLD[pooling]: True}
    configs: dict[str, dict[str, Any]] = {
        "old": old,
        "new": {"pooling_mode": pooling.value},
        "both": {**old, "pooling_mode": pooling.value},
        "old with its other keys false": {
            **dict.fromkeys(OLD.values(), False),
            "pooling_mode_max_tokens": False,
            **old,
        },
    }
    assert pooling_in(configs[schema], tmp_path) is pooling


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "cls, mean"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode": "cls"}, "cls, mean"),
        ({"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, "mean, pooling_mode_max_tokens"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "pooling_mode_mean_sqrt_len_tokens"),
        ({"pooling_mode_weightedmean_tokens": True}, "pooling_mode_weightedmean_tokens"),
        ({"pooling_mode": "max"}, "max"),
        ({"pooling_mode": ["mean", "cls"]}, "['mean', 'cls']"),
        ({"pooling_mode": {"a": 1}}, "{'a': 1}"),
        ({}, "none"),
        ({"pooling_mode_mean_tokens": False}, "none"),
    ],
    ids=str,
)
def test_a_pooling_file_that_contradicts_itself_is_named(
    checkpoint: Checkpoint, config: dict[str, Any], found: str
) -> None:
    folder = checkpoint("bert-mean")
    path = folder / "1_Pooling" / "config.json"
    path.write_text(json.dumps(config), "utf-8")
    line = refused(SpecError, lambda: read_spec(folder))
    assert line.startswith(f"{path}: ")
    assert f"found {found};" in line


def test_a_silent_bert_is_asked_for_and_the_option_is_named(checkpoint: Checkpoint) -> None:
    folder = checkpoint("bert-mean")
    (folder / "1_Pooling" / "config.json").unlink()
    line = refused(SpecError, lambda: read_spec(folder))
    assert "--pooling mean" in line
    assert "--pooling cls" in line
    for asked in Pooling:
        assert read_spec(folder, asked.value).pooling is asked


def test_a_silent_qwen3_pools_by_its_last_token_unless_told(checkpoint: Checkpoint) -> None:
    folder = checkpoint("qwen3-tied")
    (folder / "1_Pooling" / "config.json").unlink()
    assert read_spec(folder).pooling is Pooling.LAST
    assert read_spec(folder).eos_id == 0
    assert read_spec(folder, "mean").pooling is Pooling.MEAN
    assert read_spec(folder, "mean").eos_id is None


def test_an_option_that_agrees_is_taken_and_one_that_contradicts_names_the_file() -> None:
    folder = FIXTURES / "bert-mean"
    assert read_spec(folder, "mean") == read_spec(folder)
    line = refused(SpecError, lambda: read_spec(folder, "cls"))
    assert line.startswith("--pooling: ")
    assert f"expected mean as {folder / '1_Pooling' / 'config.json'} says, found cls" in line


@pytest.mark.parametrize("asked", ["", "max", "last", "MEAN", "mean "])
def test_an_unknown_pooling_is_an_option_error_that_lists_the_known(asked: str) -> None:
    line = refused(OptionError, lambda: read_spec(FIXTURES / "bert-mean", asked))
    assert "lasttoken, mean, cls" in line
    assert repr(asked) in line


# prompts


@pytest.mark.parametrize("missing", ["the file", "its keys", "its values"])
def test_a_checkpoint_without_prompts_has_none(checkpoint: Checkpoint, missing: str) -> None:
    folder = checkpoint("qwen3-tied")
    path = folder / "config_sentence_transformers.json"
    path.write_text({"its values": '{"prompts": null, "default_prompt_name": null}'}.get(missing, "{}"), "utf-8")
    if missing == "the file":
        path.unlink()
    assert read_spec(folder).prompts == {}
    assert read_spec(folder).default_prompt_name is None


@given(prompts=st.dictionaries(st.text(), st.text(), max_size=4), data=st.data())
def test_prompts_come_through_byte_for_byte(
    tmp_path_factory: pytest.TempPathFactory, prompts: dict[str, str], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("prompts")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((FIXTURES / "qwen3-tied" / name).read_bytes())
    default = data.draw(st.sampled_from([None, *prompts]))
    change(folder / "config_sentence_transformers.json", prompts=prompts, default_prompt_name=default)
    spec = read_spec(folder)
    assert spec.prompts == prompts
    assert spec.default_prompt_name == default
    assert Spec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    "values",
    [
        {"prompts": ["find: "]},
        {"prompts": {"query": 7}},
        {"prompts": {"query": None}},
        {"prompts": "find: "},
        {"prompts": {"query": "find: "}, "default_prompt_name": "queri"},
        {"prompts": {}, "default_prompt_name": "query"},
        {"prompts": {"query": "find: "}, "default_prompt_name": ["query"]},
        {"default_prompt_name": "query"},
    ],
    ids=str,
)
def test_prompts_that_are_no_texts_or_miss_their_default_are_refused_by_file(
    checkpoint: Checkpoint, values: dict[str, Any]
) -> None:
    folder = checkpoint("bert-mean")
    path = folder / "config_sentence_transformers.json"
    path.write_text(json.dumps(values), "utf-8")
    assert refused(SpecError, lambda: read_spec(folder)).startswith(f"{path}: ")


# lengths


@pytest.mark.parametrize(
    ("sentence", "tokens", "length"),
    [
        (None, None, 128),
        (None, 100, 100),
        (None, 100.0, 100),
        (None, 1e30, 128),
        (None, 1000000000000000019884624838656, 128),
        (None, 4096, 128),
        (50, None, 50),
        (50, 100, 50),
        (100, 50, 100),
        (512, 50, 128),
    ],
)
def test_the_length_is_the_one_said_and_never_more_than_the_positions(
    checkpoint: Checkpoint, sentence: float | None, tokens: float | None, length: int
) -> None:
    folder = checkpoint("qwen3-tied")
    change(folder / "tokenizer_config.json", model_max_length=tokens)
    if sentence is not None:
        change(folder / "sentence_bert_config.json", max_seq_length=sentence, do_lower_case=False)
    assert read_spec(folder).max_length == length


@pytest.mark.parametrize("value", [0, -1, "64", [64], True], ids=repr)
@pytest.mark.parametrize(
    ("file", "key"), [("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")]
)
def test_a_length_that_is_none_is_refused_with_the_file_it_stands_in(
    checkpoint: Checkpoint, file: str, key: str, value: object
) -> None:
    folder = checkpoint("qwen3-tied")
    change(folder / file, **{key: value})
    line = refused(SpecError, lambda: read_spec(folder))
    assert file in line
    assert key in line


# special tokens


@pytest.mark.parametrize(
    ("config", "tokens", "pad", "eos"),
    [
        ({}, {}, 0, 0),
        ({"eos_token_id": 1}, {}, 0, 1),
        ({"eos_token_id": None}, {"eos_token": "<|im_end|>"}, 0, 1),
        ({"eos_token_id": None}, {"eos_token": {"content": "<|im_end|>", "special": True}}, 0, 1),
        ({"eos_token_id": [1, 0]}, {"eos_token": "<|im_end|>"}, 0, 1),
        ({"pad_token_id": 7}, {"pad_token": "<|im_end|>"}, 1, 0),
        ({"pad_token_id": 7}, {"pad_token": {"content": "<|im_end|>"}}, 1, 0),
        ({"pad_token_id": 7}, {"pad_token": None}, 7, 0),
        ({"pad_token_id": None, "eos_token_id": 1}, {"pad_token": None}, 1, 1),
        ({"pad_token_id": 0, "eos_token_id": 1}, {"pad_token": None}, 0, 1),
    ],
)
def test_special_ids_come_by_name_or_by_number(
    checkpoint: Checkpoint, config: dict[str, Any], tokens: dict[str, Any], pad: int, eos: int
) -> None:
    folder = checkpoint("qwen3-tied")
    change(folder / "config.json", **config)
    change(folder / "tokenizer_config.json", **tokens)
    spec = read_spec(folder)
    assert (spec.pad_id, spec.eos_id) == (pad, eos)


def test_a_model_that_does_not_pool_by_the_last_token_wants_no_end_token(checkpoint: Checkpoint) -> None:
    folder = checkpoint("bert-mean")
    change(folder / "config.json", eos_token_id=3)
    assert read_spec(folder).eos_id is None


def test_a_model_without_any_padding_token_is_refused(checkpoint: Checkpoint) -> None:
    folder = checkpoint("bert-mean")
    change(folder / "config.json", pad_token_id=None)
    change(folder / "tokenizer_config.json", pad_token=None)
    line = refused(SpecError, lambda: read_spec(folder))
    assert "pad_token in tokenizer_config.json or pad_token_id in config.json" in line


@pytest.mark.parametrize("key", ["pad_token_id", "eos_token_id"])
@pytest.mark.parametrize("value", [-1, 384, 100_000])
def test_a_special_id_that_is_no_row_of_the_table_is_refused(checkpoint: Checkpoint, key: str, value: int) -> None:
    folder = checkpoint("qwen3-tied")
    change(folder / "tokenizer_config.json", pad_token=None)
    change(folder / "config.json", **{key: value})
    assert str(value) in refused(SpecError, lambda: read_spec(folder))


@pytest.mark.parametrize("added", [[{"content": "x"}], [{"id": "a", "content": "x"}], [7], 7, ["x"]], ids=str)
def test_added_tokens_that_are_none_are_a_tokenizer_error(checkpoint: Checkpoint, added: object) -> None:
    folder = checkpoint("qwen3-tied")
    change(folder / "tokenizer.json", added_tokens=added)
    assert "added_tokens" in refused(TokenizerError, lambda: read_spec(folder))


# config.json and the tokenizer


@pytest.mark.parametrize("family", ["llama", "distilbert", "deberta", "", None, 7, ["bert"], "Bert"])
def test_an_unknown_family_is_refused_with_those_that_are_known(checkpoint: Checkpoint, family: object) -> None:
    folder = checkpoint("bert-mean")
    change(folder / "config.json", model_type=family)
    line = refused(UnknownArchitectureError, lambda: read_spec(folder))
    assert f"one of {', '.join(FAMILIES)}" in line
    assert repr(family) in line


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "max_position_embeddings"])
@pytest.mark.parametrize("value", [None, 0, -48, 1.5, "48", True, [48]], ids=repr)
def test_a_size_that_is_no_whole_number_is_refused_by_its_key(checkpoint: Checkpoint, key: str, value: object) -> None:
    folder = checkpoint("bert-mean")
    change(folder / "config.json", **{key: value})
    line = refused(SpecError, lambda: read_spec(folder))
    assert f"config.json, key {key!r}: " in line
    assert f"found {'nothing' if value is None else repr(value)};" in line


def test_a_size_may_have_a_default_where_it_is_missing_or_null() -> None:
    assert integer({}, "n", 3) == integer({"n": None}, "n", 3) == 3
    assert integer({"n": 5}, "n", 3) == 5
    assert number({}, "e", 1e-6) == 1e-6
    assert number({"e": 2}, "e", 1e-6) == 2.0


@pytest.mark.parametrize("value", [0, -1e-6, "1e-6", True, float("nan"), float("inf"), [1]], ids=repr)
def test_a_number_that_is_not_positive_is_refused(value: object) -> None:
    assert "'e'" in refused(SpecError, lambda: number({"e": value}, "e", 1.0))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "JSONDecodeError"),
        ("{", "JSONDecodeError"),
        ("[]", "list"),
        ("null", "NoneType"),
        ("3", "int"),
        ("[" * 100_000, "RecursionError"),
        ("<!DOCTYPE html>\n<title>404</title>", "JSONDecodeError"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n", "git lfs pull"),
        (b"\xff\xfe{\x00}\x00", "UnicodeDecodeError"),
    ],
)
@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("config.json", SpecError),
        ("tokenizer_config.json", SpecError),
        ("tokenizer.json", TokenizerError),
        ("1_Pooling/config.json", SpecError),
        ("config_sentence_transformers.json", SpecError),
        ("sentence_bert_config.json", SpecError),
    ],
)
def test_a_file_that_is_no_json_object_is_named_with_what_it_is(
    checkpoint: Checkpoint, file: str, kind: type[FeatherbedError], text: str | bytes, found: str
) -> None:
    folder = checkpoint("bert-mean")
    (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    line = refused(kind, lambda: read_spec(folder))
    assert line.startswith(f"{folder / file}: ")
    assert found in line


def test_a_missing_config_is_named(checkpoint: Checkpoint) -> None:
    folder = checkpoint("bert-mean")
    (folder / "config.json").unlink()
    assert "no such file" in refused(SpecError, lambda: read_spec(folder))


def test_a_missing_tokenizer_is_named(checkpoint: Checkpoint) -> None:
    folder = checkpoint("bert-mean")
    (folder / "tokenizer.json").unlink()
    line = refused(TokenizerError, lambda: read_spec(folder))
    assert f"{folder}: expected tokenizer.json, found none" in line


def test_a_byte_order_mark_or_a_folder_in_place_of_a_file_is_one_line_too(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf{}")
    (tmp_path / "b.json").mkdir()
    for name in ("a.json", "b.json"):
        refused(SpecError, partial(read_json, tmp_path / name))


# the value


def test_a_spec_goes_to_json_and_back() -> None:
    for name in ("bert-mean", "qwen3-tied"):
        spec = read_spec(FIXTURES / name)
        plain = json.loads(json.dumps(spec.to_json()))
        assert Spec.from_json(plain) == spec
        assert plain["pooling"] == spec.pooling.value


@pytest.mark.parametrize("key", [field.name for field in fields(Spec)][:8])
def test_a_spec_that_lacks_a_key_is_refused(key: str) -> None:
    values = read_spec(FIXTURES / "bert-mean").to_json()
    del values[key]
    assert key in refused(SpecError, lambda: Spec.from_json(values))


@pytest.mark.parametrize("values", [{"more": 1}, {"pooling": "max"}, {"pooling": None}], ids=str)
def test_a_spec_with_something_unknown_is_refused(values: dict[str, Any]) -> None:
    known = read_spec(FIXTURES / "bert-mean").to_json()
    refused(SpecError, lambda: Spec.from_json({**known, **values}))


@pytest.mark.parametrize(
    "values",
    [
        {"family": 5}, {"dim": "x"}, {"dim": "384"}, {"dim": 0}, {"dim": 384.0}, {"dim": True}, {"vocab_size": None},
        {"max_length": -1}, {"max_length": [512]}, {"pad_id": "0"}, {"pad_id": -1}, {"eos_id": "1"}, {"eos_id": 1.5},
        {"token_types": 1}, {"token_types": "no"}, {"prompts": []}, {"prompts": {"query": 7}}, {"prompts": None},
        {"default_prompt_name": 3}, {"pooling": ["mean"]},
    ],
    ids=str,
)  # fmt: skip
def test_a_spec_with_a_value_of_another_kind_is_refused(values: dict[str, Any]) -> None:
    known = read_spec(FIXTURES / "bert-mean").to_json()
    (key,) = values
    assert (
        key in refused(SpecError, lambda: Spec.from_json({**known, **values})).partition("found")[2] or key == "pooling"
    )


def test_a_spec_cannot_be_changed() -> None:
    spec = read_spec(FIXTURES / "bert-mean")
    with pytest.raises(FrozenInstanceError):
        spec.dim = 7  # type: ignore[misc]


def test_wide_models_get_smaller_batches() -> None:
    spec = read_spec(FIXTURES / "bert-mean")
    wide = Spec(**{**vars(spec), "dim": 1024})
    assert 0 < wide.max_batch_tokens_hint < spec.max_batch_tokens_hint


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        (
            "modules.json",
            [{"type": f"sentence_transformers.models.{m}"} for m in ("Transformer", "Pooling", "Dense")],
            "Dense",
        ),
        (
            "modules.json",
            [{"type": f"models.{m}", "path": "2_Dense"} for m in ("Transformer", "Pooling", "Normalize", "Dense")],
            "in this order",
        ),
        ("modules.json", {"type": "Transformer"}, "modules"),
        ("sentence_bert_config.json", {"max_seq_length": 32, "do_lower_case": True}, "do_lower_case"),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": True, "include_prompt": False}, "include_prompt"),
        ("config_sentence_transformers.json", {"similarity_fn_name": "euclidean"}, "similarity_fn_name"),
    ],
)
def test_what_sentence_transformers_would_do_besides_is_not_dropped_in_silence(
    checkpoint: Callable[[str], Path], file: str, content: object, says: str
) -> None:
    folder = checkpoint("bert-mean")
    (folder / file).write_text(json.dumps(content), "utf-8")
    with pytest.raises((UnknownArchitectureError, SpecError), match=says):
        read_spec(folder)


def test_a_dot_product_of_vectors_that_are_not_normalised_is_refused(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("bert-mean")
    types = [{"type": f"sentence_transformers.models.{m}"} for m in ("Transformer", "Pooling")]
    (folder / "modules.json").write_text(json.dumps(types), "utf-8")
    assert read_spec(folder).dim > 0
    (folder / "config_sentence_transformers.json").write_text('{"similarity_fn_name": "dot"}', "utf-8")
    with pytest.raises(UnknownArchitectureError, match="not normalised"):
        read_spec(folder)
