"""Which of onnxruntime's execution providers a session asks for, and whether it got it. Values in, values out."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from featherbed.errors import EngineError, MissingError, OptionError


@dataclass(frozen=True)
class Provider:
    """One execution provider: our word for it, onnxruntime's, the pip package with it, what to check when it fails."""

    name: str
    execution: str
    package: str
    check: str


CPU, AUTO = "cpu", "auto"

PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider(CPU, "CPUExecutionProvider", "onnxruntime", "install onnxruntime again"),
        Provider(
            "cuda",
            "CUDAExecutionProvider",
            "onnxruntime-gpu",
            "check that `nvidia-smi` lists a GPU and that CUDA and cuDNN are there in the versions this onnxruntime-gpu"
            " was built for (pip install 'onnxruntime-gpu[cuda,cudnn]')",
        ),
        Provider("coreml", "CoreMLExecutionProvider", "onnxruntime", "check that macOS is recent enough"),
        Provider(
            "openvino",
            "OpenVINOExecutionProvider",
            "onnxruntime-openvino",
            "check that OpenVINO's libraries are there in the version this onnxruntime-openvino was built for"
            " (on Windows they come apart from it: pip install openvino)",
        ),
    )
}
NAMES = (*PROVIDERS, AUTO)


def choose(provider: str, available: Sequence[str]) -> tuple[str, ...]:
    """The execution providers to hand to InferenceSession for ``provider``, first choice first.

    ``available`` is onnxruntime's ``get_available_providers()``: what the build holds, not what this machine can run,
    so ``check_used`` has the last word. "auto" is CUDA where the build has it, else the CPU: CoreML does not know
    the contrib operators of our graphs and splits them, slower than the CPU, and OpenVINO is only ever asked for.
    Raises OptionError on an unknown name, MissingError when the build lacks the one asked for.
    """
    _check_name(provider)
    if provider == AUTO:
        provider = "cuda" if PROVIDERS["cuda"].execution in available else CPU
    wanted = PROVIDERS[provider]
    if wanted.execution not in available:
        raise MissingError(
            f"provider {provider!r}",
            expected=f"an onnxruntime with {wanted.execution}",
            found=", ".join(available) or "none",
            remedy=_install(wanted),
        )
    return tuple(dict.fromkeys((wanted.execution, PROVIDERS[CPU].execution)))


def check_used(asked: str, used: Sequence[str], subject: str) -> str:
    """The name of the provider that a session really has; ``used`` is its ``get_providers()``.

    onnxruntime drops a provider whose libraries or device are missing and goes on with the CPU. That is an EngineError
    for one asked for by name; for "auto" the answer is "cpu", for the caller to report. NOTE: this says what the
    session registered, not how many of the graph's nodes went there.
    Raises OptionError on an unknown name.
    """
    _check_name(asked)
    short = {provider.execution: provider.name for provider in PROVIDERS.values()}
    real = next((short[name] for name in used if name in short and short[name] != CPU), CPU)
    if asked not in (AUTO, real):
        wanted = PROVIDERS[asked]
        raise EngineError(
            subject,
            expected=f"a session on {wanted.execution}, as asked",
            found=", ".join(used) or "none",
            remedy=f"{wanted.check}, or ask for {CPU!r}" if asked != CPU else wanted.check,
        )
    return real


def _check_name(name: str) -> None:
    if name in NAMES:
        return
    said = name.lower().removesuffix("executionprovider")
    # "gpu" is one letter from "cpu" and means the other one
    near = ["cuda"] if "gpu" in said else difflib.get_close_matches(said, NAMES, n=1)
    raise OptionError(
        f"provider {name!r}",
        expected=f"one of {', '.join(NAMES)}",
        found="no such provider",
        remedy=f"did you mean {near[0]}?" if near else "choose one of these",
    )


def _install(wanted: Provider) -> str:
    if wanted.name == "coreml":
        return f"CoreML exists on macOS only: pip install {wanted.package} there, or ask for {CPU!r}"
    # all the packages unpack into one folder, onnxruntime/: beside each other they overwrite each other's files
    others = " ".join(dict.fromkeys(provider.package for provider in PROVIDERS.values()))
    return f"replace the installed one: pip uninstall -y {others}; pip install {wanted.package}"
