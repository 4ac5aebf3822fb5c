"""Which inputs a graph is fed and which output of it is read: by name, as exporters call them, and never by a guess."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from featherbed.errors import EngineError, OptionError
from featherbed.run.batches import Batch, fitted
from featherbed.run.sound import Array, Port

HIDDEN, SENTENCE = "last_hidden_state", "sentence_embedding"
TOKEN_OUTPUTS = (HIDDEN, "token_embeddings")  # [B, T, D]
VECTOR_OUTPUTS = (SENTENCE, "sentence_embedding_quantized")  # [B, D]
EITHER_OUTPUTS = ("text_embeds", "embeddings", "embedding")  # both are in use: here the number of axes says which
ASKED_OUTPUTS = ("pooler_output",)  # a layer that most embedding models do not use: only if it is asked for
OUTPUTS = (*VECTOR_OUTPUTS, *TOKEN_OUTPUTS, *EITHER_OUTPUTS, *ASKED_OUTPUTS)  # the first that is there is read
PLAIN_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
TASK, CACHED = ("task_id", "task_ids"), "use_cache_branch"
PAST = re.compile(r"past_key_values[._]\d+[._](key|value)")
INPUTS = (*PLAIN_INPUTS, *TASK, CACHED, "past_key_values.N.key", "past_key_values.N.value")
KINDS: dict[int, str] = {1: "<f4", 2: "u1", 3: "i1", 6: "<i4", 7: "<i8", 9: "?", 10: "<f2", 11: "<f8"}
TYPES = {
    "tensor(float)": 1, "tensor(uint8)": 2, "tensor(int8)": 3, "tensor(int32)": 6, "tensor(int64)": 7,
    "tensor(bool)": 9, "tensor(float16)": 10, "tensor(double)": 11,
}  # fmt: skip  # onnxruntime's words
CODES = (2, 3)  # types of outputs that were rounded

Vectors = npt.NDArray[np.float32]
Feeds = dict[str, npt.NDArray[Any]]
Scales = Mapping[str, tuple[Array, Array]]


@dataclass(frozen=True)
class Known:
    """What inputs and outputs do not say themselves, but configs or the caller do.

    ``output`` is the one asked for; ``task`` the number that a graph with tasks is fed, ``tasks`` their names;
    ``heads`` and ``size`` are of keys and values; ``first_position`` is the first token's: RoBERTa's kind counts from
    the pad id on. ``hidden_width`` is of hidden states, where vectors have another.
    """

    output: str | None = None
    task: int | None = None
    tasks: tuple[str, ...] = ()
    heads: int | None = None
    size: int | None = None
    first_position: int = 0
    pad_id: int = 0
    hidden_width: int | None = None


@dataclass(frozen=True)
class Ports:
    """The inputs of a graph by name, and the outputs that can be read: vectors, hidden states, or both.

    ``batch`` and ``length`` are set where the graph takes that many texts or tokens and no others.
    """

    inputs: dict[str, Port]
    vectors: Port | None
    hidden: Port | None
    known: Known
    batch: int | None = None
    length: int | None = None
    scales: Scales = field(default_factory=dict)

    def parts(self, batch: Batch) -> Iterator[tuple[Batch, int]]:
        """A batch in pieces of the graph's own shape, each with the number of its rows that count."""
        rows, tokens = batch.ids.shape
        return fitted(batch, (self.batch or rows, self.length or tokens), self.known.pad_id)

    def feeds(self, batch: Batch) -> Feeds:
        """An array for every input, of the type that it declares."""
        positions = np.maximum(batch.mask.cumsum(axis=1) - 1, 0) + self.known.first_position
        plain = (batch.ids, batch.mask, np.zeros_like(batch.ids), positions)
        values: dict[str, npt.NDArray[Any]] = dict(zip(PLAIN_INPUTS, plain, strict=True))
        found: Feeds = {}
        for name, port in self.inputs.items():
            kind = np.dtype(KINDS[port.kind])
            if name in values:
                found[name] = values[name].astype(kind, copy=False)
            elif name in TASK:
                shape = [len(batch.ids) if axis == 0 and size != 1 else 1 for axis, size in enumerate(port.axes or ())]
                found[name] = np.full(shape, self.known.task, kind)
            elif name == CACHED:
                found[name] = np.zeros([1] * len(port.axes or ()), kind)
            else:
                found[name] = np.zeros(self._empty(port, len(batch.ids)), kind)
        return found

    def _empty(self, port: Port, rows: int) -> tuple[int, ...]:
        """The shape of no keys or values: [rows, heads, 0, size]."""
        assert port.axes is not None
        heads, size = (a if isinstance(a, int) else k for a, k in zip(port.axes[1::2], self._sizes(), strict=True))
        assert isinstance(heads, int)
        assert isinstance(size, int)
        return rows, heads, 0, size

    def _sizes(self) -> tuple[int | None, int | None]:
        return self.known.heads, self.known.size

    def read(self, port: Port, values: npt.NDArray[Any]) -> Vectors:
        """An output as float32; one in integers is multiplied out by the scale and zero point it was rounded with."""
        if port.kind in CODES:
            scale, zero = self.scales[port.name]
            return np.asarray((values.astype(np.float32) - zero.astype(np.float32)) * scale.astype(np.float32))
        return np.asarray(values, np.float32)


def ports(
    subject: str,
    inputs: Iterable[Port],
    outputs: Iterable[Port],
    known: Known,
    scales: Callable[[], Scales] = dict,
    width: int | None = None,
) -> Ports:
    """The ports of the graph called ``subject``, whose vectors are ``width`` wide where that is given.

    ``scales`` is called only where an output is in integers. Raises EngineError on an input that nobody can feed or an
    output nobody can read, OptionError where a task or another output must be asked for.
    """
    fed, given = {p.name: p for p in inputs}, {p.name: p for p in outputs}
    _check_names(subject, fed, given)
    for port in fed.values():
        _check_input(subject, port, known)
    vectors, hidden = _chosen(subject, given, known)
    if vectors is None and hidden is None:
        raise _mismatch(subject, fed, given)
    _check_output(subject, vectors, width)
    _check_output(subject, hidden, known.hidden_width or width)
    codes = any(p is not None and p.kind in CODES for p in (vectors, hidden))
    found = scales() if codes else {}
    for one in (vectors, hidden):
        if one is not None and one.kind in CODES and one.name not in found:
            raise EngineError(
                f"output {one.name} of {subject}",
                expected="a QuantizeLinear that makes it, with its scale and zero point",
                found="numbers in 8 bits, and nothing that says what they mean",
                remedy="ask for another output, or take a file with float vectors",
            )
    axes = (fed["input_ids"].axes or ())[:2]
    batch, length = (a if isinstance(a, int) else None for a in (*axes, None, None)[:2])
    return Ports(fed, vectors, hidden, known, batch, length, found)


def _mismatch(subject: str, inputs: Iterable[str], outputs: Iterable[str]) -> EngineError:
    return EngineError(
        subject,
        expected=f"inputs among {', '.join(INPUTS)}, input_ids one of them, and an output of {', '.join(OUTPUTS[:-1])}",
        found=f"inputs {', '.join(sorted(inputs))}; outputs {', '.join(outputs)}",
        remedy="use a file that gives sentence vectors or hidden states: `featherbed build` makes one",
    )


def _check_names(subject: str, inputs: dict[str, Port], outputs: dict[str, Port]) -> None:
    unknown = [n for n in inputs if n not in INPUTS and not PAST.fullmatch(n)]
    if unknown or "input_ids" not in inputs:
        raise _mismatch(subject, inputs, outputs)


def _check_input(subject: str, port: Port, known: Known) -> None:
    rank = len(port.axes) if port.axes is not None else None
    if port.kind not in KINDS:
        raise _unfit(subject, port, "a type that numpy has", f"onnx's type {port.kind}")
    if port.name in PLAIN_INPUTS and rank not in (None, 2):
        raise _unfit(subject, port, "[texts, tokens]", f"the axes {list(port.axes or ())}")
    if port.name in TASK and known.task is None:
        names = f"one of {', '.join(known.tasks)}" if known.tasks else "the number of a task"
        raise OptionError(
            f"the task of {subject}",
            expected=f"{names}: the graph computes other vectors for each",
            found="none, and no default in the configs",
            remedy=f"say Foreign(task={known.tasks[0] if known.tasks else 0!r}), or --task",
        )
    if PAST.fullmatch(port.name):
        _check_past(subject, port, known)


def _check_past(subject: str, port: Port, known: Known) -> None:
    axes = port.axes
    if axes is None or len(axes) != 4 or (isinstance(axes[2], int) and axes[2] != 0):
        found = "nothing of its axes" if axes is None else f"the axes {list(axes)}"
        raise _unfit(subject, port, "[texts, heads, tokens before, size], tokens before of any number", found)
    for place, said, name in ((1, known.heads, "num_key_value_heads"), (3, known.size, "head_dim")):
        axis = axes[place]
        if isinstance(axis, int) and said is not None and axis != said and place == 1:
            raise _unfit(subject, port, f"{said} heads as config.json says", f"{axis}")
        if not isinstance(axis, int) and said is None:
            raise _unfit(subject, port, f"a number in place of {axis!r}, or {name} in config.json", "neither")


def _unfit(subject: str, port: Port, expected: str, found: str) -> EngineError:
    return EngineError(
        f"port {port.name} of {subject}",
        expected=expected,
        found=found,
        remedy="use the file and the configs of the same model, or export it again",
    )


def _chosen(subject: str, given: dict[str, Port], known: Known) -> tuple[Port | None, Port | None]:
    """(vectors, hidden states): the first known name of each, or the output that is asked for and nothing else."""
    if known.output is not None:
        if known.output not in given:
            raise OptionError(
                f"output {known.output!r} of {subject}",
                expected=f"one of {', '.join(given)}",
                found="no such output",
                remedy="name one of these, or none",
            )
        port = given[known.output]
        return (port, None) if _pooled(subject, port) else (None, port)
    pooled = {n: _pooled(subject, given[n]) for n in OUTPUTS if n in given and n not in ASKED_OUTPUTS}
    vectors = next((given[n] for n, is_one in pooled.items() if is_one), None)
    hidden = next((given[n] for n, is_one in pooled.items() if not is_one), None)
    # "text_embeds" of two axes beside hidden states may be another head's: names that say what they are go first
    if vectors is not None and hidden is not None and vectors.name in EITHER_OUTPUTS:
        vectors = None
    return vectors, hidden


def _pooled(subject: str, port: Port) -> bool:
    """Whether an output is a vector a text. What its name says and its number of axes must agree."""
    rank = None if port.axes is None else len(port.axes)
    says = {2: True, 3: False}.get(rank or 0)
    named = True if port.name in (*VECTOR_OUTPUTS, *ASKED_OUTPUTS) else False if port.name in TOKEN_OUTPUTS else None
    if named is None and says is None:
        raise _unfit(subject, port, "2 axes, vectors, or 3, hidden states", "nothing of them")
    if (named is not None and says is not None and named != says) or (rank is not None and says is None):
        expected = "2 or 3 axes" if named is None else f"{2 if named else 3} axes"
        raise _unfit(subject, port, f"{expected} as its name says", f"{list(port.axes or ())}")
    return bool(says if named is None else named)


def _check_output(subject: str, port: Port | None, width: int | None) -> None:
    if port is None:
        return
    if port.kind not in KINDS:
        raise _unfit(subject, port, "float32, float16, or 8 bits with a scale", f"onnx's type {port.kind}")
    last = port.axes[-1] if port.axes else None
    if width is not None and isinstance(last, int) and last != width:
        raise EngineError(
            f"output {port.name} of {subject}",
            expected=f"{len(port.axes or ())} axes, the last of {width} as the configs say",
            found=str(list(port.axes or ())),
            remedy="use the file and the configs of the same model",
        )
