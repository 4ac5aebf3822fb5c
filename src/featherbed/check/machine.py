"""Which machine a number was measured on."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

from featherbed.cpu import cores, cpu

TELLING_FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm", "sve")


def machine() -> dict[str, Any]:
    """CPU, the flags that decide which kernels run, cores, system, and the versions that count."""
    model, present = cpu()
    return {
        "cpu": model,
        "flags": [flag for flag in TELLING_FLAGS if flag in present],
        "cores": cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "onnxruntime": version("onnxruntime"),
    }
