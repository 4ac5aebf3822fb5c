"""From a laptop to the Hub, and from there to another one: the command line and the real client, on this machine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

import featherbed
from featherbed.folder import open_folder
from tests.hub_server import Hub, serve, surroundings

NAME = "me/small-onnx"


def test_what_one_pushes_another_pulls_verifies_and_embeds_with(folders: dict[str, Path], tmp_path: Path) -> None:
    mine = Path(shutil.copytree(folders["bert-mean"], tmp_path / "mine"))
    probe = tmp_path / "probe.jsonl"
    probe.write_text("\n".join(json.dumps({"text": "rain " * n}) for n in range(1, 30)), "utf-8")
    texts = tmp_path / "texts.txt"
    texts.write_text("a frog\nrain on the roof\n", "utf-8")
    featherbed.verify(mine, ["fp32", "int8"], probes=[probe], save=True)

    def command(user: str, *words: object) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "featherbed.cli", *map(str, words)],
            env=surroundings(hub.url, tmp_path / user) | {"HF_TOKEN": "hf_of_a_test"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    with serve(Hub()) as hub:
        command("one", "push", mine, NAME, "--variants", "int8", "--weights", "beside", "--private")
        assert "int8" in command("other", "pull", NAME)
        command("other", "pull", NAME, "--variants", "all", "-o", "theirs")
        command("other", "verify", "theirs", "--probe", probe)
        command("other", "embed", NAME, texts, "-o", "x.npy")
        command("one", "push", mine, NAME, "--variants", "int8", "--weights", "inside")
        command("other", "pull", NAME)
        command("other", "embed", NAME, texts, "-o", "y.npy")
        assert len(json.loads(command("other", "list", "--json").splitlines()[-1])["models"]) == 2  # commits
        assert json.loads(command("other", "doctor", NAME, "--json").splitlines()[-1])["advice"]["variant"] == "int8"
    theirs = open_folder(tmp_path / "theirs")
    assert theirs.manifest.variants["int8"].files == ("onnx/model_int8.onnx", "onnx/model_int8.onnx_data")
    expected = featherbed.Embedder(mine, "int8").encode(texts.read_text("utf-8").splitlines())
    for file in ("x.npy", "y.npy"):
        assert np.array_equal(np.load(tmp_path / file), expected)
