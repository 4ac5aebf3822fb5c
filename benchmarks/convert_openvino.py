"""Stock FP32 .onnx → OpenVINO IR with compressed weights, in OpenVINO's environment.

python benchmarks/convert_openvino.py int8|int4 FP32.onnx OUT.xml
"""

from __future__ import annotations

import sys
from pathlib import Path

import nncf
import openvino as ov


def main(kind: str, source: str, out: str) -> None:
    """INT8 symmetric, or INT4 symmetric in groups of 32 in all layers."""
    model = ov.convert_model(source)
    if kind == "int8":
        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    else:
        mode = nncf.CompressWeightsMode.INT4_SYM
        model = nncf.compress_weights(model, mode=mode, group_size=32, ratio=1.0, all_layers=True)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    ov.save_model(model, out)


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in ("int8", "int4"):
        sys.exit(__doc__)
    main(*sys.argv[1:])
