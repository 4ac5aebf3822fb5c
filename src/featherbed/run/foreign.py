"""Someone else's folder or .onnx file: which file is meant, and what its configs say of it. Nothing is guessed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from featherbed.choice import AUTO
from featherbed.errors import ModelFolderError, OptionError, SpecError, UnknownArchitectureError
from featherbed.folder import MANIFEST, ONNX
from featherbed.modules import dense_modules, modules_in
from featherbed.run.ports import Known, Ports
from featherbed.spec import Spec, check_modules, read_json, spec_of

PLAIN = "model"
FIRST = (f"{ONNX}/{PLAIN}.onnx", f"{PLAIN}.onnx")  # what "auto" takes: sentence-transformers looks there first as well
OFFSET_FAMILIES = ("roberta", "xlm-roberta", "camembert", "mpnet", "xlm-roberta-xl", "longformer", "data2vec-text")
OTHER_NAMES = {
    "hidden_size": ("n_embd", "dim", "d_model"),
    "max_position_embeddings": ("n_positions", "max_seq_len", "seq_length"),
}  # of the same sizes, in config.json of other families
KNOWN_MODULES, DENSE = ("Transformer", "Pooling", "Normalize"), "Dense"
DENSE_FILES = ("config.json", "model.safetensors")


@dataclass(frozen=True)
class Foreign:
    """What files of others do not say of themselves, said by whoever opens them.

    ``pooling`` is mean, cls or lasttoken; ``output`` the graph's output to read; ``task`` the number or name of the
    task where a graph wants one; ``max_length`` the most tokens a text may have. What the files do say must agree.
    """

    pooling: str | None = None
    output: str | None = None
    task: int | str | None = None
    max_length: int | None = None


@dataclass(frozen=True)
class Found:
    """A graph of others: its file, the folder with its tokenizer, what is known of it.

    ``modules`` are those behind the pooling: the graph must have computed them.
    """

    path: Path
    home: Path
    spec: Spec
    known: Known
    modules: tuple[str, ...] = ()

    def fitting(self, ports: Ports) -> Spec:
        """The spec, with what the graph's ports say too. Raises UnknownArchitectureError where modules are left."""
        if self.modules and ports.vectors is None:
            raise UnknownArchitectureError(
                f"{self.path}",
                expected=f"a pooled output: {self.home / 'modules.json'} has {', '.join(self.modules)} too",
                found="hidden states only",
                remedy="export the model with its pooling, as sentence-transformers does",
            )
        return replace(self.spec, max_length=min(self.spec.max_length, ports.length or self.spec.max_length))


def graphs(folder: Path) -> tuple[str, ...]:
    """The .onnx files of a folder and of its folder onnx, by name within it."""
    if not folder.is_dir():
        return ()
    places = (folder / ONNX, folder)
    return tuple(p.relative_to(folder).as_posix() for at in places for p in sorted(at.glob("*.onnx")))


def chosen(folder: Path, variant: str) -> Path:
    """The file that ``variant`` means: a file's name, or what stands behind "model_" in one.

    "auto" and "fp32" are onnx/model.onnx, else model.onnx; "auto" is also the only file there is. A file in onnx/ goes
    before one of the same name beside it. Raises ModelFolderError on a folder without any, OptionError that lists them.
    """
    names = graphs(folder)
    if not names:
        raise ModelFolderError(
            f"{folder}",
            expected=f"a model folder with {MANIFEST}, or one with .onnx files in it or in its folder {ONNX}",
            found="no such folder" if not folder.exists() else "neither",
            remedy="make one with `featherbed build CHECKPOINT`, or fetch one: `featherbed pull ID -o DIR`",
        )
    plain = [name for name in FIRST if name in names]
    if variant in (AUTO, "fp32") and plain:
        return folder / plain[0]
    stems = {name: Path(name).stem for name in names}
    for fits in (
        [n for n in names if variant in (n, Path(n).name, stems[n])],
        [n for n in names if stems[n] == f"{PLAIN}_{variant}"],
        [n for n in names if stems[n].endswith(f"_{variant}")],
        list(names) if variant == AUTO else [],
    ):
        if fits and len({stems[n] for n in fits}) == 1:
            return folder / fits[0]
        if fits:
            break
    raise OptionError(
        f"variant {variant!r} of {folder}",
        expected="the name of one of its files, or what stands behind model_ in it",
        found=f"{', '.join(names)}",
        remedy="choose one of these",
    )


def found(path: Path, said: Foreign, root: Path | None = None) -> Found:
    """What is known of the graph at ``path`` of the repository ``root``.

    Raises SpecError where the configs are silent or disagree, TokenizerError without a tokenizer.json.
    """
    home = _home(path, root)
    spec, config = _spec(home, said)
    modules, width = _modules(home, spec)
    heads, size = config.get("num_key_value_heads", config.get("num_attention_heads")), config.get("head_dim")
    if size is None and isinstance(config.get("num_attention_heads"), int) and config["num_attention_heads"] > 0:
        size = (spec.hidden_dim or spec.dim) // config["num_attention_heads"]
    first = spec.pad_id + 1 if spec.family in OFFSET_FAMILIES else 0
    tasks = config.get("lora_adaptations")
    names = tuple(map(str, tasks)) if isinstance(tasks, list) else ()
    known = Known(
        output=said.output,
        task=_task(said.task if said.task is not None else _default_task(home, config), names, home),
        tasks=names,
        heads=heads if isinstance(heads, int) else None,
        size=size if isinstance(size, int) else None,
        first_position=first,
        pad_id=spec.pad_id,
        hidden_width=spec.hidden_dim,
    )
    positions = config.get("max_position_embeddings")
    longest = min(spec.max_length, positions - first if isinstance(positions, int) else spec.max_length)
    return Found(path, home, replace(spec, dim=width or spec.dim, max_length=longest), known, modules)


def _home(path: Path, root: Path | None) -> Path:
    """The folder with the configs: the repository's, else the graph's own, where pooling is said if anywhere."""
    places = [*([root] if root is not None else []), path.parent, path.absolute().parent.parent]
    with_config = [place for place in places if (place / "config.json").is_file()]
    speaking = [p for p in with_config if (p / "modules.json").is_file() or (p / "1_Pooling").is_dir()]
    return (speaking or with_config or places)[0]


def _spec(home: Path, said: Foreign) -> tuple[Spec, dict[str, Any]]:
    if said.max_length is not None and said.max_length < 1:
        raise OptionError("max_length", expected="at least 1", found=str(said.max_length), remedy="leave it out")
    try:
        config = read_json(home / "config.json")
        for key, others in OTHER_NAMES.items():
            config.setdefault(key, next((config[name] for name in others if name in config), None))
        if said.max_length is not None:
            positions = config["max_position_embeddings"]
            config["max_position_embeddings"] = min(said.max_length, positions if positions else said.max_length)
        check_modules(home, any_behind=True)
        return spec_of(home, config, said.pooling, dense_modules(home) if _with_dense(home) else ()), config
    except SpecError as error:
        if error.subject.startswith("pooling of"):
            raise SpecError(
                error.subject,
                expected=error.expected,
                found=error.found,
                remedy="say Foreign(pooling='mean') or --pooling mean, or cls, or lasttoken: its card knows which",
            ) from error
        raise


def _with_dense(home: Path) -> bool:
    """Whether there is nothing behind the pooling but Dense modules that are here, and perhaps a normalisation."""
    listed = modules_in(home, any_behind=True)
    here = all((home / path / name).is_file() for kind, path in listed if kind == DENSE for name in DENSE_FILES)
    return here and all(kind in (*KNOWN_MODULES, DENSE) for kind, _ in listed)


def _modules(home: Path, spec: Spec) -> tuple[tuple[str, ...], int | None]:
    """(modules behind the pooling that we do not compute, width of the last of them that has one)."""
    known = (*KNOWN_MODULES, DENSE) if spec.dense else KNOWN_MODULES
    width = None
    kinds = []
    for kind, path in modules_in(home, any_behind=True):
        if kind not in known:
            kinds.append(kind)
            own = home / path / "config.json"
            if kind == DENSE and home.resolve() in own.resolve().parents and own.is_file():
                said = read_json(own).get("out_features")
                width = said if isinstance(said, int) else width
    return tuple(kinds), width


def _default_task(home: Path, config: dict[str, Any]) -> int | str | None:
    for name in ("", "config_sentence_transformers.json", "sentence_bert_config.json"):
        values = config if not name else read_json(home / name) if (home / name).is_file() else {}
        task = values.get("default_task")
        if isinstance(task, (int, str)) and not isinstance(task, bool):
            return task
    return None


def _task(task: int | str | None, names: tuple[str, ...], home: Path) -> int | None:
    """A task's number, of its name or number."""
    if task is None or (isinstance(task, int) and not isinstance(task, bool) and 0 <= task < (len(names) or task + 1)):
        return task if not isinstance(task, str) else None
    if task in names:
        return names.index(str(task))
    raise OptionError(
        f"task {task!r} of {home}",
        expected=f"one of {', '.join(names)}" if names else "a task's number: the configs have no names for them",
        found="no such task",
        remedy="choose one of these",
    )
