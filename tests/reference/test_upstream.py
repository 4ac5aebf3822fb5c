"""Against transformers on torch, live: `make parity`. Token ids are the same on both sides."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import featherbed
from featherbed.errors import CheckpointError
from featherbed.make.graph.mpnet import buckets
from featherbed.run.batches import collate
from featherbed.run.embedder import Embedder
from tests.conftest import FIXTURES, NAMES, upstream
from tests.fixtures.make_fixtures import as_published

WINDOWED = ("modernbert", "gemma3")
BOUND = 2e-5  # largest difference of a component of unit vectors
ROOT = Path(__file__).parent.parent.parent
MINILM = ROOT / ".cache" / "all-MiniLM-L6-v2"
TINY = ROOT.parent / "shared" / "models" / "tiny-qwen3-embedding"

QWEN3 = {  # (changes of the config): every one of these broke somebody's export
    "head_dim is not hidden over heads": {"head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1},
    "as many key-value heads as heads": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16},
    "tied": {"tie_word_embeddings": True},
    "untied with attention bias": {"tie_word_embeddings": False, "attention_bias": True},
    "one key-value head": {"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 32},
    "another base and epsilon": {
        "rope_parameters": {"rope_theta": 12345.0, "rope_type": "default"},
        "rms_norm_eps": 1e-3,
    },
    "real head size": {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1},
}
FAMILIES = ("xlm-roberta", "mpnet", "nomic_bert", "qwen2")
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {  # of the other families: (fixture whose tokenizer fits, changes)
    "XLMRobertaConfig head size 8": ("xlm-roberta", {"num_attention_heads": 8}),
    "XLMRobertaConfig two types": ("xlm-roberta", {"type_vocab_size": 2}),
    "RobertaConfig one head": ("xlm-roberta", {"num_attention_heads": 1, "layer_norm_eps": 1e-5}),
    "CamembertConfig": ("xlm-roberta", {"type_vocab_size": 1}),
    "MPNetConfig one head": ("mpnet", {"num_attention_heads": 1}),
    "MPNetConfig far apart": ("mpnet", {"max_position_embeddings": 302, "layer_norm_eps": 1e-5}),
    "NomicBertConfig": ("nomic_bert", {"layer_norm_eps": 1e-6}),
    "NomicBertConfig another base": ("nomic_bert", {"rope_parameters": {"rope_theta": 123.0, "rope_type": "default"}}),
    "Qwen2Config": ("qwen2", {"num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 0}),
    "Qwen2Config both ways": ("qwen2", {"is_causal": False, "num_key_value_heads": 1, "pad_token_id": 0}),
}
BERT: dict[str, dict[str, Any]] = {
    "one head": {"num_attention_heads": 1},
    "head size 8": {"num_attention_heads": 8},
    "another epsilon and type table": {"layer_norm_eps": 1e-5, "type_vocab_size": 3},
}
MODERNBERT: dict[str, dict[str, Any]] = {
    "biases everywhere": {"norm_bias": True, "attention_bias": True, "mlp_bias": True},
    "an odd window and another pattern": {"local_attention": 13, "global_attn_every_n_layers": 2},
    "a window wider than every text": {"local_attention": 4096},
    "every layer global": {"global_attn_every_n_layers": 1},
    "real head size": {"hidden_size": 128, "num_attention_heads": 2},
    "other bases and epsilon": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 123.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 45.0},
        },
        "norm_eps": 1e-3,
    },
}
GEMMA3: dict[str, dict[str, Any]] = {
    "as EmbeddingGemma: three heads, one of keys": {"num_attention_heads": 3, "head_dim": 256},
    "as many key-value heads as heads": {"num_key_value_heads": 6, "head_dim": 16},
    "biases of attention": {"attention_bias": True},
    "an odd window and another pattern": {"sliding_window": 13, "sliding_window_pattern": 3},
    "a window wider than every text": {"sliding_window": 4096},
    "another scale, bases and epsilon": {
        "query_pre_attn_scalar": 7,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 123.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 45.0},
        },
        "rms_norm_eps": 1e-3,
    },
}


def random_checkpoint(folder: Path, config: Any, like: str) -> Path:
    """A random model of ``config`` with the tokenizer of the fixture ``like``, norms away from neutral."""
    weights = {str(FIXTURES / like): [file.name for file in (FIXTURES / like).glob("*.safetensors*")]}
    shutil.copytree(FIXTURES / like, folder, ignore=lambda place, _: weights.get(place, []))  # Dense modules stay
    torch.manual_seed(3)
    model = transformers.AutoModel.from_config(config).to(torch.float32)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name.lower() or name.endswith("bias"):
                value.add_(0.3 * torch.randn_like(value))
        table = model.get_input_embeddings().weight
        table[0] = 0.2 * torch.randn_like(table[0])
        if config.pad_token_id:
            table[config.pad_token_id] = 0.2 * torch.randn_like(table[0])
    state = {k: v.contiguous() for k, v in model.state_dict().items() if "position_ids" not in k}
    state = as_published(state, config)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict(), default=str), "utf-8")
    return folder


def largest_error(checkpoint: Path, out: Path) -> float:
    """Build and verify against the PyTorch model, on the shipped probe."""
    folder = featherbed.build(checkpoint, out, ["fp32"], check=False).folder
    report = featherbed.verify(folder, ["fp32"], upstream=checkpoint)
    error = report.metrics["fp32"].reference_max_error
    assert error is not None
    return error


@pytest.mark.parametrize("name", [*NAMES, *FAMILIES, *WINDOWED])
def test_fixtures_are_what_upstream_gives_today(name: str) -> None:
    kept = upstream(name)
    model = transformers.AutoModel.from_pretrained(FIXTURES / name, dtype=torch.float32).eval()
    with torch.inference_mode():
        out = model(input_ids=torch.from_numpy(kept.ids), attention_mask=torch.from_numpy(kept.mask))
    hidden = out.last_hidden_state.numpy()
    last = kept.mask.sum(1) - 1
    if name in ("bert-mean", "mpnet", "nomic_bert", "gemma3"):
        pooled = (hidden * kept.mask[:, :, None]).sum(1) / kept.mask.sum(1, keepdims=True)
    else:
        first = ("bert-cls", "xlm-roberta", "modernbert")
        pooled = hidden[:, 0] if name in first else hidden[np.arange(len(last)), last]
    for module in sorted((FIXTURES / name).glob("*_Dense")):
        pooled = pooled @ load_file(module / "model.safetensors")["linear.weight"].numpy().T
    assert np.abs(pooled - kept.vectors).max() <= 1e-4 * np.abs(kept.vectors).max()


@pytest.mark.parametrize("name", [*NAMES, *FAMILIES, *WINDOWED])
def test_the_fixtures_build_to_upstream_s_function(name: str, tmp_path: Path) -> None:
    assert largest_error(FIXTURES / name, tmp_path / "out") <= BOUND


@pytest.mark.parametrize("changes", QWEN3.values(), ids=QWEN3.keys())
def test_a_random_qwen3_is_upstream_s_function(changes: dict[str, Any], tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "vocab_size": 384, "hidden_size": 80, "intermediate_size": 144, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128,
        "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.15,
    }  # fmt: skip
    config = transformers.Qwen3Config(**{**values, **changes})
    checkpoint = random_checkpoint(tmp_path / "checkpoint", config, "qwen3-tied")
    assert largest_error(checkpoint, tmp_path / "out") <= BOUND


@pytest.mark.parametrize("changes", BERT.values(), ids=BERT.keys())
def test_a_random_bert_is_upstream_s_function(changes: dict[str, Any], tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "vocab_size": 384, "hidden_size": 64, "intermediate_size": 144, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.15,
    }  # fmt: skip
    config = transformers.BertConfig(**{**values, **changes})
    checkpoint = random_checkpoint(tmp_path / "checkpoint", config, "bert-mean")
    assert largest_error(checkpoint, tmp_path / "out") <= BOUND


@pytest.mark.parametrize(("kind", "like", "changes"), [(k, *v) for k, v in OTHERS.items()], ids=OTHERS.keys())
def test_a_random_model_of_the_other_families_is_upstream_s_function(
    kind: str, like: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    values: dict[str, Any] = {
        "vocab_size": 384, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": 66, "initializer_range": 0.15,
    }  # fmt: skip
    config = getattr(transformers, kind.split()[0])(**{**values, **changes})
    checkpoint = random_checkpoint(tmp_path / "checkpoint", config, like)
    if config.max_position_embeddings > 66:  # the shipped probe has longer texts than the fixture lets through
        (checkpoint / "tokenizer_config.json").write_text('{"model_max_length": 300, "pad_token": "<pad>"}', "utf-8")
    assert largest_error(checkpoint, tmp_path / "out") <= BOUND


def test_distances_fall_into_upstream_s_buckets() -> None:
    distances = np.arange(-3000, 3001)
    upstreams = transformers.models.mpnet.modeling_mpnet.MPNetEncoder.relative_position_bucket
    assert np.array_equal(upstreams(torch.from_numpy(distances)).numpy(), buckets(distances))


@pytest.mark.parametrize("changes", MODERNBERT.values(), ids=MODERNBERT.keys())
def test_a_random_modernbert_is_upstream_s_function(changes: dict[str, Any], tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "vocab_size": 384, "hidden_size": 96, "intermediate_size": 72, "num_hidden_layers": 4,
        "num_attention_heads": 3, "max_position_embeddings": 128, "local_attention": 16, "initializer_range": 0.15,
        "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3,
    }  # fmt: skip
    config = transformers.ModernBertConfig(**{**values, **changes})
    checkpoint = random_checkpoint(tmp_path / "checkpoint", config, "modernbert")
    assert largest_error(checkpoint, tmp_path / "out") <= BOUND


@pytest.mark.parametrize("changes", GEMMA3.values(), ids=GEMMA3.keys())
def test_a_random_bidirectional_gemma3_is_upstream_s_function(changes: dict[str, Any], tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "vocab_size": 384, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 4,
        "num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 128,
        "sliding_window": 16, "query_pre_attn_scalar": 32, "initializer_range": 0.15, "sliding_window_pattern": 2,
        "use_bidirectional_attention": True, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
    }  # fmt: skip
    config = transformers.Gemma3TextConfig(**{**values, **changes})
    checkpoint = random_checkpoint(tmp_path / "checkpoint", config, "gemma3")
    assert largest_error(checkpoint, tmp_path / "out") <= BOUND


@pytest.mark.parametrize(
    ("name", "key"),
    [("modernbert", "local_attention"), ("gemma3", "sliding_window"), ("gemma3", "query_pre_attn_scalar")],
)
def test_another_window_or_scale_would_be_seen(name: str, key: str, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(FIXTURES / name, tmp_path / "checkpoint"))
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    (checkpoint / "config.json").write_text(json.dumps({**config, key: config[key] + 2}), "utf-8")
    folder = featherbed.build(checkpoint, tmp_path / "out", ["fp32"], check=False).folder
    report = featherbed.verify(folder, ["fp32"], upstream=FIXTURES / name)
    assert (report.metrics["fp32"].reference_max_error or 0) > BOUND


def test_minilm_is_upstream_s_function(tmp_path: Path) -> None:
    assert largest_error(MINILM, tmp_path / "out") <= BOUND


@pytest.mark.skipif(not TINY.is_dir(), reason="the trained decoder lies beside the project, and here it does not")
def test_the_trained_decoder_is_upstream_s_function(tmp_path: Path) -> None:
    assert largest_error(TINY, tmp_path / "out") <= BOUND


def test_left_padding_gives_what_upstream_gives_for_right_padding(tmp_path: Path) -> None:
    kept = upstream("qwen3-tied")
    folder = featherbed.build(FIXTURES / "qwen3-tied", tmp_path / "out", ["fp32"], check=False).folder
    embedder = Embedder(folder)
    batch = collate(kept.rows, embedder.spec.pad_id)
    width = batch.ids.shape[1]
    ids, mask = np.zeros_like(batch.ids), np.zeros_like(batch.mask)
    for at, row in enumerate(kept.rows):
        ids[at, width - len(row) :], mask[at, width - len(row) :] = row, 1
    left = embedder.embed(type(batch)(ids, mask, batch.places))
    assert np.abs(left - kept.unit).max() <= BOUND


def test_a_wrong_rotary_base_would_be_seen(tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(FIXTURES / "qwen3-tied", tmp_path / "checkpoint"))
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    config["rope_parameters"]["rope_theta"] = 2 * config["rope_parameters"]["rope_theta"]
    (checkpoint / "config.json").write_text(json.dumps(config), "utf-8")
    folder = featherbed.build(checkpoint, tmp_path / "out", ["fp32"], check=False).folder
    report = featherbed.verify(folder, ["fp32"], upstream=FIXTURES / "qwen3-tied")
    assert (report.metrics["fp32"].reference_max_error or 0) > BOUND
    assert not report.passed


def test_a_reference_that_is_not_the_model_s_is_refused(tmp_path: Path) -> None:
    folder = featherbed.build(FIXTURES / "qwen3-tied", tmp_path / "out", ["fp32"], check=False).folder
    for wrong in (FIXTURES / "bert-mean", tmp_path / "nothing", Path("owner/name")):
        with pytest.raises(CheckpointError, match="--reference"):
            featherbed.verify(folder, upstream=wrong)
