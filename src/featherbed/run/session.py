"""Batch → hidden states or vectors. The only room that runs onnxruntime: its options, its threads, its errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from featherbed.errors import EngineError, ModelFolderError, OptionError
from featherbed.run.batches import Batch

HIDDEN = "last_hidden_state"
SENTENCE = "sentence_embedding"
KNOWN_INPUTS = {"input_ids", "attention_mask", "token_type_ids"}
FATAL = 4  # onnxruntime's severity: what fails is raised as our error, not printed as well

Vectors = npt.NDArray[np.float32]


class Session:
    """One .onnx file, ready to run from many threads at once."""

    def __init__(self, path: Path, threads: int | None = None, prepack: bool = True, width: int | None = None) -> None:
        """Load ``path``, whose vectors must be ``width`` wide and its axes dynamic where that is given.

        ``threads`` None leaves the number to onnxruntime (the physical cores).

        ``prepack`` False keeps float weights where they are mapped instead of copying them: slower, small.
        Raises ModelFolderError without the file, OptionError on fewer than one thread, EngineError when
        onnxruntime refuses the file or its inputs and outputs are not those of this embedding model.
        """
        if not path.is_file():
            raise ModelFolderError(
                f"{path}", expected="an .onnx file", found="no such file", remedy="fetch or build it again"
            )
        if threads is not None and threads < 1:
            raise OptionError("threads", expected="at least 1", found=str(threads), remedy="leave it out")
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
                found=_one_line(error),
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

        self._path, self._width = path, width
        self._check_axes()

    def _check_axes(self) -> None:
        if self._width is None:
            return
        for name, rank in ((HIDDEN, 3), (SENTENCE, 2)):
            shape = self.outputs.get(name)
            if shape and (len(shape) != rank or (isinstance(shape[-1], int) and shape[-1] != self._width)):
                raise EngineError(
                    f"output {name} of {self._path}",
                    expected=f"{rank} axes, the last of {self._width} as the configs say",
                    found=str(shape),
                    remedy="use the file and the configs of the same model",
                )
        for port in self._session.get_inputs():
            if any(isinstance(axis, int) for axis in port.shape):
                raise EngineError(
                    f"input {port.name} of {self._path}",
                    expected="dynamic axes for batch and sequence",
                    found=f"the fixed shape {port.shape}",
                    remedy="build the model with `featherbed build`",
                )

    @property
    def pools(self) -> bool:
        """Whether the graph itself gives unit vectors."""
        return SENTENCE in self.outputs

    def vectors(self, batch: Batch) -> Vectors:
        """Unit vectors [B, D] from a graph that pools."""
        return self._run(batch, SENTENCE)

    def hidden(self, batch: Batch) -> Vectors:
        """Hidden states [B, T, D]. Raises EngineError when the file gives pooled vectors only."""
        if HIDDEN not in self.outputs:
            raise EngineError(
                f"{self._path}",
                expected=f"the output {HIDDEN}, for vectors that are not normalised",
                found=", ".join(self.outputs),
                remedy="leave normalize_embeddings at True",
            )
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
                found=_one_line(error),
                remedy="use a smaller token budget if memory is short; else report it with the variant's name",
            ) from error
        right = result.ndim == (2 if output == SENTENCE else 3) and result.shape[-1] == self._width
        if self._width is not None and not right:
            raise EngineError(
                f"output {output} of {self._path}",
                expected=f"vectors of {self._width} components as the configs say",
                found=f"the shape {list(result.shape)}",
                remedy="use the file and the configs of the same model",
            )
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


def _one_line(error: Exception) -> str:
    """onnxruntime's message on one line: its details may stand on the second."""
    return " ".join(str(error).split())[:400] or type(error).__name__
