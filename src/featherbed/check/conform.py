"""conform(): will a folder load unchanged elsewhere? By rules always, and really, where the library is."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featherbed.check import tries
from featherbed.check.facts import Facts, GraphFile, facts
from featherbed.check.graph_rules import GRAPH_RULES
from featherbed.check.rules import CONFIG_RULES, ECOSYSTEMS, Rule
from featherbed.progress import Progress, silent

RULES = (*CONFIG_RULES, *GRAPH_RULES)
CLOSE = 0.99999  # of a vector elsewhere to ours, each text alone
PASSES, NOTED, FAILS, LOADS = "by rules", "with a note", "fails", "loads"


@dataclass(frozen=True)
class Finding:
    """A rule that does not hold: of which variant ("" for the folder's own files), and what was found."""

    rule: Rule
    variant: str
    found: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        rule = self.rule
        return {
            "rule": rule.id, "variant": self.variant or None, "fails": rule.fails, "concerns": list(rule.concerns),
            "looks_at": rule.looks_at, "found": self.found, "otherwise": rule.otherwise, "remedy": rule.remedy,
            "repair": rule.mends,
        }  # fmt: skip


@dataclass(frozen=True)
class Try:
    """One variant in one library: ``cosine`` to ours (None where we cannot run it), or why it did not load.

    ``missing`` says what is not installed: then it was not tried.
    """

    peer: str
    variant: str
    cosine: float | None
    why: str
    missing: str
    versions: dict[str, str]

    @property
    def passed(self) -> bool | None:
        """None where it was not tried."""
        if self.missing:
            return None
        return not self.why and (self.cosine is None or self.cosine >= CLOSE)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"passed": self.passed, "cosine": self.cosine, "why": self.why or None,
                "not_tried": self.missing or None, "versions": self.versions}  # fmt: skip


@dataclass(frozen=True)
class Conformance:
    """What was found out of a folder."""

    variants: tuple[str, ...]
    findings: tuple[Finding, ...]
    tried: tuple[Try, ...] = field(default=())

    @property
    def passed(self) -> bool:
        """Whether no rule failed and no library."""
        return not any(f.rule.fails for f in self.findings) and all(t.passed is not False for t in self.tried)

    def reasons(self, ecosystem: str, variant: str) -> list[Finding]:
        """Findings that concern this variant there, those that fail first."""
        mine = [f for f in self.findings if ecosystem in f.rule.concerns and f.variant in ("", variant)]
        return sorted(mine, key=lambda f: not f.rule.fails)

    def verdict(self, ecosystem: str, variant: str) -> str:
        """One word or two: "loads" was really seen."""
        seen = next((t for t in self.tried if (t.peer, t.variant) == (ecosystem, variant)), None)
        broken = any(f.rule.fails for f in self.reasons(ecosystem, variant))
        if broken or (seen is not None and seen.passed is False):
            return FAILS
        if seen is not None and seen.passed:
            return LOADS
        return NOTED if self.reasons(ecosystem, variant) else PASSES

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "passed": self.passed,
            "verdicts": {v: {e: self.verdict(e, v) for e in ECOSYSTEMS} for v in self.variants},
            "findings": [finding.to_json() for finding in self.findings],
            "tries": {v: {t.peer: t.to_json() for t in self.tried if t.variant == v} for v in self.variants},
        }


@dataclass(frozen=True)
class Peers:
    """Where libraries of others are: a Python that has them, a folder with node_modules, and which Node."""

    python: Path = field(default_factory=lambda: Path(sys.executable))
    node_packages: Path | None = None
    node: str = "node"


def conform(
    folder: Path | str,
    variants: Sequence[str] = (),
    peers: Peers | None = None,
    progress: Progress = silent,
) -> Conformance:
    """Judge a model folder, ours or another's, by every rule, and load it in the libraries of ``peers``; None: in none.

    Raises ModelFolderError when there is no .onnx file, OptionError on an unknown variant.
    """
    found = facts(Path(folder), list(variants))
    findings = tuple(Finding(rule, variant, text) for rule in RULES for variant, text in rule.look(found))
    tried = tuple(_tries(found, peers, progress)) if peers is not None else ()
    return Conformance(tuple(graph.variant for graph in found.graphs), findings, tried)


def _tries(found: Facts, peers: Peers, progress: Progress) -> Iterator[Try]:
    names = (*tries.PYTHON_PEERS, tries.NODE_PEER)
    graphs = [graph for graph in found.graphs if graph.seen is not None]
    for place, graph in enumerate(graphs):
        mine, _ = tries.own(found, graph, tries.TEXTS)
        for step, peer in enumerate(names):
            progress("load elsewhere", place * len(names) + step, len(graphs) * len(names))
            answer = _answer(found, graph, peers, peer)
            cosine = tries.cosine(answer.vectors, mine)
            yield Try(peer, graph.variant, cosine, answer.error, answer.missing, answer.versions)
    progress("load elsewhere", len(graphs) * len(names), len(graphs) * len(names))


def _answer(found: Facts, graph: GraphFile, peers: Peers, peer: str) -> tries.Answer:
    told = tries.job(found, graph, tries.TEXTS)
    if peer != tries.NODE_PEER:
        return tries.in_python(peers.python, peer, told)
    if peers.node_packages is None:
        return tries.Answer(missing="@huggingface/transformers: say --node FOLDER")
    return tries.in_node(peers.node, peers.node_packages, told)
