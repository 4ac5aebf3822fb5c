"""A Hub on this machine: real HTTP for the real client's downloads and uploads, and everything that can go wrong.

It listens on two sockets. One speaks huggingface.co's API. The other stands for its CDN: large files come from there
and are uploaded to there, and no token may ever reach it. What the API says is in hub_repository.py.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import socket
import struct
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import sleep  # by name: a test that takes the client's waits away leaves the throttle alone
from typing import Any
from urllib.parse import parse_qsl, unquote

from tests.hub_repository import COMMIT, Answer, Repository, git_oid, refused, said, sha256_of

__all__ = ["COMMIT", "Asked", "Fault", "Hub", "Repository", "git_oid", "serve", "serving", "sha256_of", "surroundings"]

PIECE = 2**16  # bytes of a download that are written at once


def surroundings(url: str, cache: Path) -> dict[str, str]:
    """The environment of a process whose Hub is at ``url``, with none of the user's own settings."""
    inherited = {key: value for key, value in os.environ.items() if not key.upper().startswith(("HF_", "HTTP"))}
    return inherited | {
        "HF_ENDPOINT": url,
        "HF_HOME": str(cache),
        "FEATHERBED_CACHE": str(cache / "featherbed"),  # of one test, not of the session as in conftest.py
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    }


@dataclass
class Asked:
    """A request, as it came in: ``path`` is still quoted and has its query."""

    method: str
    path: str
    range: str = ""
    authorization: str = ""
    host: str = "hub"  # or "cdn"


@dataclass
class Fault:
    """What goes wrong with the next ``times`` requests whose path, quoted or not, contains ``match``.

    ``status``, ``redirect`` and ``html`` come in place of an answer: the request has no effect. The others spoil the
    answer to a request that had its effect: ``cut`` and ``replace`` one with a body (to no HEAD, and no redirect to
    the CDN), ``ignore_range`` one to a request with a Range. An answer that a fault cannot spoil is no hit.
    """

    match: str = ""
    times: int = 1
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)  # of the ``status``; without one, over the answer's own
    cut: int | None = None  # so many body bytes are sent before the connection ends; the full length is announced
    reset: bool = False  # ``cut`` ends with RST, not FIN: what the client has not read yet may be lost to it
    replace: bytes | Callable[[bytes], bytes] | None = None  # in place of the whole body; a Range is taken of it
    ignore_range: bool = False
    redirect: str | None = None
    html: bool = False  # a captive portal's page
    skip: int = 0  # so many requests that it could hit pass first

    @property
    def instead(self) -> bool:
        """Whether it comes in place of an answer."""
        return bool(self.status or self.html or self.redirect is not None)

    def spoils(self, asked: Asked, answer: Answer) -> bool:
        if self.cut is not None or self.replace is not None:
            return asked.method != "HEAD" and not 300 <= answer.status < 400
        return bool(answer.name and asked.range) if self.ignore_range else True

    def answer(self) -> Answer:
        """What comes in place of an answer."""
        if self.redirect is not None:
            return Answer(302, self.headers | {"Location": self.redirect})
        if self.html:
            page = b"<!doctype html><title>Welcome</title><p>Please accept the terms of this network."
            return Answer(200, self.headers | {"Content-Type": "text/html"}, page)
        answer = said({"error": "a fault of this test"}, self.status)
        answer.headers |= self.headers
        return answer


@dataclass
class Hub:
    """Repositories, what was asked about them, and what shall go wrong. ``serve`` puts it on its sockets."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    url: str = ""
    cdn: str = ""
    asked: list[Asked] = field(default_factory=list)
    served: Counter[str] = field(default_factory=Counter)  # file name: bytes of it that were written to a socket
    faults: list[Fault] = field(default_factory=list)
    bytes_per_s: float = 0  # of each download; 0: as fast as it goes
    refuse: int = 0  # the status that every commit gets instead
    page: int = 1000  # rows of a listing
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def respond(self, asked: Asked, body: bytes) -> tuple[Answer, Fault]:
        """What goes back, and the fault that hit; one that does nothing where none did."""
        with self.lock:
            self.asked.append(asked)
            fault = self._hit(asked, None)
            if fault is not None:
                return fault.answer(), fault
            answer = self._of_cdn(asked, body) if asked.host == "cdn" else self._of_hub(asked, body)
            fault = self._hit(asked, answer) or Fault()
            answer.headers |= fault.headers
            if fault.replace is not None:
                answer.body = fault.replace(answer.body) if callable(fault.replace) else fault.replace
            return answer if fault.ignore_range else ranged(answer, asked.range), fault

    def _hit(self, asked: Asked, answer: Answer | None) -> Fault | None:
        """The first fault that comes in place of an answer; with ``answer``, the first that spoils it."""
        for fault in self.faults:
            if fault.times <= 0 or (fault.match not in asked.path and fault.match not in unquote(asked.path)):
                continue
            if not fault.instead if answer is None else fault.instead or not fault.spoils(asked, answer):
                continue
            if not fault.skip:
                fault.times -= 1
                return fault
            fault.skip -= 1
        return None

    def _of_cdn(self, asked: Asked, body: bytes) -> Answer:
        if asked.authorization:
            return refused(400, "", "Only one auth mechanism allowed")  # S3's words
        path = unquote(asked.path).partition("?")[0]
        upload = re.fullmatch(r"/lfs/([^/]+/[^/]+)/([0-9a-f]{64})", path)
        if asked.method == "PUT" and upload and upload[1] in self.repositories:
            if sha256_of(body) != upload[2]:
                return refused(400, "", "the bytes are not those of the sha256")
            self.repositories[upload[1]].stored[upload[2]] = body
            return Answer()
        found = next((blob for one in self.repositories.values() if (blob := one.blob(path[1:]))), None)
        if asked.method not in ("GET", "HEAD") or found is None:
            return Answer(404)
        return Answer(200, {"ETag": f'"{path[1:]}"', "Accept-Ranges": "bytes"}, found[1], found[0])

    def _of_hub(self, asked: Asked, body: bytes) -> Answer:
        path, _, query = asked.path.partition("?")
        if path == "/api/validate-yaml":
            return said({"errors": [], "warnings": []})
        if asked.method == "POST" and not asked.authorization:
            return refused(401, "", "Invalid username or password.")
        if path == "/api/repos/create":
            return self._create(asked, json.loads(body))
        # names and revisions are quoted: a slash in a revision is %2F
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/([^/]+)(?:/(.*))?)?", path) or re.fullmatch(
            r"/([^/]+/[^/]+?)(?:\.git/info/lfs/objects)?/(resolve|batch)(?:/([^/]+)/(.+))?", path
        )
        if found is None:
            return refused(404, "", f"nothing at {path}")
        name, verb, revision, file = (unquote(part or "") for part in found.groups())
        repository = self.repositories.get(name)
        if repository is None:
            return refused(404, "RepoNotFound", "Repository not found")
        if repository.token and asked.authorization != f"Bearer {repository.token}":
            return refused(401, "RepoNotFound", "Repository not found")
        there = repository.at(revision or "main")
        if there is None:
            return refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        match asked.method, verb:
            case "GET", "" | "revision":
                return repository.info(name, *there)
            case "GET", "tree":
                return repository.tree(there[1], self.url + path, file, dict(parse_qsl(query)), self.page)
            case "GET" | "HEAD", "resolve":
                return repository.resolve(*there, file, self.cdn)
            case "POST", "preupload":
                return repository.preupload(there[1], json.loads(body))
            case "POST", "batch":
                return repository.batch(json.loads(body), f"{self.cdn}/lfs/{name}")
            case "POST", "commit" if self.refuse:
                return said({"error": "no"}, self.refuse)
            case "POST", "commit":
                return repository.committed(revision, body, f"{self.url}/{name}")
        return refused(404, "", f"{asked.method} {path}")

    def _create(self, asked: Asked, wanted: dict[str, Any]) -> Answer:
        name = f"{wanted['organization']}/{wanted['name']}"
        document = {"url": f"{self.url}/{name}", "id": name, "name": name}
        if name in self.repositories:
            return said(document | {"error": "You already created this model repo"}, 409)
        private = wanted.get("visibility") == "private" or wanted.get("private") is True  # the client's versions differ
        token = asked.authorization.removeprefix("Bearer ") if private else ""
        first = hashlib.sha1(name.encode()).hexdigest()
        self.repositories[name] = Repository(commit=first, token=token, created=wanted)
        return said(document)


def ranged(answer: Answer, asked: str) -> Answer:
    """The part of a file that a Range header asks for; the answer as it is where there is no such header or file."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", asked)
    size = len(answer.body)
    if not answer.name or found is None or not any(found.groups()):
        return answer
    first, last = found.groups()
    start = int(first) if first else max(0, size - int(last))
    stop = min(size, int(last) + 1) if first and last else size
    if start >= stop:
        return Answer(416, {"Content-Range": f"bytes */{size}"})
    headers = answer.headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}
    return replace(answer, status=206, headers=headers, body=answer.body[start:stop])


class _Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128  # the client comes with many threads at once

    def __init__(self, hub: Hub, host: str) -> None:
        self.hub, self.host = hub, host
        self.live: set[Any] = set()
        super().__init__(("127.0.0.1", 0), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.live.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.live.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no fault of ours; anything else is told."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def stop(self) -> None:
        """As a machine that is switched off: connections that were kept alive end too."""
        self.shutdown()
        self.server_close()
        for connection in list(self.live):
            with suppress(OSError):  # it ended meanwhile
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def answer(self) -> None:
        authorization, part = (self.headers.get(key) or "" for key in ("Authorization", "Range"))
        asked = Asked(self.command, self.path, part, authorization, self.server.host)
        try:
            answer, fault = self.server.hub.respond(asked, self._body())
            self.send_response(answer.status)
            for key, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self._write(answer, fault)
        except ConnectionError:  # the client was killed
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815  # http.server's own names

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self._exactly(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline() or b"0", 16):
            body += self._exactly(size)
            self.rfile.readline()
        if not self.rfile.readline():
            raise ConnectionAbortedError
        return body

    def _exactly(self, size: int) -> bytes:
        raw = self.rfile.read(size)
        if len(raw) < size:  # the client was killed: half a request has no effect
            raise ConnectionAbortedError
        return raw

    def _write(self, answer: Answer, fault: Fault) -> None:
        rate = self.server.hub.bytes_per_s if answer.name else 0
        piece = max(1, min(PIECE, int(rate / 20))) if rate else PIECE
        body = memoryview(answer.body)[: fault.cut]
        for start in range(0, len(body), piece):
            part = body[start : start + piece]
            self._count(answer.name, len(part))  # before: whoever has read the last byte finds it counted
            try:
                self.wfile.write(part)
            except ConnectionError:
                self._count(answer.name, -len(part))
                raise
            if rate:
                sleep(len(part) / rate)
        if fault.cut is not None:
            self.close_connection = True
            if fault.reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                os.close(self.connection.detach())  # by hand: the server would send FIN first

    def _count(self, name: str, size: int) -> None:
        if name:
            with self.server.hub.lock:
                self.server.hub.served[name] += size

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Put a Hub on two sockets of this machine, and fill in their addresses."""
    servers = [_Server(hub, "hub"), _Server(hub, "cdn")]
    hub.url, hub.cdn = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        for server in servers:
            server.stop()


@contextmanager
def serving(*repositories: Mapping[str, Repository]) -> Iterator[Hub]:
    """A Hub that holds these repositories, given by their names."""
    with serve(Hub({name: one for some in repositories for name, one in some.items()})) as hub:
        yield hub
