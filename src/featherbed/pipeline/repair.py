"""repair(): a folder whose configs and sidecars every ecosystem reads, from one made by somebody else."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from featherbed.check.conform import RULES, Finding
from featherbed.check.facts import TOKENIZER, Facts, GraphFile, facts
from featherbed.check.rules import appends_token
from featherbed.errors import OptionError
from featherbed.folder import MANIFEST, Manifest, dump, file_record, open_folder, publish, sidecar_name, write_text
from featherbed.make.mend import Change, Desk, Known, mend
from featherbed.make.relocate import name_sidecar, relocate
from featherbed.pipeline.links import link
from featherbed.spec import FAMILY_POOLING, Pooling

PADS = ("<pad>", "[PAD]", "<|endoftext|>")  # by these names where no file says which


@dataclass(frozen=True)
class Repaired:
    """What was changed, or would be; what no repair can mend; and where the folder is (None: nothing was written)."""

    changes: tuple[Change, ...]
    left: tuple[Finding, ...]
    folder: Path | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "changes": [vars(change) for change in self.changes],
            "left": [finding.to_json() for finding in self.left if finding.rule.fails],
            "folder": str(self.folder) if self.folder else None,
        }


def repair(
    folder: Path | str,
    out: Path | str | None = None,
    *,
    in_place: bool = False,
    pooling: str | None = None,
    dry_run: bool = False,
) -> Repaired:
    """Mend configs, tokenizer and sidecars' names; weights stay as they are, every byte.

    Writes ``out``, a new folder with hard links to all that did not change, or ``in_place`` the folder itself, whole or
    not at all. ``pooling`` says what no file does. Raises ModelFolderError when there is no .onnx file or one that
    cannot be read, OptionError when nobody says where to, or the pooling is unknown; OutputError.
    """
    path = Path(folder)
    found = facts(path)
    target = _target(path, out, in_place, dry_run)
    desk = Desk({**found.files, TOKENIZER: found.tokenizer or None})
    moves = {graph.file: graph.seen.sidecars for graph in found.graphs if graph.seen and _misnamed(graph)}
    mend(desk, _known(found, pooling))
    told = [
        Change(file, f"weights in {sidecar_name(Path(file).name)}", "no other name is fetched along with the graph")
        for file in moves
    ]
    changes = (*desk.changes, *told)
    if target is None or (in_place and not changes):
        return Repaired(changes, tuple(_left(found)), None)
    with publish(target, replacing=in_place) as place:
        _linked(path, place)
        records = {name: _moved(path, place, name, sidecars) for name, sidecars in moves.items()}
        _without_old(place, moves)
        for name in sorted(desk.changed):
            (place / name).parent.mkdir(exist_ok=True)
            text = json.dumps(desk.files[name], ensure_ascii=False) if name == TOKENIZER else dump(desk.files[name])
            write_text(place / name, text)
        if (place / MANIFEST).is_file():
            _tell_manifest(place, desk.changed, records)
    return Repaired(changes, tuple(_left(facts(target))), target)


def _target(path: Path, out: Path | str | None, in_place: bool, dry_run: bool) -> Path | None:
    if dry_run:
        return None
    if in_place == (out is not None):
        raise OptionError(
            "repair",
            expected="one place: -o OUT for a new folder, or --in-place",
            found="both" if in_place else "none",
            remedy="say one; --dry-run only lists what would change",
        )
    target = path if out is None else Path(out)
    if not in_place and target.resolve() == path.resolve():
        raise OptionError(
            f"output {target}", expected="another folder", found="the one that is repaired", remedy="say --in-place"
        )
    return Path(os.path.abspath(target))  # noqa: PTH100  # a link stays one; "." has a name to put others beside


def _misnamed(graph: GraphFile) -> bool:
    return bool(graph.seen and graph.seen.sidecars) and graph.seen is not None and graph.seen.sidecars != (
        sidecar_name(Path(graph.file).name),
    )  # fmt: skip


def _known(found: Facts, pooling: str | None) -> Known:
    """What the folder's files say. Raises OptionError on an unknown pooling."""
    if pooling is not None and pooling not in {p.value for p in Pooling}:
        raise OptionError(
            "--pooling", expected=f"one of {', '.join(Pooling)}", found=repr(pooling), remedy="choose one of these"
        )
    config = found.said("config.json")
    chosen = Pooling(pooling) if pooling else found.pooling
    if chosen is None and not found.said("1_Pooling/config.json"):
        chosen = FAMILY_POOLING.get(str(config.get("model_type")))
    eos = config.get("eos_token_id")
    eos = eos if isinstance(eos, int) else found.token_id(found.token("eos_token"))
    pad_id = config.get("pad_token_id")
    added = {t.get("id"): t.get("content") for t in found.tokenizer.get("added_tokens") or ()}
    pad = found.token("pad_token") or (found.tokenizer.get("padding") or {}).get("pad_token") or added.get(pad_id)
    pad = pad or next((name for name in PADS if name in added.values()), None)
    return Known(
        pooling=chosen,
        pad=pad,
        pad_id=pad_id if isinstance(pad_id, int) else found.token_id(pad),
        eos_id=eos,
        appends=appends_token(found.tokenizer.get("post_processor")),
        sidecars={Path(graph.file).name: bool(graph.seen and graph.seen.sidecars) for graph in found.graphs},
    )


def _left(found: Facts) -> Iterator[Finding]:
    for rule in RULES:
        yield from (Finding(rule, variant, text) for variant, text in rule.look(found))


def _linked(path: Path, place: Path) -> None:
    """Every file of the folder, as a hard link or, where there can be none, a copy. Links are what they lead to."""
    for root, _, names in os.walk(path):
        inside = Path(root).relative_to(path)
        (place / inside).mkdir(exist_ok=True)
        for name in names:
            link(Path(root) / name, place / inside / name)


def _moved(path: Path, place: Path, name: str, sidecars: tuple[str, ...]) -> tuple[str, ...]:
    """A graph whose weights lie in the sidecar of its name: a link to the one they lay in, or several made one."""
    source, target = path / name, place / name
    beside = target.with_name(sidecar_name(target.name))
    target.unlink()
    beside.unlink(missing_ok=True)
    if len(sidecars) == 1:
        link(source.with_name(sidecars[0]), beside)
        name_sidecar(source, target, beside.name)
    else:
        relocate(source, target, beside=True, anyhow=True)
    return tuple(file.relative_to(place).as_posix() for file in (target, beside))


def _without_old(place: Path, moves: dict[str, tuple[str, ...]]) -> None:
    """Take away the sidecars that graphs named before, where no graph names them now."""
    seen = {place / graph.file: graph.seen for graph in facts(place).graphs}
    named = {file.with_name(name) for file, one in seen.items() if one for name in one.sidecars}
    old = {(place / file).with_name(name) for file, names in moves.items() for name in names}
    for file in old - named:
        file.unlink(missing_ok=True)


def _tell_manifest(place: Path, changed: set[str], moved: dict[str, tuple[str, ...]]) -> None:
    """Have the manifest of ours name the files that lie here now, with their hashes."""
    manifest: Manifest = open_folder(place).manifest
    variants = {
        name: replace(one, files=moved[one.files[0]]) if one.files[0] in moved else one
        for name, one in manifest.variants.items()
    }
    used = {file for one in variants.values() for file in one.files}
    gone = {file for one in manifest.variants.values() for file in one.files} - used
    fresh = [*changed, *(file for files in moved.values() for file in files)]
    files = {name: one for name, one in manifest.files.items() if name not in gone}
    files |= {name: file_record(place / name) for name in fresh}
    write_text(place / MANIFEST, dump(replace(manifest, variants=variants, files=files).to_json()))
