"""A repository of the Hub in memory, and what huggingface.co's API says about it: no sockets, see hub_server.py."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote, urlencode

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".onnx", ".onnx_data", ".safetensors", ".bin", ".h5")


@lru_cache(512)
def sha256_of(raw: bytes) -> str:
    """The id of a large file: its etag, its LFS oid, its address at the CDN."""
    return hashlib.sha256(raw).hexdigest()


@lru_cache(512)
def git_oid(raw: bytes) -> str:
    """The id of a small file: its etag and its oid, as ``git hash-object`` says it."""
    return hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()


def is_large(name: str, size: int) -> bool:
    """Whether a file is stored by LFS. An empty one never is: clients upload it as a regular file."""
    return size > 0 and (name.endswith(LARGE) or size > 1_000_000)


def row_of(path: str, raw: bytes) -> dict[str, Any]:
    """A file in a listing."""
    row: dict[str, Any] = {"type": "file", "path": path, "size": len(raw), "oid": git_oid(raw)}
    if is_large(path, len(raw)):
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256_of(raw)}\nsize {len(raw)}\n".encode()
        row["oid"] = git_oid(pointer)
        row["lfs"] = {"oid": sha256_of(raw), "size": len(raw), "pointerSize": len(pointer)}
    return row


@dataclass
class Answer:
    """What goes back to a client, before any Range is taken of it."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    name: str = ""  # of the file that the body is, where it is one


def said(document: object, status: int = 200) -> Answer:
    return Answer(status, {"Content-Type": "application/json"}, json.dumps(document).encode())


def refused(status: int, code: str, message: str) -> Answer:
    """A refusal as huggingface.co words it: clients go by the code."""
    answer = said({"error": message}, status)
    answer.headers |= {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return answer


@dataclass
class Repository:
    """A repository of a model: the files of main, of other commits, and what was done to it."""

    files: dict[str, bytes] = field(default_factory=dict)  # the head of main
    commit: str = COMMIT
    older: dict[str, dict[str, bytes]] = field(default_factory=dict)  # other commits: their files
    refs: dict[str, str] = field(default_factory=dict)  # branches and tags but main, which always is ``commit``
    token: str = ""  # where there is one, the repository is private
    gated: bool = False  # everybody may read what it holds, and nobody a file
    stored: dict[str, bytes] = field(default_factory=dict)  # uploaded LFS objects by sha256
    messages: list[str] = field(default_factory=list)  # of commits made here
    created: dict[str, Any] | None = None  # what the client that made this repository asked for

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """(commit, files) of a branch, a tag or a commit."""
        commit = self.commit if revision == "main" else self.refs.get(revision, revision)
        if commit == self.commit:
            return commit, self.files
        return (commit, self.older[commit]) if commit in self.older else None

    def blob(self, sha256: str) -> tuple[str, bytes] | None:
        """(name, content) of a large file, by its id."""
        for files in (self.files, *self.older.values()):
            for name, raw in files.items():
                if is_large(name, len(raw)) and sha256_of(raw) == sha256:
                    return name, raw
        return (sha256, self.stored[sha256]) if sha256 in self.stored else None

    def info(self, name: str, commit: str, files: Mapping[str, bytes]) -> Answer:
        """What ``model_info`` reads."""
        document = {"id": name, "modelId": name, "sha": commit, "tags": [], "private": bool(self.token)}
        siblings = [{"rfilename": path} for path in files]
        return said(document | {"gated": "auto" if self.gated else False, "disabled": False, "siblings": siblings})

    def tree(self, files: Mapping[str, bytes], url: str, under: str, query: dict[str, str], page: int) -> Answer:
        """A listing, or a page of it."""
        top = PurePosixPath(under)
        # everything below the top, names that no git would take among it: what a client makes of these is a test
        inside = {name: raw for name, raw in files.items() if not under or top in PurePosixPath(name).parents}
        if under and not inside:
            return refused(404, "EntryNotFound", f"{under} does not exist on this revision")
        rows = [row_of(name, raw) for name, raw in inside.items()]
        folders = {str(one) for name in inside for one in PurePosixPath(name).parents if top in one.parents}
        # git's own oid of a folder would need its tree object; nobody compares it
        rows += [{"type": "directory", "path": one, "size": 0, "oid": git_oid(one.encode())} for one in folders]
        if query.get("recursive", "").lower() not in ("true", "1"):
            rows = [row for row in rows if PurePosixPath(row["path"]).parent == top]
        rows.sort(key=lambda row: str(row["path"]))
        start = int(query.get("cursor", 0))
        answer = said(rows[start : start + page])
        if start + page < len(rows):
            answer.headers["Link"] = f'<{url}?{urlencode({**query, "cursor": start + page})}>; rel="next"'
        return answer

    def resolve(self, commit: str, files: Mapping[str, bytes], name: str, cdn: str) -> Answer:
        """A file, or where it is."""
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if self.gated:
            return refused(403, "GatedRepo", "Access to this model is restricted")
        if name not in files:
            missing = refused(404, "EntryNotFound", "Entry not found")
            missing.headers |= headers  # the client remembers what a commit lacks
            return missing
        raw = files[name]
        if not is_large(name, len(raw)):
            return Answer(200, headers | {"ETag": f'"{git_oid(raw)}"'}, raw, name)
        linked = {"X-Linked-Etag": f'"{sha256_of(raw)}"', "X-Linked-Size": str(len(raw))}
        return Answer(302, headers | linked | {"Location": f"{cdn}/{sha256_of(raw)}?file={quote(name)}"})

    def preupload(self, files: Mapping[str, bytes], document: dict[str, Any]) -> Answer:
        """Which files go by LFS, and which are there already."""
        rows = []
        for one in document["files"]:
            raw, large = files.get(one["path"]), is_large(one["path"], one["size"])
            oid = None if raw is None else sha256_of(raw) if large else git_oid(raw)
            mode = "lfs" if large else "regular"
            rows.append({"path": one["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return said({"files": rows})

    def batch(self, document: dict[str, Any], address: str) -> Answer:
        """Where large files go; one that is there already goes nowhere."""
        objects = [
            one
            if self.blob(one["oid"])
            else one | {"actions": {"upload": {"href": f"{address}/{one['oid']}", "header": {}}}}
            for one in document["objects"]
        ]
        return said({"transfer": "basic", "objects": objects})

    def committed(self, revision: str, body: bytes, url: str) -> Answer:
        """A new commit on top of a branch, or of none where something is wrong with it."""
        old, before = self.at(revision) or ("", {})
        files, message = dict(before), ""
        for line in body.decode("utf-8").splitlines():
            key, value = (json.loads(line)[part] for part in ("key", "value"))
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit", old) != old:
                    return refused(412, "", "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                found = self.blob(value["oid"])
                if found is None:
                    return refused(400, "", f"{value['path']} was not uploaded")
                files[value["path"]] = found[1]
            elif key == "deletedFolder":
                gone = value["path"].strip("/") + "/"
                files = {path: raw for path, raw in files.items() if not path.startswith(gone)}
            elif files.pop(value["path"], None) is None:  # deletedFile
                return refused(404, "EntryNotFound", f"A file with this name doesn't exist: {value['path']}")
        new = hashlib.sha1(f"{old} {len(self.messages)} {message}".encode()).hexdigest()
        self.messages.append(message)
        if revision == "main":
            self.older[old] = before
            self.commit, self.files = new, files
        else:
            self.refs[revision], self.older[new] = new, files
        return said({"success": True, "commitOid": new, "commitUrl": f"{url}/commit/{new}"})
