"""transformers.js in headless Chromium, on onnxruntime-web's WASM: files come from a server on this machine only."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright

TIMEOUT_MS = 300_000
NAMES = ("chromium", "chromium-browser", "google-chrome")
PAGE = """<!doctype html><meta charset="utf-8"><title>conform</title><script type="module">
import * as library from "/packages/@huggingface/transformers/dist/transformers.min.js";
import * as ort from "/packages/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";
import { alone, tried } from "/script/embed.mjs";
library.env.backends.onnx.wasm.wasmPaths = "/packages/onnxruntime-web/dist/";
ort.env.wasm.wasmPaths = "/packages/onnxruntime-web/dist/";
library.env.useBrowserCache = false;
library.env.allowLocalModels = true;
window.tried = (job) => tried(library, job, "wasm");
window.alone = (job) => alone(library, ort, job);
</script>"""


def chromium() -> str | None:
    """Where Chromium is."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Files(SimpleHTTPRequestHandler):
    """The page, and what lies under the roots: "/models/x" is ``roots["models"]``/x. Isolated: WASM has threads."""

    def __init__(self, *words: Any, roots: dict[str, Path]) -> None:
        self.roots = roots
        super().__init__(*words)

    def translate_path(self, path: str) -> str:
        first, _, rest = path.split("?")[0].lstrip("/").partition("/")
        inside = Path(super().translate_path("/" + rest)).relative_to(Path.cwd())
        return str(self.roots.get(first, Path("/nowhere")) / inside)

    def do_GET(self) -> None:
        if self.path != "/":
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(PAGE.encode())
        return None

    def guess_type(self, path: Any) -> str:
        return "text/javascript" if str(path).endswith(".mjs") else str(super().guess_type(path))

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, *_: Any) -> None:
        """Nothing: a request is no news."""


@contextmanager
def serving(roots: dict[str, Path]) -> Iterator[str]:
    """The address of a server of these folders, as long as the block lasts."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Files, roots=roots))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def opened() -> Iterator[Browser]:
    """Headless Chromium."""
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield browser
        browser.close()


def answer(browser: Browser, way: str, job: dict[str, Any], packages: Path, scripts: Path) -> dict[str, Any]:
    """The answer of embed.mjs's function ``way`` in a page of its own: each model has fresh memory."""
    folder = Path(job["folder"]).resolve()
    roots = {"models": folder.parent, "packages": packages.resolve(), "script": scripts.resolve()}
    page = browser.new_page()
    page.set_default_timeout(TIMEOUT_MS)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    try:
        with serving(roots) as address:
            page.goto(address)
            page.wait_for_function("window.tried !== undefined", timeout=TIMEOUT_MS)
            found: dict[str, Any] = page.evaluate("job => window." + way + "(job)", {**job, "above": "/models/"})
    except Exception as error:  # a crashed page is an answer too
        return {"error": f"{type(error).__name__}: {error} {' '.join(said)}"[:2000], "versions": {}}
    finally:
        page.close()
    web = json.loads((packages / "onnxruntime-web" / "package.json").read_text("utf-8"))
    found["versions"] |= {"onnxruntime-web": web["version"], "Chromium": browser.version}
    return found
