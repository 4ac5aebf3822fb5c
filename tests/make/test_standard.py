"""Operators of the standard: each against a plain twin in numpy and, through onnxruntime, against the fused one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featherbed.errors import OptionError
from featherbed.make.graph.lower import lower
from featherbed.make.graph.standard import standard
from featherbed.make.ir import MICROSOFT, Attribute, Graph, Node, Port, Weight, constant
from featherbed.make.quantize import apply
from featherbed.make.quantize.blockwise import block_weights
from featherbed.make.quantize.table import table_weights
from featherbed.make.variant import finished, made
from featherbed.make.write import model_bytes
from featherbed.recipe import RECIPES, BlockwiseLinear
from featherbed.steps import Standard
from tests.conftest import FIXTURES, NAMES, cosines_of, made_by, ran, reference_of, texts_for, upstream

Array = npt.NDArray[Any]
Float = npt.NDArray[np.float32]
F32 = np.dtype(np.float32)
I32 = np.dtype(np.int32)
ROUNDING = 2e-6  # of sums of a hundred numbers near 1


def gaussian(*shape: int, seed: int = 0) -> Float:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def run(graph: Graph, feeds: dict[str, Array]) -> Array:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session: Any = ort.InferenceSession(model_bytes(graph), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run([graph.outputs[0].name], feeds)[0])


# attention


@dataclass(frozen=True)
class Case:
    """A call of GroupQueryAttention: heads, lengths, attributes."""

    heads: int = 4
    kv_heads: int = 2
    size: int = 16
    tokens: int = 7
    lengths: tuple[int, ...] = (7, 4, 1)
    rotary: bool = False
    packed: bool = False
    bias: tuple[int, int] | None = None  # its batch and heads
    attributes: dict[str, Attribute] = field(default_factory=dict)

    @property
    def real(self) -> npt.NDArray[np.bool_]:
        return np.arange(self.tokens)[None] < np.asarray(self.lengths)[:, None]

    def qkv(self) -> list[Float]:
        widths = [self.heads * self.size, *[self.kv_heads * self.size] * 2]
        return [gaussian(len(self.lengths), self.tokens, width, seed=at) for at, width in enumerate(widths)]

    def tables(self) -> tuple[Float, Float]:
        angles = np.outer(np.arange(self.tokens + 5), 1 / 100 ** (np.arange(self.size // 2) / self.size))
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def biases(self) -> Float | None:
        return None if self.bias is None else gaussian(*self.bias, self.tokens, self.tokens, seed=9)

    def graph(self) -> tuple[Graph, dict[str, Array]]:
        """The operator behind products with 1, which say how wide its inputs are; and what it is fed."""
        parts = [np.concatenate(self.qkv(), axis=-1)] if self.packed else self.qkv()
        feeds: dict[str, Array] = dict(zip("qkv", parts, strict=False))
        ports = [Port(name, F32, ("b", "t", x.shape[-1])) for name, x in feeds.items()]
        weights = [constant(f"{name}1", np.ones(x.shape[-1]), F32) for name, x in feeds.items()]
        nodes = [Node("Mul", (name, f"{name}1"), (f"{name}2",)) for name in feeds]
        names = [*(f"{name}2" for name in feeds), *([""] * (3 - len(feeds))), "", "", "last", "total", "", ""]
        if self.rotary:
            weights += [constant(name, table, F32) for name, table in zip(("cos", "sin"), self.tables(), strict=True)]
            names[7:9] = ["cos", "sin"]
        feeds |= {"last": np.asarray(self.lengths, np.int32) - 1, "total": np.asarray(self.tokens, np.int32)}
        ports += [Port("last", I32, ("b",)), Port("total", I32, ())]
        if (biases := self.biases()) is not None:
            feeds["bias"], names = biases, [*names, "", "bias"]
            ports.append(Port("bias", F32, ("x", "y", "t", "u")))
        said = {
            "num_heads": self.heads,
            "kv_num_heads": self.kv_heads,
            "do_rotary": int(self.rotary),
            **self.attributes,
        }
        nodes.append(Node("GroupQueryAttention", tuple(names), ("y",), MICROSOFT, tuple(said.items())))
        out = Port("y", F32, ("b", "t", self.heads * self.size))
        return Graph("one", 21, tuple(nodes), {w.name: w for w in weights}, tuple(ports), (out,)), feeds

    def twin(self) -> Array:
        """Attention as one would explain it: token by token, head by head, in float64."""
        q, k, v = (x.astype(np.float64).reshape(*x.shape[:2], -1, self.size) for x in self.qkv())
        if self.rotary:
            q, k = turned(q, *self.tables()), turned(k, *self.tables())
        number = {key: float(str(value)) for key, value in self.attributes.items()}
        scale, cap = number.get("scale") or self.size**-0.5, number.get("softcap", 0)
        window, biases = number.get("local_window_size", -1), self.biases()
        out = np.zeros((*q.shape[:2], self.heads * self.size))
        for b, length in enumerate(self.lengths):
            for t in range(length):
                for h in range(self.heads):
                    shared = h // (self.heads // self.kv_heads)
                    last = t if number.get("causal", 1) else length - 1
                    seen = [j for j in range(last + 1) if window < 0 or j > t - window]
                    scores = np.array([q[b, t, h] @ k[b, j, shared] * scale for j in seen])
                    scores = cap * np.tanh(scores / cap) if cap else scores
                    if biases is not None:
                        scores += biases[b % biases.shape[0], h % biases.shape[1], t, seen]
                    weights = np.exp(scores - scores.max())
                    mixed = (weights / weights.sum()) @ v[b, seen, shared]
                    out[b, t, h * self.size : (h + 1) * self.size] = mixed
        return out


def turned(x: Array, cos: Array, sin: Array) -> Array:
    """x [B, T, H, S], each pair (i, i + S / 2) as a complex number times its angle."""
    pairs = x[..., : x.shape[-1] // 2] + 1j * x[..., x.shape[-1] // 2 :]
    pairs = pairs * (cos + 1j * sin)[None, : x.shape[1], None]
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


CASES = {
    "causal": Case(),
    "own keys": Case(heads=3, kv_heads=3, size=8),
    "one key for all": Case(heads=5, kv_heads=1),
    "rotary": Case(rotary=True),
    "packed": Case(packed=True, rotary=True),
    "everything seen": Case(packed=True, attributes={"causal": 0}),
    "scale": Case(attributes={"scale": 0.3}),
    "softcap": Case(attributes={"softcap": 2.0}),
    "window": Case(attributes={"local_window_size": 3}),
    "window of one": Case(attributes={"local_window_size": 1}),
    "bias": Case(bias=(3, 4), attributes={"causal": 0}),
    "bias of all": Case(bias=(1, 1), attributes={"causal": 0}),
    "bias of heads, capped": Case(bias=(1, 4), attributes={"softcap": 2.0}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_attention_is_the_twin_s_and_the_fused_operator_s(case: Case) -> None:
    graph, feeds = case.graph()
    found = run(standard(graph), feeds)
    assert np.isfinite(found).all()  # rows of padding too
    assert np.abs(found - case.twin())[case.real].max() <= ROUNDING
    assert np.abs(found - run(graph, feeds))[case.real].max() <= ROUNDING


@pytest.mark.parametrize(
    "attributes",
    [{"rotary_interleaved": 1}, {"smooth_softmax": 1}, {"qk_output": 1}, {"k_quant_type": "PER_TENSOR"}, {"new": 1}],
    ids=str,
)
def test_attention_that_the_standard_s_cannot_stand_for_is_refused(attributes: dict[str, Attribute]) -> None:
    graph, _ = Case(attributes=attributes).graph()
    with pytest.raises(OptionError, match=f"GroupQueryAttention at y.*{next(iter(attributes))}"):
        standard(graph)


def test_attention_with_a_past_or_heads_of_unknown_size_is_refused() -> None:
    graph, _ = Case().graph()
    *others, node = graph.nodes
    past = replace(node, inputs=(*node.inputs[:3], "q", "q", *node.inputs[5:]))
    with pytest.raises(OptionError, match=r"inputs \[3, 4\]"):
        standard(replace(graph, nodes=(*others, past)))
    with pytest.raises(OptionError, match="heads of unknown numbers"):
        standard(replace(graph, nodes=(replace(node, inputs=("q", "k", "v", *node.inputs[3:])),)))
    with pytest.raises(OptionError, match=r"com\.microsoft\.Unheard at z"):
        standard(replace(graph, nodes=(*graph.nodes, Node("Unheard", ("y",), ("z",), MICROSOFT))))


# the other operators


def alone(node: Node, weights: tuple[Weight, ...], x: Array, *more: Port) -> Graph:
    port = Port("x", x.dtype, tuple(f"n{at}" for at in range(x.ndim)))
    return Graph("one", 21, (node,), {w.name: w for w in weights}, (port, *more), (Port("y", F32, ("a", "b")),))


def test_an_rms_norm_is_the_twin_s_and_the_fused_one_s() -> None:
    x, gain = gaussian(5, 48) * 30, gaussian(48)
    node = Node(
        "SimplifiedLayerNormalization", ("x", "g"), ("y",), "", (("axis", -1), ("epsilon", 1e-3), ("stash_type", 1))
    )
    graph = alone(node, (constant("g", gain, F32),), x)
    found = run(standard(graph), {"x": x})
    twin = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-3) * gain
    assert np.abs(found - twin).max() <= 4e-6  # values up to 8
    assert np.abs(found - run(graph, {"x": x})).max() <= 4e-6


@pytest.mark.parametrize("alpha", [1.0, 1.702])
def test_a_quick_gelu_is_the_twin_s_and_the_fused_one_s(alpha: float) -> None:
    x = gaussian(5, 48) * 4
    graph = alone(Node("QuickGelu", ("x",), ("y",), MICROSOFT, (("alpha", alpha),)), (), x)
    found = run(standard(graph), {"x": x})
    assert np.abs(found - x / (1 + np.exp(-alpha * x.astype(np.float64)))).max() <= ROUNDING
    assert np.abs(found - run(graph, {"x": x})).max() <= ROUNDING


@settings(max_examples=30, deadline=None)
@given(
    bits=st.sampled_from([4, 8]), block=st.sampled_from([16, 32]), columns=st.integers(1, 70), rows=st.integers(1, 9),
    searched=st.booleans(),
)  # fmt: skip
def test_weights_in_blocks_of_any_shape_are_the_same_numbers(
    bits: int, block: int, columns: int, rows: int, searched: bool
) -> None:
    weight = constant("w", gaussian(rows, columns, seed=bits), F32)
    step = BlockwiseLinear(bits, block, None, searched=searched)
    parts = block_weights(weight, step)
    attributes = (("K", columns), ("N", rows), ("bits", bits), ("block_size", block))
    x = np.eye(columns, dtype=np.float32)  # the product is the weight itself
    graph = alone(Node("MatMulNBits", ("x", *(p.name for p in parts)), ("y",), MICROSOFT, attributes), parts, x)
    written = standard(graph)
    assert [node.op for node in written.nodes] == ["DequantizeLinear", "Gemm"]
    codes, scales, *zeros = (part.array() for part in parts)
    whole = np.stack((codes & 15, codes >> 4), -1).reshape(rows, -1, block) if bits == 4 else codes
    points: Array = np.asarray(2 ** (bits - 1))
    if zeros:
        packed = zeros[0].reshape(rows, -1)
        points = np.stack((packed & 15, packed >> 4), -1).reshape(rows, -1) if bits == 4 else packed
        points = points[:, : whole.shape[1], None].astype(int)
    twin = ((whole.astype(int) - points) * scales.reshape(rows, -1, 1)).reshape(rows, -1)[:, :columns]
    found = run(written, {"x": x})
    assert np.abs(found - twin.T).max() <= 1e-6
    assert np.abs(found - run(graph, {"x": x})).max() <= 1e-6
    for part in written.weights.values():
        assert sum(block.nbytes for block in part.read()) == part.size_bytes


@pytest.mark.parametrize("shape", [(9, 64, 32), (9, 48, 64), (9, 96, 64)], ids=str)
def test_a_table_in_blocks_gives_the_same_rows(shape: tuple[int, int, int]) -> None:
    rows, width, block = shape
    table = constant("t", gaussian(rows, width), F32)
    codes, scales = table_weights(table, 4, block)
    attributes = (("bits", 4), ("block_size", block), ("gather_axis", 0), ("quantize_axis", 1))
    ids = np.array([[0, 8, 3], [3, 1, 0]])
    node = Node("GatherBlockQuantized", (codes.name, "x", scales.name), ("y",), MICROSOFT, attributes)
    graph = alone(node, (codes, scales), ids)
    graph = replace(graph, outputs=(Port("y", F32, ("a", "b", width)),))
    found = run(standard(graph), {"x": ids})
    assert np.array_equal(found, run(graph, {"x": ids}))
    assert np.abs(found - table.array()[ids]).max() <= np.abs(table.array()).max() / 2**3


def test_an_integer_product_has_its_scales_behind_it() -> None:
    x = np.random.default_rng(1).integers(0, 255, (4, 32)).astype(np.uint8)
    codes = np.random.default_rng(2).integers(-60, 60, (32, 6)).astype(np.int8)  # no sum of two passes 2^15
    scales, zero, bias = np.abs(gaussian(6)), np.uint8(120), gaussian(6)
    weights = (
        constant("c", codes, np.int8), constant("a", 0.5, F32), constant("s", scales, F32),
        constant("z", zero, np.uint8), constant("b", bias, F32),
    )  # fmt: skip
    graph = alone(Node("MatMulIntegerToFloat", ("x", "c", "a", "s", "z", "", "b"), ("y",), MICROSOFT), weights, x)
    found = run(standard(graph), {"x": x})
    twin = (x.astype(int) - 120) @ codes.astype(int) * (0.5 * scales.astype(np.float64)) + bias
    assert np.abs(found - twin).max() <= 1e-3  # of values up to 1e4
    assert np.abs(found - run(graph, {"x": x})).max() <= 1e-3


# whole variants

LEVEL_4 = {"int8-block"}  # activations are rounded by blocks, which the standard has no word for


@pytest.mark.parametrize("recipe", [r for r in RECIPES if not RECIPES[r].half and r != "bnb4"])
@pytest.mark.parametrize("name", NAMES)
def test_a_variant_in_standard_operators_computes_the_same(name: str, recipe: str) -> None:
    fused = made_by(name, recipe)
    if recipe in LEVEL_4:
        plain = [replace(n, attributes=tuple(a for a in n.attributes if a[0] != "accuracy_level")) for n in fused.nodes]
        fused = fused.replaced(plain, fused.weights)
    graph = finished(fused, (Standard(),))
    assert not [node.op for node in graph.nodes if node.domain or node.op == "SimplifiedLayerNormalization"]
    known = upstream(name)
    ids = known.ids[:3, :5]  # without padding, which a scale for the whole batch would see
    assert known.mask[:3, :5].all()
    hidden, vectors = ran(graph, ids, np.ones_like(ids))
    expected_hidden, expected = ran(fused, ids, np.ones_like(ids))
    assert 1 - cosines_of(vectors, expected).min() <= 1e-9
    assert (
        1 - cosines_of(hidden.reshape(-1, hidden.shape[-1]), expected_hidden.reshape(-1, hidden.shape[-1])).min()
        <= 1e-9
    )


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_padding_reach_no_real_row(name: str) -> None:
    known = upstream(name)
    graph = standard(lower(reference_of(FIXTURES / name)))
    hidden, vectors = ran(graph, known.ids, known.mask)
    assert np.isfinite(hidden).all()
    assert np.abs(vectors - known.unit).max() <= 2e-5
    other = np.where(known.mask > 0, known.ids, 7)
    assert np.abs(ran(graph, other, known.mask)[1] - vectors).max() <= 1e-6


def test_what_is_kept_stays_and_weights_are_still_unread() -> None:
    graph = lower(apply(reference_of(FIXTURES / "qwen3-tied"), BlockwiseLinear(4, 32, None)))

    def unread() -> Any:
        raise AssertionError("read before it is written")

    shut = replace(graph, weights={
        name: replace(w, read=unread) if len(w.shape) > 1 else w for name, w in graph.weights.items()
    })  # fmt: skip
    domains = {node.op for node in standard(shut, ("MatMulNBits",)).nodes if node.domain}
    assert domains == {"MatMulNBits"}
    assert not [node for node in standard(shut).nodes if node.domain]


def test_steps_of_the_recipe_decide() -> None:
    steps = (*RECIPES["q4"].steps, Standard())
    done = made(reference_of(FIXTURES / "bert-cls"), steps, texts_for(FIXTURES / "bert-cls"))
    assert done.steps == steps
    assert not [node for node in done.graph.nodes if node.domain]
