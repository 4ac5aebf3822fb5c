"""A process that pulls in children of its own and kills them: python -m tests.hub.killed_pulls ID KILLS SEED

It has no threads, so it may fork: a child begins to fetch at once, where a process of its own would spend its life on
imports. After each kill everything that has a record is compared with its hashes. Prints one JSON document.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time

import huggingface_hub.errors  # imported here, once, for all children
import huggingface_hub.utils
from huggingface_hub import HfApi, constants, get_token, hf_hub_url, try_to_load_from_cache
from huggingface_hub.hf_api import RepoFile

from featherbed.hub.client import default_root
from featherbed.hub.store import Store
from featherbed.pipeline.pull import pull

IMPORTED = (
    huggingface_hub,
    HfApi,
    RepoFile,
    constants,
    get_token,
    hf_hub_url,
    try_to_load_from_cache,
)
LONGEST_S = 0.3  # about half of what a whole pull takes


def main(source: str, kills: int, seed: int) -> None:
    chance, store = random.Random(seed), Store(default_root())
    told = {"kills": 0, "wrong": 0, "completed": 0, "records_checked": 0, "partly": 0}
    while told["kills"] < kills:
        child = os.fork()
        if child == 0:
            try:
                pull(source, ["all"])
                os._exit(0)
            except BaseException as error:
                sys.stderr.write(f"{type(error).__name__}: {error}\n")
                os._exit(1)
        time.sleep(chance.uniform(0, LONGEST_S))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            if os.WEXITSTATUS(status):
                sys.exit(f"a rerun failed after {told['kills']} kills")
            told["completed"] += 1  # it was faster than the signal: from the beginning, so that all kills hit
            told["wrong"] += wrong(store, told)
            shutil.rmtree(store.root)
            continue
        told["kills"] += 1
        told["partly"] += any(store.root.glob("*/partial/*"))
        told["wrong"] += wrong(store, told)
    pull(source, ["all"])
    told["completed"] += 1
    told["wrong"] += wrong(store, told)
    sys.stdout.write(json.dumps(told) + "\n")


def wrong(store: Store, told: dict[str, int]) -> int:
    """How many files that a record names are not what they should be."""
    bad = 0
    for held in store.held():
        told["records_checked"] += 1
        bad += sum(not file.matches(held.folder / name) for name, file in held.record.files.items())
    return bad


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
