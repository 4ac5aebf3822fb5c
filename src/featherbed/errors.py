"""What can go wrong, as one tree; every message is one line: what was expected, what was found, what to do.

FeatherbedError
├── InputError                what was handed in cannot be used                 (exit code 2)
│   ├── OptionError           an option, a variant's name or a gate is not one we know
│   ├── CheckpointError       upstream weights are missing, cut off, or of another shape
│   │   └── UnknownArchitectureError
│   ├── SpecError             the files that describe a model are silent or disagree
│   ├── TokenizerError        tokenizer.json is missing or unusable
│   ├── ModelFolderError      a model folder lacks a file, or a file is not the one in the manifest
│   ├── HubError              a Hub id is not there, not ours to see, or not what it said it is
│   │   └── UnreachableError  the Hub cannot be asked: offline, no connection, a server that is busy
│   ├── TextError             a text, a prompt or a file of texts cannot be embedded
│   ├── ProbeError            a file of probe texts cannot be read
│   └── DatasetError          a folder or file to evaluate on cannot be read
├── OutputError               the result cannot be written                      (exit code 2)
├── EngineError               onnxruntime refused a graph or failed in a run    (exit code 2)
└── MissingError              a needed extra or provider is not installed       (exit code 3)
"""

from __future__ import annotations


class FeatherbedError(Exception):
    """The root. ``str(error)`` is one line: subject, expectation, finding, remedy."""

    exit_code = 2

    def __init__(self, subject: str, *, expected: str, found: str, remedy: str) -> None:
        self.subject = subject
        self.expected = expected
        self.found = found
        self.remedy = remedy
        super().__init__(subject, expected, found, remedy)

    def __str__(self) -> str:
        """One line, whatever line breaks the parts had."""
        line = f"{self.subject}: expected {self.expected}, found {self.found}; {self.remedy}"
        return " ".join(line.split())


class InputError(FeatherbedError):
    """What was handed in cannot be used."""


class OptionError(InputError):
    """An option, a variant's name or a gate is not one we know."""


class CheckpointError(InputError):
    """Upstream weights are missing, cut off, or of another shape than the config says."""


class UnknownArchitectureError(CheckpointError):
    """No family of ours builds this ``model_type``, or not with this setting."""


class SpecError(InputError):
    """The files that describe a model are silent or contradict each other."""


class TokenizerError(InputError):
    """tokenizer.json is missing, unreadable, or does not belong to the model."""


class ModelFolderError(InputError):
    """A model folder lacks a file, or a file is not the one its manifest names."""


class HubError(InputError):
    """A Hub id is not there or not ours to see, or what came is not what the Hub said it is."""


class UnreachableError(HubError):
    """The Hub cannot be asked now: offline mode, no connection, a server that is busy."""


class TextError(InputError):
    """A text, a prompt or a file of texts cannot be embedded."""


class ProbeError(InputError):
    """A file of probe texts cannot be read."""


class DatasetError(InputError):
    """A folder or file to evaluate on cannot be read, or its parts do not fit together."""


class OutputError(FeatherbedError):
    """The result cannot be written; nothing was left behind."""


class EngineError(FeatherbedError):
    """onnxruntime refused a graph or failed in a run."""


class MissingError(FeatherbedError):
    """A needed extra or provider is not installed."""

    exit_code = 3
