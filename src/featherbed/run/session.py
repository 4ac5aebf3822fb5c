"""Batch → hidden states or vectors. The only room that runs onnxruntime: its options, its threads, its errors."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from featherbed.cpu import cores
from featherbed.errors import EngineError, OptionError
from featherbed.run import heap, prepack
from featherbed.run.batches import LONG_TOKENS, Batch
from featherbed.run.ports import KINDS, SENTENCE, TYPES, Known, Ports, ports
from featherbed.run.providers import AUTO, CPU, check_used, choose
from featherbed.run.sound import BITS, Port
from featherbed.run.source import Loading, Source

LOG = logging.getLogger("featherbed")
FATAL = 4  # onnxruntime's severity: what fails is raised as our error, not printed as well
MOST_RUNS = 4  # concurrent runs that a session without pool_size makes
SHARED_BYTES = 64 * 2**20  # a file below it is loaded twice without a thought
SMALL_NUMBERS = 2**18  # tokens × width: a run of so few keeps what it took, or it would lose a third of its speed
WIDTH = 1024  # where nobody said one
SHRINK = "memory.enable_memory_arena_shrinkage"

Vectors = npt.NDArray[np.float32]
Past = dict[str, Vectors]
Feeds = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Memory:
    """What is kept where. ``cache`` is the folder of prepacked weights, None the user's own, False none.

    ``prepack`` False leaves float weights mapped from the file: slower, but they are not copied into memory; weights
    in 8 and 4 bits then go through other kernels, which round otherwise.
    ``prompts`` keeps the keys and values of prompts, so that a decoder computes each prompt once.
    ``give_back`` has glibc map large blocks, so that what a run took leaves the process with it; it holds for the
    whole process from the first session on. False leaves glibc's own sizes as they are.
    """

    cache: Path | Literal[False] | None = None
    prepack: bool = True
    prompts: bool = True
    give_back: bool = True


@dataclass(frozen=True)
class Engine:
    """How a session runs.

    ``threads`` are the cores it may keep busy, all of them by default. ``pool_size`` runs go on at a time, each on
    threads / pool_size of them, at least one; by default a lone batch takes all threads, and several batches run side
    by side, at most MOST_RUNS, on equal shares. ``provider`` is cpu, cuda, coreml, openvino or auto.
    """

    threads: int | None = None
    pool_size: int | None = None
    provider: str = AUTO
    memory: Memory = Memory()

    def __post_init__(self) -> None:
        """Raises OptionError on fewer than one thread or run."""
        for name, value in (("threads", self.threads), ("pool_size", self.pool_size)):
            if value is not None and value < 1:
                raise OptionError(name, expected="at least 1", found=str(value), remedy="leave it out")

    def lanes(self) -> tuple[int, int, int]:
        """Threads of a run alone, threads of a run among others, and how many of those run at a time."""
        threads = self.threads or cores()
        if self.pool_size is not None:
            each = max(1, threads // self.pool_size)
            return each, each, self.pool_size
        # the number of runs that leaves the fewest threads over; of several, the most runs
        runs = max(range(min(2, threads), min(threads, MOST_RUNS) + 1), key=lambda n: (threads // n * n, n))
        return threads, threads // runs, runs


@dataclass(frozen=True)
class Origin:
    """Whose a file is. ``check`` is called before it is read; ``foreign``: nobody vouches for it, and it runs as it is,
    without prepacked weights; ``known`` is what its inputs and outputs do not say."""

    foreign: bool = False
    check: Callable[[], None] | None = None
    known: Known = field(default_factory=Known)


class Session:
    """One .onnx file, ready to run from many threads at once.

    ``provider`` is the one really used; ``runs`` says how many batches are best run at a time; ``prepacked`` the
    entry of the cache its weights are mapped from, if there is one.
    """

    def __init__(
        self, path: Path, engine: Engine | None = None, width: int | None = None, origin: Origin | None = None
    ) -> None:
        """Load ``path``, whose vectors must be ``width`` wide where that is given.

        Raises ModelFolderError on a file that is none or not to be trusted, MissingError when the provider asked for
        is not installed, EngineError when onnxruntime refuses the file or the provider, or when its inputs and outputs
        are not those of an embedding model, OptionError where one of them must be asked for.
        """
        origin = origin or Origin()
        self._path, self._width, self._engine = path, width, engine or Engine()
        self._known, self._foreign = origin.known, origin.foreign
        self._source = Source(path, origin.foreign, origin.check)
        self._providers = choose(self._engine.provider, ort.get_available_providers())
        if self._engine.memory.give_back:
            heap.map_large_blocks()
        self._alone, self._among, self.runs = self._engine.lanes()
        self._lock = threading.Lock()
        self._opened: dict[tuple[Path, int], ort.InferenceSession] = {}
        self.prepacked = self._find_prepacked()
        self._graph = path if self.prepacked is None else self.prepacked.folder / prepack.ENGINE
        first = self._open(self._graph, self._alone)
        self.provider = check_used(self._engine.provider, first.get_providers(), str(path))
        two = self.prepacked is not None or prepack.size_bytes(path) <= SHARED_BYTES
        if self.provider != CPU or (self._among != self._alone and not two):
            self._among, self.runs = self._alone, 1  # a second session would be a second copy of the weights
        self.outputs = {o.name: o.shape for o in first.get_outputs()}
        self.ports = self._ports(first)
        if self.ports.batch or self.ports.length:
            LOG.warning("%s", "; ".join(self.notices))

    def _ports(self, session: ort.InferenceSession) -> Ports:
        inputs, outputs = ([_port(arg) for arg in args] for args in (session.get_inputs(), session.get_outputs()))
        return ports(f"{self._path}", inputs, outputs, self._known, lambda: self._source.graph.scales, self._width)

    @property
    def notices(self) -> tuple[str, ...]:
        """What whoever runs the file should know of it: fixed axes."""
        found = []
        if self.ports.batch:
            found.append(f"{self._path} takes {self.ports.batch} text at a time: the batch is fixed, and it is slow")
        if self.ports.length:
            found.append(f"{self._path} takes {self.ports.length} tokens: shorter texts are padded, longer ones cut")
        return tuple(found)

    def _find_prepacked(self) -> prepack.Prepacked | None:
        cache = self._engine.memory.cache
        fitting = self._engine.memory.prepack and self._providers == choose(CPU, ort.get_available_providers())
        if (
            cache is False
            or not fitting
            or self._foreign
            or (cache is None and prepack.size_bytes(self._path) < prepack.LEAST_BYTES)
        ):
            return None
        return prepack.prepacked(self._path, Path(cache) if cache else None, lambda: self._source.graph)

    def _open(self, graph: Path, threads: int) -> ort.InferenceSession:
        """The session of ``graph`` on ``threads`` threads, opened once; of the file where the cache was emptied."""
        if (graph, threads) not in self._opened and not graph.is_file():
            graph, threads = self._path, self._alone
        with self._lock:
            if (graph, threads) not in self._opened:
                self._opened[graph, threads] = self._load(graph, threads)
            return self._opened[graph, threads]

    def _load(self, graph: Path, threads: int) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.log_severity_level = FATAL
        options.intra_op_num_threads = threads
        options.enable_mem_pattern = False  # a plan a shape: memory that no other shape can use
        options.enable_mem_reuse = False  # planning it takes 1 s of loading; the arena reuses as well, and faster
        if self._engine.pool_size is not None:  # many callers: a thread that waits in circles is taken from another
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if self.prepacked is not None and graph.parent == self.prepacked.folder:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # it was saved optimized
        if not self._engine.memory.prepack:
            options.add_session_config_entry("session.disable_prepacking", "1")
        own = graph == self._path
        loading = self._source.loading() if own else Loading(str(graph), {})
        try:
            _hand_over(loading, options)
            loaded = ort.InferenceSession(loading.model, options, providers=list(self._providers), enable_fallback=0)
        except Exception as error:  # onnxruntime's exceptions share no base of their own
            if self._engine.provider == AUTO and self._providers[0] != self._providers[-1]:
                self._providers = self._providers[-1:]  # a GPU build without its GPU; ``provider`` says so
                return self._load(graph, threads)
            raise EngineError(
                f"{self._path}",
                expected=f"a graph that onnxruntime {ort.__version__} loads",
                found=_one_line(error).replace(str(loading.model)[:200], str(self._path)),
                remedy="check the file with `featherbed inspect`, or update onnxruntime",
            ) from error
        if own and loading.model == str(self._path) and not self._source.unchanged():
            raise EngineError(
                f"{self._path}",
                expected="the file that was checked",
                found="another in its place, put there while it was loaded",
                remedy="open the model again",
            )
        return loaded

    @property
    def pools(self) -> bool:
        """Whether the graph itself gives vectors, and not hidden states only."""
        return self.ports.vectors is not None

    @property
    def unit(self) -> bool:
        """Whether these vectors are known to be of length 1: an output's name is no promise, and codes are rounded."""
        return (
            not self._foreign and self.ports.vectors is not None and self.ports.vectors.kind == TYPES["tensor(float)"]
        )

    def vectors(self, batch: Batch, alone: bool = True) -> Vectors:
        """Unit vectors [B, D] from a graph that pools. ``alone`` False leaves cores to the runs beside this one."""
        long = self.prepacked and self.prepacked.graph(prepack.LONG)
        graph = long if long and batch.ids.shape[1] > LONG_TOKENS else self._graph
        assert self.ports.vectors is not None
        return self._run(self._open(graph, self._alone if alone else self._among), batch, self.ports.vectors)

    def hidden(self, batch: Batch) -> Vectors:
        """Hidden states [B, T, D], from the file itself where the engine's graph has none.

        Raises EngineError when the file gives pooled vectors only.
        """
        session = self._open(self._graph if self.ports.hidden is not None else self._path, self._alone)
        port = self.ports.hidden or self._ports(session).hidden
        if port is None:
            raise EngineError(
                f"{self._path}",
                expected="the output last_hidden_state, for vectors that are not normalised",
                found=", ".join(o.name for o in session.get_outputs()),
                remedy="leave normalize_embeddings at True",
            )
        return self._run(session, batch, port)

    @property
    def keeps_past(self) -> bool:
        """Whether texts can be put behind tokens seen before: decoders with prepacked weights."""
        return (
            self._engine.memory.prompts
            and self.prepacked is not None
            and self.prepacked.graph(prepack.BEHIND) is not None
        )

    def past(self, ids: list[int]) -> Past:
        """Keys and values of ``ids`` [P], for ``behind``: 2 · layers arrays [1, heads, P, size]."""
        assert self.prepacked is not None
        session = self._load(self.prepacked.folder / prepack.KEYS, self._alone)  # used once a prompt, then let go
        names = [o.name for o in session.get_outputs()]
        row = np.asarray([ids], np.int64)
        values = self._call(session, names, {"input_ids": row, "attention_mask": np.ones_like(row)})
        return {name.replace("present", "past_key_values", 1): value for name, value in zip(names, values, strict=True)}

    def behind(self, past: Past, ids: list[int], alone: bool = True) -> Vectors:
        """The unit vector [1, D] of the tokens of ``past`` and ``ids``, of which only ``ids`` are computed."""
        assert self.prepacked is not None
        session = self._open(self.prepacked.folder / prepack.BEHIND, self._alone if alone else self._among)
        row = np.asarray([ids], np.int64)
        feeds: Feeds = {"input_ids": row, "attention_mask": np.ones_like(row), **past}
        return np.asarray(self._call(session, [SENTENCE], feeds)[0], np.float32)

    def _run(self, session: ort.InferenceSession, batch: Batch, port: Port) -> Vectors:
        small = batch.ids.size * (self._width or WIDTH) <= SMALL_NUMBERS
        rank, width = (2, self._width) if port is self.ports.vectors else (3, self._known.hidden_width or self._width)
        if batch.ids.shape[1] > (self.ports.length or batch.ids.shape[1]):
            raise EngineError(
                f"a text of {batch.ids.shape[1]} tokens",
                expected=f"at most {self.ports.length}, as {self._path} is built for",
                found="more",
                remedy="build it with a longer --static, or without",
            )
        found = []
        for part, rows in self.ports.parts(batch):
            result = self._call(session, [port.name], self.ports.feeds(part), keep=small)[0]
            right = (
                result.ndim == rank and len(result) == len(part.ids) and result.shape[-1] == (width or result.shape[-1])
            )
            if not right:
                raise EngineError(
                    f"output {port.name} of {self._path}",
                    expected=f"{rank} axes, {len(part.ids)} texts, the last of {width} as the configs say",
                    found=f"the shape {list(result.shape)}",
                    remedy="use the file and the configs of the same model",
                )
            found.append(self.ports.read(port, result[:rows] if rank == 2 else result[:rows, : batch.ids.shape[1]]))
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _call(
        self, session: ort.InferenceSession, outputs: list[str], feeds: Feeds, keep: bool = True
    ) -> list[Vectors]:
        options = ort.RunOptions()
        shape = feeds["input_ids"].shape
        if self.provider == CPU and not keep:
            options.add_run_config_entry(SHRINK, "cpu:0")  # what the run took is given back after it
        try:
            return list(session.run(outputs, feeds, options))
        except Exception as error:  # as above
            raise EngineError(
                f"a run of {shape[0]} texts × {shape[1]} tokens",
                expected=f"the output {outputs[0]}",
                found=_one_line(error),
                remedy="use a smaller token budget if memory is short; else report it with the variant's name",
            ) from error


class Piece:
    """Part of a graph, from its bytes: named arrays in, named arrays out."""

    def __init__(self, model: bytes, beside: Path | None = None) -> None:
        """With ``beside``, weights are those of files there, and stay as they are: nothing is optimised.

        Raises EngineError when onnxruntime refuses it.
        """
        heap.map_large_blocks()  # what a run took leaves the process when the piece is let go
        options = ort.SessionOptions()
        if beside is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(beside))
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = FATAL
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # many live at once, beside numpy's
        try:
            providers = list(choose(CPU, ort.get_available_providers()))
            self._session = ort.InferenceSession(model, options, providers=providers)
        except Exception as error:  # as above
            raise EngineError(
                "a part of the graph",
                expected=f"operators that onnxruntime {ort.__version__} has",
                found=_one_line(error),
                remedy="update onnxruntime",
            ) from error
        self._inputs = [port.name for port in self._session.get_inputs()]

    def run(self, outputs: list[str], values: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """``outputs`` of the inputs among ``values``. Raises EngineError."""
        try:
            return list(self._session.run(outputs, {name: values[name] for name in self._inputs}))
        except Exception as error:  # as above
            raise EngineError(
                "a part of the graph",
                expected=f"the outputs {', '.join(outputs[:3])}",
                found=_one_line(error),
                remedy="use fewer or shorter calibration texts if memory is short",
            ) from error


def available_providers() -> tuple[str, ...]:
    """The execution providers of this build of onnxruntime, by its own names."""
    return tuple(ort.get_available_providers())


def require(least: str, subject: str) -> None:
    """Raises EngineError when the installed onnxruntime is older than ``least`` ("1.30")."""
    installed = tuple(int(part) for part in ort.__version__.split(".")[:2])
    if installed < tuple(int(part) for part in least.split(".")[:2]):
        raise EngineError(
            subject,
            expected=f"onnxruntime {least} or newer, whose operators it uses",
            found=ort.__version__,
            remedy="update it: pip install -U onnxruntime",
        )


def _one_line(error: Exception) -> str:
    """onnxruntime's message on one line: its details may stand on the second."""
    return " ".join(str(error).split())[:600] or type(error).__name__


def _port(arg: ort.NodeArg) -> Port:
    """An input or output as onnxruntime describes it."""
    return Port(arg.name, TYPES.get(arg.type, 0), tuple(arg.shape) if arg.shape is not None else None)


def _hand_over(loading: Loading, options: ort.SessionOptions) -> None:
    """Weights that onnxruntime is not to open itself, not copied: they are mapped as long as the source lives."""
    if loading.files:
        options.add_external_initializers_from_files_in_memory(
            list(loading.files), list(loading.files.values()), [len(data) for data in loading.files.values()]
        )
    elif loading.weights:
        values = [_value(*weight) for weight in loading.weights.values()]
        options.add_external_initializers(list(loading.weights), values)


def _value(data: npt.NDArray[np.uint8], kind: int, dims: tuple[int, ...]) -> ort.OrtValue:
    if kind in KINDS:
        return ort.OrtValue.ortvalue_from_numpy(data.view(KINDS[kind]).reshape(dims))
    other = data.view(f"<u{BITS[kind] // 8}").reshape(dims)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(other, kind)
