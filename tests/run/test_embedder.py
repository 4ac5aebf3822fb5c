"""Embedder on the four fixtures: upstream's vectors, in order, whatever the company, the side or the thread."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper, save

from featherbed.errors import EngineError, MissingError, ModelFolderError, OptionError, SpecError, TextError
from featherbed.recipe import RECIPES
from featherbed.run import windows as windows_room
from featherbed.run.batches import Batch, collate
from featherbed.run.embedder import Embedder
from featherbed.run.session import Memory
from tests.conftest import NAMES, upstream

Vectors = npt.NDArray[np.float32]
Open = Callable[[str, str], Embedder]
Copy = Callable[[str], Path]

A_TENSOR = ("int8-dynamic", "int8-smooth", "int8-full", "uint8")  # these have one activation scale for the whole batch
INVARIANT = ("fp32", "int8", "int8-block", "int4", "int4-small", "q4")
INVARIANCE = 1e-5
AGREEMENT = 2e-5
DIM, VOCABULARY = 48, 384


def mixed_lengths(count: int = 64) -> list[str]:
    """Texts of 1 to 64 tokens and more, no two alike, in no order."""
    words = " ".join(upstream("bert-mean").texts).split()
    lengths = np.random.default_rng(64).permutation(count)
    return [" ".join(words[(7 * i + k) % len(words)] for k in range(int(length))) for i, length in enumerate(lengths)]


TEXTS = mixed_lengths()


@pytest.fixture(scope="module")
def opened(folders: dict[str, Path]) -> Open:
    cache: dict[tuple[str, str], Embedder] = {}

    def get(name: str, variant: str) -> Embedder:
        if (name, variant) not in cache:
            cache[name, variant] = Embedder(folders[name], variant)
        return cache[name, variant]

    return get


def padded(rows: Sequence[Sequence[int]], pad_id: int, side: str) -> Batch:
    """Rows with the padding right, left, or left in every second row."""
    width = max(map(len, rows))
    ids, mask = np.full((len(rows), width), pad_id), np.zeros((len(rows), width), np.int64)
    for at, row in enumerate(rows):
        left = side == "left" or (side == "mixed" and at % 2 == 1)
        start = width - len(row) if left else 0
        ids[at, start : start + len(row)] = row
        mask[at, start : start + len(row)] = 1
    return Batch(ids, mask, np.arange(len(rows)))


def drift(a: Vectors, b: Vectors) -> float:
    """The largest 1 − cos of the rows of a and b, in float64."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    return float((1 - (x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1))).max())


def company_drift(embedder: Embedder) -> float:
    """The largest 1 − cos between a text alone and in company, over sides and places in the batch."""
    rows = embedder.ids(TEXTS)
    assert {len(row) for row in rows} >= {len(embedder.ids([""])[0]), embedder.spec.max_length}
    pad = embedder.spec.pad_id
    alone = np.concatenate([embedder.embed(collate([row], pad)) for row in rows])
    found = []
    for turn, side in enumerate(("right", "left", "mixed")):
        order = np.roll(np.arange(len(rows)), 21 * turn)
        found.append(drift(alone[order], embedder.embed(padded([rows[i] for i in order], pad, side))))
    return max(found)


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    path = folder / "featherbed.json"
    manifest = json.loads(path.read_text("utf-8"))
    change(manifest)
    path.write_text(json.dumps(manifest), "utf-8")
    return folder


def failed(*names: str) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        for name in names:
            manifest["variants"][name]["passed"] = False

    return change


def write_table(path: Path, dim: int = DIM, output: str = "last_hidden_state", rank: int = 3) -> Vectors:
    """An .onnx file that looks ids up in a table [VOCABULARY, dim]; rank 2 keeps the first token's row."""
    table = np.random.default_rng(dim).normal(size=(VOCABULARY, dim)).astype(np.float32)
    axes: list[str | int | None] = ["batch", "tokens", dim] if rank == 3 else ["batch", dim]
    first = [
        helper.make_node("Gather", ["input_ids", "zero"], ["first"], axis=1),
        helper.make_node("Gather", ["table", "first"], [output]),
    ]
    graph = helper.make_graph(
        first if rank == 2 else [helper.make_node("Gather", ["table", "input_ids"], [output])],
        "table",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, axes)],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.array(0), "zero")],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return table


@pytest.mark.parametrize("name", NAMES)
def test_vectors_are_upstreams(opened: Open, name: str) -> None:
    known = upstream(name)
    vectors = opened(name, "fp32").encode(known.texts)
    assert vectors.dtype == np.float32
    assert np.abs(vectors - known.unit).max() <= AGREEMENT
    assert np.abs(vectors - np.roll(known.unit, 1, axis=0)).max() > 1000 * AGREEMENT


@pytest.mark.parametrize("name", NAMES)
def test_vectors_that_are_not_normalised_are_upstreams(opened: Open, name: str) -> None:
    known = upstream(name)
    vectors = opened(name, "fp32").encode(known.texts, normalize_embeddings=False)
    lengths = np.linalg.norm(known.vectors, axis=1, keepdims=True)
    assert np.abs(lengths - 1).min() > 0.1
    assert (np.abs(vectors - known.vectors) / lengths).max() <= AGREEMENT


@pytest.mark.parametrize(
    ("name", "variant"),
    # a scale a tensor is another one for the pooled tokens alone, whose last tail is computed by itself
    [(name, variant) for name in NAMES for variant in RECIPES if name == "bert-mean" or variant not in A_TENSOR],
)
def test_pooling_in_the_graph_and_in_numpy_agree(opened: Open, name: str, variant: str) -> None:
    embedder = opened(name, variant)
    batch = padded(embedder.ids(TEXTS), embedder.spec.pad_id, "mixed")
    raw = embedder.embed(batch, unit=False).astype(np.float64)
    unit = raw / np.sqrt((raw * raw).sum(axis=1, keepdims=True))
    assert np.abs(embedder.embed(batch) - unit).max() <= 2e-6


@pytest.mark.parametrize("variant", INVARIANT)
@pytest.mark.parametrize("name", NAMES)
def test_company_place_and_padding_side_change_nothing(opened: Open, name: str, variant: str) -> None:
    assert company_drift(opened(name, variant)) <= INVARIANCE


@pytest.mark.parametrize("variant", A_TENSOR)
def test_stock_int8_depends_on_its_company_and_the_measure_sees_it(opened: Open, variant: str) -> None:
    assert max(company_drift(opened(name, variant)) for name in NAMES) > INVARIANCE


@pytest.mark.parametrize("variant", INVARIANT)
@pytest.mark.parametrize("name", NAMES)
def test_order_is_kept_whatever_the_lengths(opened: Open, name: str, variant: str) -> None:
    embedder = opened(name, variant)
    alone = np.stack([embedder.encode(text) for text in TEXTS])
    together = embedder.encode(TEXTS)
    assert drift(alone, together) <= INVARIANCE
    assert drift(np.roll(alone, 1, axis=0), together) > 100 * INVARIANCE


@pytest.mark.parametrize("budget", [1, 64, 200, 100_000])
def test_the_token_budget_bounds_every_run_and_changes_no_vector(
    folders: dict[str, Path], opened: Open, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    embedder = Embedder(folders["bert-mean"], "fp32", batch_tokens=budget)
    embed, runs = embedder.embed, list[tuple[int, ...]]()

    def spy(batch: Batch, unit: bool = True, alone: bool = True) -> Vectors:
        runs.append(batch.ids.shape)
        return embed(batch, unit, alone)

    monkeypatch.setattr(embedder, "embed", spy)
    assert drift(embedder.encode(TEXTS), opened("bert-mean", "fp32").encode(TEXTS)) <= INVARIANCE
    assert all(rows == 1 or rows * width <= budget for rows, width in runs)
    assert sum(rows for rows, _ in runs) == len(TEXTS)


@pytest.mark.parametrize("budget", [0, -1])
def test_a_token_budget_below_one_is_an_option_error(folders: dict[str, Path], budget: int) -> None:
    with pytest.raises(OptionError, match=rf"^batch_tokens: expected at least 1, found {budget}"):
        Embedder(folders["bert-mean"], "fp32", batch_tokens=budget)


def test_threads_below_zero_are_an_option_error(folders: dict[str, Path]) -> None:
    with pytest.raises(OptionError, match=r"^threads"):
        Embedder(folders["bert-mean"], "fp32", threads=-1)


@pytest.mark.parametrize("pool_size", [None, 1, 3])
@pytest.mark.parametrize("memory", [Memory(), Memory(prepack=False), Memory(cache=False, prompts=False)])
@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_threads_runs_and_memory_change_no_vector(
    folders: dict[str, Path], opened: Open, variant: str, memory: Memory, pool_size: int | None
) -> None:
    expected = opened("qwen3-tied", variant).encode_query(TEXTS)
    for threads in (1, 2):
        embedder = Embedder(
            folders["qwen3-tied"], variant, threads=threads, pool_size=pool_size, memory=memory, batch_tokens=300
        )
        assert embedder.provider == "cpu"
        assert drift(embedder.encode_query(TEXTS), expected) <= INVARIANCE


@pytest.mark.parametrize("variant", ["int8", "int4-small"])
@pytest.mark.parametrize("name", ["qwen3-biased", "bert-cls"])
def test_prepacked_weights_and_kept_prompts_change_no_vector(
    folders: dict[str, Path], opened: Open, tmp_path: Path, name: str, variant: str
) -> None:
    embedder = Embedder(folders[name], variant, memory=Memory(cache=tmp_path))
    assert [path.name for path in tmp_path.glob("*/entry.json")] == ["entry.json"]
    expected = opened(name, variant).encode(TEXTS, prompt="find what the old harbour says: ")
    for _ in range(2):
        assert drift(embedder.encode(TEXTS, prompt="find what the old harbour says: "), expected) <= INVARIANCE


def test_an_unknown_provider_and_one_that_is_not_installed_are_errors(folders: dict[str, Path]) -> None:
    with pytest.raises(OptionError, match=r"^provider 'gpu': .*did you mean cuda\?"):
        Embedder(folders["bert-mean"], "fp32", provider="gpu")
    with pytest.raises(MissingError, match="pip install onnxruntime-openvino"):
        Embedder(folders["bert-mean"], "fp32", provider="openvino")


@pytest.mark.parametrize("variant", INVARIANT)
def test_many_threads_give_the_vectors_of_one(opened: Open, variant: str) -> None:
    embedder = opened("qwen3-biased", variant)
    expected = embedder.encode(TEXTS)
    orders = [np.random.default_rng(turn).permutation(len(TEXTS))[: 5 + turn] for turn in range(32)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda order: embedder.encode([TEXTS[i] for i in order]), orders))
    for order, vectors in zip(orders, answers, strict=True):
        assert drift(vectors, expected[order]) <= INVARIANCE


@pytest.mark.parametrize("name", NAMES)
def test_a_query_is_encoded_behind_its_prompt(opened: Open, name: str) -> None:
    embedder = opened(name, "fp32")
    plain = embedder.encode([f"find: {text}" for text in TEXTS])
    for vectors in (
        embedder.encode_query(TEXTS),
        embedder.encode(TEXTS, prompt_name="query"),
        embedder.encode(TEXTS, prompt="find: "),
    ):
        assert np.array_equal(vectors, plain)
    assert drift(plain, embedder.encode(TEXTS)) > 100 * INVARIANCE


def test_a_document_is_encoded_behind_its_prompt(copied: Copy) -> None:
    folder = edit(copied("bert-mean"), lambda m: m["spec"].update(prompts={"passage": " say: "}))
    embedder = Embedder(folder, "fp32")
    assert np.array_equal(embedder.encode_document(TEXTS), embedder.encode([f" say: {text}" for text in TEXTS]))
    assert np.array_equal(embedder.encode_query(TEXTS), embedder.encode(TEXTS))


def test_the_default_prompt_comes_first_unless_another_was_asked_for(copied: Copy) -> None:
    folder = edit(copied("bert-mean"), lambda m: m["spec"].update(default_prompt_name="query"))
    embedder = Embedder(folder, "fp32")
    bare = embedder.encode(TEXTS, prompt="")
    assert np.array_equal(embedder.encode(TEXTS), embedder.encode([f"find: {text}" for text in TEXTS], prompt=""))
    assert np.array_equal(embedder.encode(TEXTS, prompt_name="document"), bare)
    assert drift(embedder.encode(TEXTS), bare) > 100 * INVARIANCE


def test_an_unknown_prompt_name_lists_the_known_ones(opened: Open) -> None:
    with pytest.raises(OptionError, match=r"^prompt 'queery': expected one of query, document"):
        opened("bert-mean", "fp32").encode("rain", prompt_name="queery")


def test_a_prompt_name_on_a_model_without_prompts_says_so(copied: Copy) -> None:
    folder = edit(copied("bert-mean"), lambda m: m["spec"].update(prompts={}))
    with pytest.raises(OptionError, match="this model has no prompts"):
        Embedder(folder, "fp32").encode("rain", prompt_name="query")


@pytest.mark.parametrize("dim", [1, 7, DIM - 1, DIM])
def test_truncation_cuts_then_normalises(opened: Open, dim: int) -> None:
    known = upstream("qwen3-tied")
    embedder = opened("qwen3-tied", "fp32")
    cut = known.vectors[:, :dim].astype(np.float64)
    unit = cut / np.sqrt((cut * cut).sum(axis=1, keepdims=True))
    shortest = (np.linalg.norm(cut, axis=1) / np.linalg.norm(known.vectors, axis=1)).min()
    for encode in (embedder.encode, embedder.encode_document):
        vectors = encode(known.texts, truncate_dim=dim)
        assert vectors.shape == (len(known.texts), dim)
        assert np.abs(vectors - unit).max() <= 2 * AGREEMENT / shortest
    query = embedder.encode_query(known.texts, truncate_dim=dim)
    assert np.abs(np.linalg.norm(query, axis=1) - 1).max() <= 1e-6


def test_truncation_without_normalising_only_cuts(opened: Open) -> None:
    embedder = opened("qwen3-tied", "fp32")
    whole = embedder.encode(TEXTS, normalize_embeddings=False)
    assert np.array_equal(embedder.encode(TEXTS, normalize_embeddings=False, truncate_dim=5), whole[:, :5])


@pytest.mark.parametrize("dim", [0, -1, DIM + 1, 1.5, "8", True])
def test_a_dimension_the_model_lacks_is_an_option_error(opened: Open, dim: Any) -> None:
    with pytest.raises(OptionError, match=rf"^truncate_dim \(--dim\): expected a whole number from 1 to {DIM}, found"):
        opened("bert-mean", "fp32").encode("rain", truncate_dim=dim)


def test_a_single_string_gives_a_single_vector(opened: Open) -> None:
    embedder = opened("bert-mean", "fp32")
    for encode in (embedder.encode, embedder.encode_query, embedder.encode_document):
        assert encode("rain").shape == (DIM,)
        assert np.array_equal(encode("rain"), encode(["rain"])[0])
    assert embedder.encode("rain", truncate_dim=5).shape == (5,)


def test_no_texts_give_no_vectors(opened: Open) -> None:
    embedder = opened("bert-mean", "fp32")
    assert embedder.encode([]).shape == (0, DIM)
    assert embedder.encode([], truncate_dim=5).shape == (0, 5)
    assert embedder.encode([]).dtype == np.float32


@pytest.mark.parametrize("kind", [tuple, iter, np.array])
def test_any_row_of_strings_will_do(opened: Open, kind: Callable[[list[str]], Any]) -> None:
    embedder = opened("bert-mean", "fp32")
    assert np.array_equal(embedder.encode(kind(["rain", "a fox"])), embedder.encode(["rain", "a fox"]))


def test_similarity_is_the_cosine(opened: Open) -> None:
    noise = np.random.default_rng(3)
    a, b = (noise.normal(0, 5, (count, DIM)).astype(np.float32) for count in (3, 4))
    x, y = a.astype(np.float64), b.astype(np.float64)
    cosine = np.array([[float(u @ v) / (float(u @ u) * float(v @ v)) ** 0.5 for v in y] for u in x])
    embedder = opened("bert-mean", "fp32")
    assert np.abs(embedder.similarity(a, b) - cosine).max() <= 1e-6
    assert np.abs(embedder.similarity(a[0], b) - cosine[:1]).max() <= 1e-6
    assert embedder.similarity(a[0], b[0]).shape == (1, 1)
    assert embedder.similarity(a, b).dtype == np.float32


def test_similarity_with_a_row_of_zeros_is_zero(opened: Open) -> None:
    vectors = np.eye(2, DIM, dtype=np.float32)
    assert opened("bert-mean", "fp32").similarity(np.zeros((1, DIM), np.float32), vectors).tolist() == [[0, 0]]


def test_more_texts_than_a_window_keep_their_order(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = opened("bert-cls", "fp32")
    whole = embedder.encode(TEXTS)
    monkeypatch.setattr(windows_room, "WINDOW_TEXTS", 7)
    told: list[tuple[int, int]] = []
    windowed = embedder.encode(TEXTS, progress=lambda _, done, total: told.append((done, total)))
    assert drift(windowed, whole) <= INVARIANCE
    assert len(told) >= len(TEXTS) / 7
    assert told == sorted(set(told))
    assert told[-1] == (len(TEXTS), len(TEXTS))


@pytest.mark.parametrize("place", [0, 3, 6])
def test_a_bad_item_is_named_by_its_place_among_all_texts(
    opened: Open, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    monkeypatch.setattr(windows_room, "WINDOW_TEXTS", 4)
    items: list[Any] = ["rain"] * 7
    items[place] = None
    with pytest.raises(TextError, match=f"^text {place}: expected a string, found NoneType"):
        opened("bert-mean", "fp32").encode(items)


def test_bytes_are_no_text(opened: Open) -> None:
    item: Any = b"rain"
    with pytest.raises(TextError, match=r"^text 0: expected a string"):
        opened("bert-mean", "fp32").encode(item)


def test_the_progress_bar_is_drawn_on_standard_error_and_only_when_asked(
    opened: Open, capsys: pytest.CaptureFixture[str]
) -> None:
    embedder = opened("bert-mean", "fp32")
    embedder.encode(TEXTS)
    assert capsys.readouterr() == ("", "")
    embedder.encode(TEXTS, show_progress_bar=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "64/64" in err


def test_a_batch_with_a_row_of_padding_only_is_a_text_error(opened: Open) -> None:
    embedder = opened("bert-mean", "fp32")
    batch = collate(embedder.ids(["rain", "a fox"]), 0)
    batch.mask[1] = 0
    for unit in (True, False):
        with pytest.raises(TextError, match=r"^row 1 of the batch: "):
            embedder.embed(batch, unit)


@pytest.mark.parametrize("variant", RECIPES)
def test_a_bare_file_gives_the_vectors_of_its_variant(folders: dict[str, Path], opened: Open, variant: str) -> None:
    path = folders["qwen3-biased"] / "onnx" / f"model{RECIPES[variant].suffix}.onnx"
    bare = Embedder(path)
    assert bare.variant == path.stem
    error = np.abs(bare.encode_query(TEXTS) - opened("qwen3-biased", variant).encode_query(TEXTS))
    assert error.max() <= 1e-6


@pytest.mark.parametrize("home", ["flat", "onnx"])
def test_a_bare_file_finds_its_configs_beside_it(folders: dict[str, Path], tmp_path: Path, home: str) -> None:
    shutil.copytree(folders["bert-cls"], tmp_path / home, ignore=shutil.ignore_patterns("onnx", "featherbed.json"))
    path = Path(shutil.copy(folders["bert-cls"] / "onnx" / "model.onnx", tmp_path / home))
    known = upstream("bert-cls")
    assert np.abs(Embedder(path).encode(known.texts) - known.unit).max() <= AGREEMENT


def test_a_bare_file_without_configs_is_a_spec_error(folders: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copy(folders["bert-cls"] / "onnx" / "model.onnx", tmp_path))
    with pytest.raises(SpecError, match=r"config\.json"):
        Embedder(path)


def test_a_bare_file_that_is_missing_is_a_model_folder_error(folders: dict[str, Path]) -> None:
    with pytest.raises(ModelFolderError, match=r"absent\.onnx: expected an \.onnx file, found no such file"):
        Embedder(folders["bert-mean"] / "onnx" / "absent.onnx")


def test_hidden_states_alone_are_pooled_by_what_the_spec_says(copied: Copy) -> None:
    folder = copied("bert-mean")
    table = write_table(folder / "onnx" / "table.onnx").astype(np.float64)
    embedder = Embedder(folder / "onnx" / "table.onnx")
    means = np.array([np.mean([table[i] for i in row], axis=0) for row in embedder.ids(TEXTS)])
    unit = means / np.sqrt((means * means).sum(axis=1, keepdims=True))
    shortest = np.linalg.norm(means, axis=1).min()
    assert np.abs(embedder.encode(TEXTS) - unit).max() <= 1e-5 / shortest
    assert np.abs(embedder.encode(TEXTS, normalize_embeddings=False) - means).max() <= 1e-5


@pytest.mark.parametrize(
    ("dim", "output", "rank"),
    [
        (DIM - 16, "last_hidden_state", 3),
        (DIM + 16, "last_hidden_state", 3),
        (DIM - 16, "sentence_embedding", 2),
        (DIM + 16, "sentence_embedding", 2),
        (DIM, "last_hidden_state", 2),
    ],
)
def test_a_graph_that_is_not_the_specs_is_an_engine_error(copied: Copy, dim: int, output: str, rank: int) -> None:
    folder = copied("bert-mean")
    write_table(folder / "onnx" / "table.onnx", dim, output, rank)
    with pytest.raises(EngineError, match=str(DIM)):
        Embedder(folder / "onnx" / "table.onnx").encode(["rain", "a fox"])


@pytest.mark.parametrize(
    ("bad", "chosen"),
    [
        ((), "int8"),
        (("int8",), "int8-block"),
        (("int8", "int8-block"), "fp32"),
        (("fp32",), "int8"),
        (("fp32", "int8", "int8-block", "int4", "int4-small", "int8-dynamic"), "int8-smooth"),
        (tuple(name for name in RECIPES if name != "q4"), "q4"),
    ],
)
def test_auto_avoids_variants_that_failed_their_gates(copied: Copy, bad: tuple[str, ...], chosen: str) -> None:
    embedder = Embedder(edit(copied("bert-mean"), failed(*bad)))
    assert embedder.variant == chosen
    assert embedder.encode("rain").shape == (DIM,)


def test_auto_refuses_when_every_variant_failed_and_a_named_one_still_works(copied: Copy) -> None:
    folder = edit(copied("bert-mean"), failed(*RECIPES))
    with pytest.raises(OptionError, match=r"expected a variant that passed its gates, found none of fp32, int8"):
        Embedder(folder)
    assert Embedder(folder, "q4").variant == "q4"


def test_an_unknown_variant_lists_the_known_ones(folders: dict[str, Path]) -> None:
    with pytest.raises(OptionError, match=r"^variant 'int9' .*expected one of fp32, int8, int8-block"):
        Embedder(folders["bert-mean"], "int9")


def test_a_variant_that_needs_a_newer_onnxruntime_says_which(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    least = json.loads((folders["bert-mean"] / "featherbed.json").read_text("utf-8"))["variants"]["q4"]
    monkeypatch.setattr(onnxruntime, "__version__", "1.2.0")
    with pytest.raises(EngineError, match=rf"^variant q4 .*onnxruntime {least['least_onnxruntime']} or newer.*1\.2\.0"):
        Embedder(folders["bert-mean"], "q4")


@pytest.mark.parametrize("folder", ["absent", "empty"])
def test_what_is_no_model_folder_is_an_error(tmp_path: Path, folder: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelFolderError, match=rf"{folder}: expected a model folder with featherbed\.json"):
        Embedder(tmp_path / folder)


def test_a_missing_file_of_a_variant_is_an_error_and_the_others_work(copied: Copy) -> None:
    folder = copied("bert-mean")
    (folder / "onnx" / "model_int8.onnx").unlink()
    with pytest.raises(ModelFolderError, match=r"model_int8\.onnx: expected \d+ bytes, found no such file"):
        Embedder(folder, "int8")
    assert Embedder(folder, "fp32").encode("rain").shape == (DIM,)


@pytest.mark.parametrize("left", [0, 1, 1000])
def test_a_cut_file_of_a_variant_is_an_error(copied: Copy, left: int) -> None:
    folder = copied("bert-mean")
    path = folder / "onnx" / "model_q4.onnx"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ModelFolderError, match=rf"model_q4\.onnx: expected \d+ bytes, found {left} bytes"):
        Embedder(folder, "q4")


def test_a_bare_file_takes_no_variant(folders: dict[str, Path]) -> None:
    with pytest.raises(OptionError, match="expected no variant"):
        Embedder(folders["bert-cls"] / "onnx" / "model_q4.onnx", "int8")


def test_vectors_of_two_widths_have_no_similarity(opened: Open) -> None:
    embedder = opened("bert-mean", "fp32")
    with pytest.raises(OptionError, match="one width"):
        embedder.similarity(embedder.encode(["a"]), embedder.encode(["a"], truncate_dim=8))
