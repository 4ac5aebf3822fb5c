"""The model folder: its layout, its manifest, the hashes in it, and how a new one is published whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from featherbed.errors import ModelFolderError, OptionError, OutputError
from featherbed.origin import UNKNOWN, Origin
from featherbed.spec import Spec, read_json

MANIFEST = "featherbed.json"
CARD, PAGE = "README.md", "report.html"
ONNX = "onnx"
REPORTS = "reports"
FORMAT = 1


@dataclass(frozen=True)
class FileRecord:
    """What the manifest knows of a file."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Variant:
    """One way of storing the model: its recipe as plain values, its files (the .onnx first), its verdict.

    ``passed`` is None until it was verified. ``again`` are files of the same content under the names that others load
    by default: they are counted with nothing.
    """

    name: str
    recipe: dict[str, Any]
    files: tuple[str, ...]
    least_onnxruntime: str
    passed: bool | None = None
    again: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values; ``again`` only where there is something."""
        plain = {key: list(one) if isinstance(one, tuple) else one for key, one in vars(self).items() if key != "name"}
        return {key: one for key, one in plain.items() if key != "again" or one}


@dataclass(frozen=True)
class Change:
    """A variant that gave way to another of its name, or to none: when, and what it had been."""

    date: str  # 2026-11-22, UTC
    variant: str
    featherbed: str
    size_bytes: int
    sha256: str  # of its weights


@dataclass(frozen=True)
class Manifest:
    """featherbed.json: everything a runtime trusts about a folder."""

    name: str
    version: str  # of featherbed
    source: dict[str, str]  # file name → sha256 of the checkpoint's weights and config
    spec: Spec
    variants: dict[str, Variant]
    files: dict[str, FileRecord]
    token_ids_sha256: str = ""  # of the shipped probe's token ids when the folder was made; "" where nobody looked
    origin: Origin = UNKNOWN
    history: tuple[Change, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "format": FORMAT,
            "featherbed": self.version,
            "name": self.name,
            "source": self.source,
            "spec": self.spec.to_json(),
            "variants": {v.name: v.to_json() for v in self.variants.values()},
            "files": {name: vars(record) for name, record in sorted(self.files.items())},
            "token_ids_sha256": self.token_ids_sha256,
            "origin": self.origin.to_json(),
            "history": [vars(change) for change in self.history],
        }

    def size_bytes(self, variant: str) -> int:
        """Bytes of a variant's files."""
        return sum(self.files[name].size_bytes for name in self.variants[variant].files)

    def change(self, variant: str) -> Change:
        """What is to be remembered of a variant that gives way today."""
        first = self.variants[variant].files[-1]  # the sidecar, where there is one: the weights
        today = datetime.now(UTC).date().isoformat()
        return Change(today, variant, self.version, self.size_bytes(variant), self.files[first].sha256)

    def without(self, names: Collection[str]) -> Manifest:
        """This manifest with variants gone, and with the records of files and evidence that only they had."""
        variants = {name: one for name, one in self.variants.items() if name not in names}
        used = {file for one in variants.values() for file in (*one.files, *one.again)}
        gone = {file for one in names for file in (*self.all_files(one), f"{REPORTS}/{one}.json")} - used
        files = {file: record for file, record in self.files.items() if file not in gone}
        return replace(self, variants=variants, files=files)

    def once(self) -> Manifest:
        """This manifest without the files that are there again."""
        again = {file for one in self.variants.values() for file in one.again}
        variants = {name: replace(one, again=()) for name, one in self.variants.items()}
        files = {file: record for file, record in self.files.items() if file not in again}
        return replace(self, variants=variants, files=files)

    def all_files(self, name: str) -> tuple[str, ...]:
        """A variant's files, and those that are there again; none of a name that is none."""
        return (*self.variants[name].files, *self.variants[name].again) if name in self.variants else ()

    def following(self, old: Manifest) -> Manifest:
        """This manifest with the history of an older one, and with those of its variants that are not the same here."""

        def same(name: str) -> bool:
            mine = self.variants[name].files if name in self.variants else ()
            theirs = old.variants[name].files
            return mine == theirs and all(self.files[file] == old.files[file] for file in mine)

        gave_way = tuple(old.change(name) for name in old.variants if not same(name))
        return replace(self, history=(*old.history, *gave_way))


@dataclass(frozen=True)
class ModelFolder:
    """A folder whose manifest was read; paths come from the manifest and nowhere else."""

    path: Path
    manifest: Manifest

    def variant(self, name: str) -> Variant:
        """The variant called ``name``.

        Raises OptionError when the folder has none of that name.
        """
        if name in self.manifest.variants:
            return self.manifest.variants[name]
        raise OptionError(
            f"variant {name!r} of {self.path}",
            expected=f"one of {', '.join(self.manifest.variants)}",
            found="no such variant",
            remedy="choose one of these, or build it",
        )

    def graph_path(self, name: str) -> Path:
        """The .onnx file of a variant, all its files checked to be there in the right size.

        Raises ModelFolderError on a missing or cut file.
        """
        files = self.variant(name).files
        for file in files:
            self._check_size(file)
        return self.path / files[0]

    def report_path(self, name: str) -> Path:
        """Where the evidence of a variant lies."""
        return self.path / REPORTS / f"{name}.json"

    def check_hashes(self, names: Iterable[str] | None = None) -> None:
        """Read every file of the manifest (or those named) and compare its sha256.

        Raises ModelFolderError that names the first file which differs.
        """
        for name in names if names is not None else self.manifest.files:
            self._check_size(name)
            found = file_record(self.path / name)
            if found != self.manifest.files[name]:
                raise ModelFolderError(
                    f"{self.path / name}",
                    expected=f"sha256 {self.manifest.files[name].sha256[:12]}… as {MANIFEST} says",
                    found=f"{found.sha256[:12]}…",
                    remedy="the file was changed: fetch or build it again",
                )

    def _check_size(self, name: str) -> None:
        record, path = self.manifest.files.get(name), self.path / name
        size = path.stat().st_size if path.is_file() else None
        if record is None or size != record.size_bytes:
            raise ModelFolderError(
                f"{path}",
                expected="a file of the manifest" if record is None else f"{record.size_bytes} bytes",
                found="no such file" if size is None else f"{size} bytes",
                remedy="fetch or build the folder again",
            )

    def with_evidence(self, verdicts: dict[str, bool | None]) -> ModelFolder:
        """This folder with verdicts set and the records of card and reports refreshed, written to disk."""
        m = self.manifest
        variants = {v.name: replace(v, passed=verdicts.get(v.name, v.passed)) for v in m.variants.values()}
        files = dict(m.files)
        evidence = [self.path / CARD, self.path / PAGE, *sorted((self.path / REPORTS).glob("*.*"))]
        files |= {p.relative_to(self.path).as_posix(): file_record(p) for p in evidence if p.is_file()}
        return self._written(replace(m, variants=variants, files=files))

    def without(self, name: str) -> ModelFolder:
        """This folder with a variant and its evidence gone, written to disk; its graph's files stay."""
        m = self.manifest
        gone = (*m.all_files(name), f"{REPORTS}/{name}.json")
        variants = {k: v for k, v in m.variants.items() if k != name}
        files = {k: record for k, record in m.files.items() if k not in gone}
        history = (*m.history, m.change(name)) if name in m.variants else m.history
        left = self._written(replace(m, variants=variants, files=files, history=history))
        self.report_path(name).unlink(missing_ok=True)  # speed and retrieval were of those files, not of the next ones
        return left

    def adding(self, variant: Variant) -> ModelFolder:
        """This folder with a variant whose files lie in it, written to disk; config.json is taken down anew."""
        m = self.manifest
        fresh = [*variant.files, *variant.again, *(name for name in m.files if name == "config.json")]
        files = m.files | {name: file_record(self.path / name) for name in fresh}
        return self._written(replace(m, variants=m.variants | {variant.name: variant}, files=files))

    def _written(self, manifest: Manifest) -> ModelFolder:
        write_text(self.path / MANIFEST, dump(manifest.to_json()))
        return ModelFolder(self.path, manifest)


def sidecar_name(graph_name: str) -> str:
    """``model.onnx`` → ``model.onnx_data``: the name transformers.js and Optimum look for."""
    return f"{graph_name}_data"


def graph_name(suffix: str) -> str:
    """The file of a recipe's suffix, inside the folder."""
    return f"{ONNX}/model{suffix}.onnx"


def dump(value: object) -> str:
    """JSON as we write it: readable, stable, no NaN."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def file_record(path: Path) -> FileRecord:
    """Size and sha256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileRecord(digest.hexdigest(), file.tell())


def write_text(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old one or the new one.

    Raises OutputError when it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, ValueError) as error:  # ValueError: text that UTF-8 cannot carry
        if os.path.exists(temporary):
            temporary.unlink()
        raise OutputError(
            f"{path}",
            expected="room, permission, and text that UTF-8 can carry",
            found=f"{error.strerror if isinstance(error, OSError) else error}",
            remedy="free space or choose another place",
        ) from error


def open_folder(path: Path) -> ModelFolder:
    """Read the manifest of a model folder.

    Raises ModelFolderError when there is none, or it is of another format, or names files outside the folder.
    """
    if not (path / MANIFEST).is_file():
        raise ModelFolderError(
            f"{path}",
            expected=f"a model folder with {MANIFEST}",
            found="no such folder" if not path.exists() else f"no {MANIFEST}",
            remedy="make one with `featherbed build CHECKPOINT`, or fetch one: `featherbed pull ID -o DIR`",
        )
    return ModelFolder(path, read_manifest(path / MANIFEST))


def read_manifest(path: Path) -> Manifest:
    """The manifest in a file. Raises ModelFolderError on another format, or one that names files outside its folder."""
    raw = read_json(path, ModelFolderError)
    try:
        if raw["format"] != FORMAT:
            raise ValueError(f"format {raw['format']!r}, where this version reads {FORMAT}")
        files = {str(n): FileRecord(str(r["sha256"]), int(r["size_bytes"])) for n, r in raw["files"].items()}
        variants = {
            str(n): Variant(
                str(n), v["recipe"], tuple(v["files"]), v["least_onnxruntime"], v["passed"], tuple(v.get("again", ()))
            )
            for n, v in raw["variants"].items()
        }
        if not all(v.files for v in variants.values()):
            raise ValueError("a variant without files")
        if not all(isinstance(v.recipe, dict) and isinstance(v.least_onnxruntime, str) for v in variants.values()):
            raise ValueError("a variant whose recipe or least onnxruntime is none")
        reports = (f"{REPORTS}/{name}.json" for name in variants)
        for name in [*files, *reports, *(f for v in variants.values() for f in (*v.files, *v.again))]:
            if not _inside(name):
                raise ValueError(f"the path {name!r}, which leaves the folder")
        return Manifest(
            str(raw["name"]), str(raw["featherbed"]), dict(raw["source"]), Spec.from_json(raw["spec"]), variants, files,
            str(raw.get("token_ids_sha256", "")), Origin.from_json(raw.get("origin", {})),
            tuple(_change(one) for one in raw.get("history", ())),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ModelFolderError(
            f"{path}",
            expected="a manifest of ours",
            found=f"{type(error).__name__}: {error}",
            remedy="build the folder again with this version",
        ) from error


def _change(raw: dict[str, Any]) -> Change:
    words = {key: str(raw[key]) for key in ("date", "variant", "featherbed", "sha256")}
    return Change(size_bytes=int(raw["size_bytes"]), **words)


def _inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and "\\" not in name and ":" not in name


@contextmanager
def publish(out: Path, replacing: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``out`` that takes its place when the block ends well, and vanishes when not.

    Raises OptionError when ``out`` exists and is not a model folder of ours, unless ``replacing``; OutputError when it
    cannot be written.
    """
    # os.path and not Path: it answers False, and does not raise, where a name is too long for the disk
    if (
        not replacing
        and os.path.exists(out)
        and not (out / MANIFEST).is_file()
        and not (out.is_dir() and not any(out.iterdir()))
    ):
        raise OptionError(
            f"output {out}",
            expected="a new folder, or a model folder to replace",
            found="something else",
            remedy="choose another place with -o",
        )
    if out.resolve() == Path.cwd():
        raise OptionError(
            f"output {out}",
            expected="a folder beside or below this one",
            found="the one we stand in, which would be replaced under our feet",
            remedy="choose another place with -o",
        )
    temporary = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    old = out.with_name(f"{out.name}.old-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        sync_folder(temporary)
        if os.path.exists(out):
            out.rename(old)
        temporary.rename(out)
        sync_folder(out.parent)
    except OSError as error:
        raise OutputError(
            f"output {out}",
            expected="room and permission to write there",
            found=f"{error.strerror or error}",
            remedy="free space or choose another place with -o",
        ) from error
    finally:
        if os.path.exists(old) and not os.path.exists(out):
            old.rename(out)  # stopped between the two renames
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def sync_folder(path: Path) -> None:
    """fsync a folder, so that the names in it survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # Windows and some network file systems cannot
        pass
    finally:
        os.close(descriptor)
