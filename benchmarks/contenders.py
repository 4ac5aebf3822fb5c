"""Who runs: each contender's file, how it is made, and the runner that loads it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from runners.protocol import FIXED
from workloads import MIXED, SHAPES

from featherbed.recipe import recipe

HERE = Path(__file__).parent
MINILM_SHAPES = ("8x128", "1x16")
MINILM_VARIANTS = ("fp32", "int8", "int8-block")
TOKENIZER_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
OURS, STOCK, OPENVINO, LLAMA = "ours", "stock", "openvino", "llama"
SENTENCE_TRANSFORMERS, FASTEMBED = "sentence-transformers", "fastembed"
PEERS = (OPENVINO, LLAMA, SENTENCE_TRANSFORMERS, FASTEMBED)


@dataclass(frozen=True)
class Contender:
    """One model file of one party. ``party`` is whose Python makes it, ``runs_on`` whose Python runs it.

    ``files`` are made together by ``command``, and make up its size; without a command they are there already.
    """

    name: str
    party: str
    module: str
    words: tuple[str, ...]
    files: tuple[Path, ...]
    lines: tuple[str, ...]
    command: tuple[str, ...] = ()
    runs_on: str = ""
    copies: tuple[Path, ...] = field(default=(), repr=False)  # files to lay beside the first

    @property
    def python(self) -> str:
        """Whose Python runs it."""
        return self.runs_on or self.party


def script(name: str, *words: object) -> tuple[str, ...]:
    """A command of ours, after its Python."""
    return (str(HERE / name), *map(str, words))


def ours(checkpoint: Path, folder: Path, variants: tuple[str, ...], lines: tuple[str, ...]) -> list[Contender]:
    """Each variant of one model folder; int8 also runs the mixed texts in fixed batches."""
    verb = ("-m", "featherbed.cli", "build", str(checkpoint), "-o", str(folder))
    command = (*verb, "--variants", ",".join(variants), "--no-verify")
    made = []
    for name in variants:
        path = folder / "onnx" / f"model{recipe(name).suffix}.onnx"
        extra = (f"{MIXED} {FIXED}",) if name == "int8" and MIXED in lines else ()
        files = (path, path.with_name(f"{path.name}_data"))
        made.append(Contender(name, OURS, "runners.ours", (str(folder), name), files, lines + extra, command))
    return made


def stock(checkpoint: Path, folder: Path, pooling: str, lines: tuple[str, ...]) -> list[Contender]:
    """torch export, and onnxruntime's own quantizers on it; they run on our onnxruntime."""
    fp32 = folder / "model.onnx"
    made = []
    for name, verb, source, path in (
        ("stock fp32", "export", checkpoint, fp32),
        ("stock int8", "int8", fp32, folder / "int8" / "model.onnx"),
        ("stock q4", "q4", fp32, folder / "q4" / "model.onnx"),
    ):
        command = script("stock.py", verb, source, path)
        files = (path, path.with_name(f"{path.name}.data"))
        made.append(Contender(name, STOCK, "runners.graph", (str(path), pooling), files, lines, command, OURS))
    return made


def peers(checkpoint: Path, exported: Path, pooling: str, lines: tuple[str, ...]) -> list[Contender]:
    """sentence-transformers on the checkpoint, fastembed on the stock export."""
    weights = (checkpoint / "model.safetensors",)
    graph = (exported / "model.onnx", exported / "model.onnx.data")
    torch, fast = "runners.sentence_transformers", "runners.fastembed"
    copies = tuple(checkpoint / name for name in TOKENIZER_FILES)
    return [
        Contender(SENTENCE_TRANSFORMERS, SENTENCE_TRANSFORMERS, torch, (str(checkpoint),), weights, lines),
        Contender(FASTEMBED, FASTEMBED, fast, (str(exported), pooling), graph, lines, copies=copies),
    ]


def converted(checkpoint: Path, work: Path, lines: tuple[str, ...]) -> list[Contender]:
    """OpenVINO from the stock export, llama.cpp from the checkpoint."""
    made = []
    for kind in ("int8", "int4"):
        path = work / "openvino" / kind / "model.xml"
        command = script("convert_openvino.py", kind, work / "stock" / "model.onnx", path)
        files = (path, path.with_suffix(".bin"))
        words = (str(path), "lasttoken")
        made.append(Contender(f"openvino {kind}", OPENVINO, "runners.openvino", words, files, lines, command))
    for kind in ("q8_0", "q4_0"):
        path = work / "llama" / f"{kind}.gguf"
        command = script("convert_llama.py", kind, checkpoint, path)
        made.append(Contender(f"llama {kind}", LLAMA, "runners.llama", (str(path),), (path,), lines, command))
    return made


def qwen3(checkpoint: Path, work: Path, variants: tuple[str, ...], texts: bool) -> list[Contender]:
    """All that run the 0.6B shape, and the wall."""
    lines = (*SHAPES, MIXED) if texts else tuple(SHAPES)
    return [
        Contender("wall", OURS, "wall", (str(checkpoint),), (), ("8x128",)),
        *ours(checkpoint, work / "ours", variants, lines),
        *stock(checkpoint, work / "stock", "lasttoken", lines),
        *converted(checkpoint, work, lines),
        *peers(checkpoint, work / "stock", "lasttoken", lines),
    ]


def minilm(checkpoint: Path, work: Path, texts: bool) -> list[Contender]:
    """All that run all-MiniLM-L6-v2, with its real weights."""
    lines = (*MINILM_SHAPES, MIXED) if texts else MINILM_SHAPES
    exported = work / "minilm-stock"
    return [
        *ours(checkpoint, work / "minilm-ours", MINILM_VARIANTS, lines),
        *stock(checkpoint, exported, "mean", lines)[:1],
        *peers(checkpoint, exported, "mean", lines),
    ]


def lay_beside(contender: Contender) -> None:
    """Copy what must stand beside a made file."""
    for path in contender.copies:
        shutil.copyfile(path, contender.files[0].parent / path.name)
