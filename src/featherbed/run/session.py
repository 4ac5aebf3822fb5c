"""Batch → hidden states or vectors. The only room that runs onnxruntime: its options, its threads, its errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from featherbed.errors import EngineError, ModelFolderError
from featherbed.run.batches import Batch

HIDDEN = "last_hidden_state"
SENTENCE = "sentence_embedding"
KNOWN_INPUTS = {"input_ids", "attention_mask", "token_type_ids"}
FATAL = 4  # onnxruntime's severity: what fails is raised as our error, not printed as well

Vectors = npt.NDArray[np.float32]


class Session:
    """One .onnx file, ready to run from many threads at once."""

    def __init__(self, path: Path, threads: int | None = None, prepack: bool = True) -> None:
        """Load ``path``; ``threads`` None leaves the number to onnxruntime (the physical cores).

        ``prepack`` False keeps float weights where they are mapped instead of copying them: slower, small.
        Raises ModelFolderError without the file, EngineError when onnxruntime refuses it or its inputs are
        not an embedding model's.
        """
        if not path.is_file():
            raise ModelFolderError(
                f"{path}", expected="an .onnx file", found="no such file", remedy="fetch or build it again"
            )
        options = ort.SessionOptions()
        options.log_severity_level = FATAL
        if threads is not None:
            options.intra_op_num_threads = threads
        if not prepack:
            options.add_session_config_entry("session.disable_prepacking", "1")
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no base of their own
            raise EngineError(
                f"{path}",
                expected=f"a graph that onnxruntime {ort.__version__} loads",
                found=_first_line(error),
                remedy="check the file with `featherbed inspect`, or update onnxruntime",
            ) from error
        self._inputs = {i.name for i in self._session.get_inputs()}
        self.outputs = {o.name: o.shape for o in self._session.get_outputs()}
        unknown = self._inputs - KNOWN_INPUTS
        if unknown or "input_ids" not in self._inputs or not self.outputs.keys() & {HIDDEN, SENTENCE}:
            raise EngineError(
                f"{path}",
                expected=f"inputs among {', '.join(sorted(KNOWN_INPUTS))} and an output {HIDDEN} or {SENTENCE}",
                found=f"inputs {', '.join(sorted(self._inputs))}; outputs {', '.join(self.outputs)}",
                remedy="use a file made by `featherbed build`",
            )

    @property
    def pools(self) -> bool:
        """Whether the graph itself gives unit vectors."""
        return SENTENCE in self.outputs

    def vectors(self, batch: Batch) -> Vectors:
        """Unit vectors [B, D] from a graph that pools."""
        return self._run(batch, SENTENCE)

    def hidden(self, batch: Batch) -> Vectors:
        """Hidden states [B, T, D]."""
        return self._run(batch, HIDDEN)

    def _run(self, batch: Batch, output: str) -> Vectors:
        feeds = {"input_ids": batch.ids, "attention_mask": batch.mask}
        if "token_type_ids" in self._inputs:
            feeds["token_type_ids"] = np.zeros_like(batch.ids)
        feeds = {name: value for name, value in feeds.items() if name in self._inputs}
        try:
            result = self._session.run([output], feeds)[0]
        except Exception as error:  # as above
            raise EngineError(
                f"a run of {batch.ids.shape[0]} texts × {batch.ids.shape[1]} tokens",
                expected=f"the output {output}",
                found=_first_line(error),
                remedy="use a smaller token budget if memory is short; else report it with the variant's name",
            ) from error
        return np.asarray(result, np.float32)


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


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
