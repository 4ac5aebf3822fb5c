"""kill -9 at random times: nothing wrong is ever accepted, and every rerun goes on where the last one ended."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.hub_server import Repository, serving, surroundings
from tests.test_pull import MODEL, files_of

KILLS = 50


def test_fifty_kills_at_random_times_leave_nothing_wrong_and_every_byte_is_fetched_about_once(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    files = files_of(folders["qwen3-tied"])
    whole = sum(map(len, files.values()))
    with serving({MODEL: Repository(files)}) as hub:
        hub.bytes_per_s = whole  # of each of four connections
        piece = whole // 20  # what the server writes at a time then
        done = subprocess.run(
            [sys.executable, "-m", "tests.hub.killed_pulls", MODEL, str(KILLS), "6"],
            env=surroundings(hub.url, tmp_path / "cache"),
            cwd=Path(__file__).parent.parent.parent,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        served = sum(hub.served.values())
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["kills"] == KILLS
    assert told["wrong"] == 0
    assert told["records_checked"] > 0
    assert told["partly"] > KILLS // 4  # or nothing was ever hit half-way
    # what a killed process had not read yet is served again: a piece of each of its four connections, and no more
    assert served <= told["completed"] * whole + KILLS * 4 * piece
    assert served - told["completed"] * whole < KILLS * whole // 5  # started over, it would be about a half a kill
