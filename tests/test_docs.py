"""Pages are held against the code: every verb, option, recipe, error and metric is documented, and figures are
those of the committed results."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from featherbed import errors
from featherbed.cli import app
from featherbed.recipe import RECIPES
from featherbed.report import AT_LEAST, AT_MOST, default_gates

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "docs" / "guide"
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]  # a Group, by its type unknown
VERBS = sorted(COMMANDS)
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
BUILD = json.loads((ROOT / "benchmarks" / "results" / "main_job.json").read_text("utf-8"))["build"]
QUALITY = json.loads((ROOT / "benchmarks" / "results" / "quality.json").read_text("utf-8"))
FAMILIES = json.loads((ROOT / "benchmarks" / "results" / "families.json").read_text("utf-8"))["families"]
SIZES = json.loads((ROOT / "benchmarks" / "results" / "sizes.json").read_text("utf-8"))["variants"]
ENGINE = json.loads((ROOT / "benchmarks" / "results" / "engine.json").read_text("utf-8"))


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_page_that_names_each_option(verb: str) -> None:
    page = (GUIDE / f"{verb}.md").read_text("utf-8")
    for parameter in COMMANDS[verb].params:
        for option in parameter.opts:
            assert not option.startswith("-") or f"`{option}`" in page, option


def test_every_page_of_the_guide_is_a_verb() -> None:
    assert sorted(p.stem for p in GUIDE.glob("*.md")) == VERBS


def test_every_recipe_is_on_its_page_with_its_file() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text("utf-8")
    for recipe in RECIPES.values():
        assert f"| `{recipe.name}` | `model{recipe.suffix}.onnx` |" in page


def test_every_error_is_on_its_page_with_its_exit_code() -> None:
    page = (ROOT / "docs" / "errors.md").read_text("utf-8")
    for name, kind in inspect.getmembers(errors, inspect.isclass):
        if issubclass(kind, errors.FeatherbedError):
            assert re.search(rf"\| `{name}` \|.*\| {kind.exit_code} \|", page), name


def test_every_metric_and_every_default_gate_is_on_the_page_of_verify() -> None:
    page = (GUIDE / "verify.md").read_text("utf-8")
    for metric in AT_LEAST | AT_MOST:
        assert f"| `{metric}` |" in page
    for recipe in RECIPES.values():
        bits = recipe.linear_bits
        row = "`fp32`" if bits == 32 else f"linear layers in {'float16' if bits == 16 else f'{bits} bits'}"
        bounds = {g.metric: g.bound for g in default_gates(recipe)}
        assert f"| {row} | {bounds['cos_min']} | 1e-4 | 1e-4 |" in page
        assert bounds["invariance_max"] == bounds["unit_norm_max_error"] == 1e-4


def test_every_room_where_texts_become_vectors_is_in_the_house() -> None:
    page = (ROOT / "docs" / "house.md").read_text("utf-8")
    drawn = set(re.findall(r"^│   [├└]── (\w+\.py)", page.split("├── run/")[1].split("├── make/")[0], re.M))
    assert drawn == {path.name for path in (ROOT / "src" / "featherbed" / "run").glob("*.py")} - {"__init__.py"}


def test_commands_of_the_readme_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = re.findall(r"make (\w+)", (ROOT / "README.md").read_text("utf-8"))
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), target


def quoted(page: str, marker: str) -> str:
    """What stands between a page's markers."""
    return (ROOT / page).read_text("utf-8").split(f"<!-- {marker} -->")[1].split("<!-- end -->")[0]


def test_the_readme_quotes_the_committed_results() -> None:
    speed, cost = quoted("README.md", "engine"), quoted("README.md", "main_job")
    for name in ("int8", "fp32", "stock int8", "stock fp32"):
        assert f"{ENGINE['qwen3-0.6b']['results'][name]['workloads']['8x128']['tokens_per_s']:.0f}" in speed, name
    stock = sum(v["seconds"] for k, v in BUILD.items() if k.startswith("stock"))
    assert f"{stock:.0f} s" in cost
    assert f"{BUILD['featherbed']['seconds']:.0f} s" in cost
    assert f"{BUILD['featherbed']['private_peak_mib'] / 1024:.2f} GiB" in cost


@pytest.mark.parametrize("model", ["qwen3-0.6b", "all-MiniLM-L6-v2"])
def test_the_page_of_speed_quotes_everyone_who_ran(model: str) -> None:
    page = quoted("docs/speed.md", "engine")
    for name, result in ENGINE[model]["results"].items():
        if name != "wall" and result.get("workloads"):
            assert f"| {result['workloads']['8x128']['tokens_per_s']:.0f} |" in page, name


@pytest.mark.parametrize("model", list(QUALITY))
def test_the_page_of_quality_quotes_every_variant_of_every_model(model: str) -> None:
    page = quoted("docs/quality.md", "quality").split(f"## {model}\n")[1].split("\n## ")[0]
    for name, variant in QUALITY[model]["variants"].items():
        worst = int(variant["cosine_to_fp32"]["worst"] * 1e4 + 1e-6) / 1e4
        row = next(line for line in page.splitlines() if line.startswith((f"| `{name}` |", f"| {name} |")))
        assert f"/ {worst:.4f} |" in row, name
        assert f"| {variant['size_bytes'] / 1e6:.2f} |" in row, name


def test_the_page_of_sizes_quotes_every_variant_that_was_weighed() -> None:
    page = quoted("docs/sizes.md", "sizes")
    for name, size in SIZES.items():
        assert f"| `{name}` | {size / 1e6:.0f} | {size / 2**20:.0f} |" in page, name


def test_the_page_of_families_quotes_every_family_within_its_bounds() -> None:
    page = quoted("docs/families.md", "families")
    for name, one in FAMILIES.items():
        assert one["parity"] <= 2e-5, name
        assert one["invariance"] <= 1e-5, name
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        assert f"| {one['parity']:.1e} | {one['invariance']:.1e} | {one['build']['seconds']:.1f} |" in row


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text("utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


def test_words_that_are_not_spoken_are_not_spoken() -> None:
    unspoken = re.compile(r"\b(class|def) \w*(Manager|Handler|Helper|Utils|Processor|Factory)\b|\bdef process\(")
    for path in (ROOT / "src").rglob("*.py"):
        assert not unspoken.search(path.read_text("utf-8")), path.name
    assert isinstance(app, typer.Typer)
