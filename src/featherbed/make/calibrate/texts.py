"""Calibration: the texts that activations are measured on, as batches; and how much each row of them counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featherbed.make.calibrate.walk import Float, Walk, exact
from featherbed.make.ir import Graph
from featherbed.probe import Probe
from featherbed.progress import Progress, silent
from featherbed.run.batches import Batch, batches
from featherbed.run.tokens import Tokenizer
from featherbed.spec import Pooling, Spec

LONGEST = 192  # tokens of a text: longer ones teach little more
BATCH_TOKENS = 2048
SENTENCE = "sentence_embedding"


@dataclass(frozen=True)
class Calibration:
    """Batches of real text, and whose they are: name, version, hash, counts of texts and tokens."""

    probe: dict[str, Any]
    batches: tuple[Batch, ...]
    pooling: Pooling

    def part(self, tokens: int) -> Calibration:
        """Evenly spaced texts of these, about ``tokens`` of them together; at least one."""
        rows = [row[mask > 0].tolist() for b in self.batches for row, mask in zip(b.ids, b.mask, strict=True)]
        total = sum(map(len, rows))
        if total <= tokens:
            return self
        count = max(1, int(len(rows) * tokens / total))
        chosen = [rows[int(at)] for at in np.linspace(0, len(rows) - 1, count).round()]
        return Calibration(self.probe, tuple(batches(chosen, 0, BATCH_TOKENS)), self.pooling)


def calibration(probe: Probe, tokenizer: Tokenizer, spec: Spec, most_tokens: int) -> Calibration:
    """The probe's texts as batches: each behind one of the model's prompts in turn, cut to LONGEST tokens.

    Of a longer probe evenly spaced texts are taken, ``most_tokens`` together. Raises TextError, TokenizerError.
    """
    prompts = ["", *sorted({text for text in spec.prompts.values() if text})]
    rows: list[list[int]] = [[]] * len(probe.texts)
    for at, prompt in enumerate(prompts):
        places = range(at, len(probe.texts), len(prompts))
        for place, ids in zip(places, tokenizer.encode([probe.texts[p] for p in places], prompt).ids, strict=True):
            rows[place] = list(ids) if len(ids) <= LONGEST else [*ids[: LONGEST - 1], ids[-1]]
    rows = [row for row in rows if row]
    whole = Calibration({}, tuple(batches(rows, spec.pad_id, BATCH_TOKENS)), spec.pooling).part(most_tokens)
    counts = {"texts": sum(len(b.ids) for b in whole.batches), "tokens": sum(int(b.mask.sum()) for b in whole.batches)}
    named = {key: value for key, value in probe.to_json().items() if key in ("name", "version", "sha256")}
    return Calibration(named | counts, whole.batches, spec.pooling)


def row_weights(batch: Batch, rows: int, pooling: Pooling, ends: bool) -> Float:
    """How much each of ``rows`` rows [R] counts: every text 1 in all, shared by its tokens; padding 0.

    ``ends`` is for the layers behind the last attention: the token that stands for its text counts 1 more. One row a
    text: each 1.
    """
    count, width = batch.ids.shape
    if rows != count * width:
        return np.ones(rows, np.float32)
    lengths = batch.mask.sum(axis=1, keepdims=True)
    at = np.arange(width)
    weights = (at < lengths) / lengths
    if ends and pooling is not Pooling.MEAN:
        weights = weights + (at == (lengths - 1 if pooling is Pooling.LAST else 0))
    return np.asarray(weights, np.float32).reshape(-1)


def ends(graph: Graph) -> frozenset[str]:
    """Weights that several linear layers read: those behind the last attention, of all rows and of one a text."""
    names = graph.linear_names()
    return frozenset(name for name in names if names.count(name) > 1)


def sites(walk: Walk, stage: str, progress: Progress) -> Iterator[Walk]:
    """The walk at each of its sites, with the bar going on; who takes a site must make it ``go``."""
    total, done = len(set(walk.graph.linear_names())), set[str]()
    while walk.site is not None:
        progress(stage, len(done), total)
        done |= set(walk.site.weights)
        yield walk
    progress(stage, total, total)


def vectors(walk: Walk) -> npt.NDArray[np.float32]:
    """The unit vectors [N, D] at a walk's end, by batch."""
    return np.concatenate([np.asarray(v, np.float32) for v in walk.outputs(SENTENCE)])


def reference(graph: Graph, calibration: Calibration, stage: str, progress: Progress = silent) -> Float:
    """The graph's own unit vectors [N, D], by batch."""
    walk = Walk(graph, calibration.batches)
    for at in sites(walk, stage, progress):
        assert at.site is not None
        at.go({name: exact(graph.weights[name]) for name in at.site.weights})
    return vectors(walk)
