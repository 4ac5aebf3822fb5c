"""The report: all of it is in the evidence, it needs nothing from elsewhere, and texts cannot break out of it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import featherbed
from featherbed.check.bench import Load
from featherbed.check.card import number
from featherbed.check.page import report
from featherbed.check.plots import Axis, Box, Dot, boxes, heat, nines, scatter, ticks
from featherbed.folder import open_folder

VOID = {"meta", "br", "circle", "rect", "line", "polyline"}
HARMS = {
    f"encoder.layer.{layer}.{kind}.weight": {"4": 10.0 ** -(layer + 1), "8": 1e-6}
    for layer in range(3)
    for kind in ("attention.output.dense", "output.dense")
}


class Balanced(HTMLParser):
    """Every tag that opens must close, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:  # noqa: ARG002  # HTMLParser's own signature
        self.seen.add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def once(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with evidence, made once."""
    root = tmp_path_factory.mktemp("evidence")
    folder = Path(shutil.copytree(folders["bert-mean"], root / "model"))
    probe = root / "texts.jsonl"
    probe.write_text("\n".join(json.dumps({"text": f"<script>{'rain & ' * n}"}) for n in range(1, 20)), "utf-8")
    featherbed.verify(folder, ["fp32", "int8", "q4"], probes=[probe], save=True)
    featherbed.bench(folder, ["fp32", "int8"], Load(tokens=8, batch=1, rounds=1), save=True)
    (folder / "reports" / "tune.json").write_text(json.dumps({"harms": HARMS}), "utf-8")
    return folder


@pytest.fixture
def verified(once: Path, tmp_path: Path) -> Path:
    """A private copy of it."""
    return Path(shutil.copytree(once, tmp_path / "verified"))


def test_the_page_is_whole_html_that_fetches_and_runs_nothing(verified: Path) -> None:
    text = report(verified).read_text("utf-8")
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert not parser.seen & {"script", "link", "img", "iframe"}
    assert not re.search(r"https?://|url\(|@import|\son\w+=", text)


def test_the_same_evidence_gives_the_same_bytes(verified: Path) -> None:
    assert report(verified).read_bytes() == report(verified).read_bytes()
    open_folder(verified).check_hashes()


def test_every_variant_stands_in_the_table_with_the_figures_of_its_evidence(verified: Path) -> None:
    table = report(verified).read_text("utf-8").split("<tbody>")[1].split("</tbody>")[0]
    rows = {row[0]: row for line in table.splitlines() if (row := re.findall(r"<td>(?:<b>)?(.*?)(?:</b>)?</td>", line))}
    assert set(rows) == set(open_folder(verified).manifest.variants)
    for name in ("int8", "q4"):
        metrics = json.loads((verified / "reports" / f"{name}.json").read_text("utf-8"))["metrics"]
        assert rows[name][3:6] == [number(metrics["cos_mean"], 5), number(metrics["cos_p1"], 4),
                                   number(metrics["cos_min"], 4)]  # fmt: skip
    assert rows["int4"][3] == "–"


def test_figures_are_drawn_of_what_was_measured(verified: Path) -> None:
    text = report(verified).read_text("utf-8")
    labels = re.findall(r'aria-label="([^"]*)"', text)
    assert [label for label in labels if "against" in label] == [
        "worst cosine against size, MB", "worst cosine against tokens/s", "worst cosine against private memory, MiB",
    ]  # fmt: skip
    assert "harm of rounding each weight to 4 bits" in labels


def test_texts_of_another_probe_are_named_by_their_place_only(verified: Path) -> None:
    text = report(verified).read_text("utf-8")
    assert "&lt;script&gt;" not in text
    assert "of the probe texts.jsonl" in text


def test_texts_of_the_shipped_probe_can_be_read(verified: Path) -> None:
    from featherbed.probe import shipped

    path = verified / "reports" / "int8.json"
    evidence = json.loads(path.read_text("utf-8"))
    evidence["probe"] = shipped().to_json()
    evidence["metrics"]["worst"] = [[3, 0.5]]
    path.write_text(json.dumps(evidence), "utf-8")
    assert shipped().texts[3].split()[0] in report(verified).read_text("utf-8")


def test_an_unverified_folder_says_what_to_do(copied: Callable[[str], Path]) -> None:
    text = report(copied("bert-cls")).read_text("utf-8")
    assert "featherbed verify --save" in text
    assert "<svg" not in text


def test_a_variant_that_failed_is_named_with_its_gate(verified: Path) -> None:
    path = verified / "reports" / "q4.json"
    evidence = json.loads(path.read_text("utf-8"))
    evidence["gates"] = [{"metric": "cos_min", "bound": 0.93, "value": None, "passed": False}]
    path.write_text(json.dumps(evidence), "utf-8")
    assert "<b>q4</b> cos_min: not finite, the gate is 0.93" in report(verified).read_text("utf-8")


def test_a_variant_whose_cosines_are_not_finite_is_not_drawn(verified: Path) -> None:
    path = verified / "reports" / "int8.json"
    evidence = json.loads(path.read_text("utf-8"))
    evidence["metrics"]["cos_min"] = None
    evidence["metrics"]["percentiles"] = dict.fromkeys(evidence["metrics"]["percentiles"])
    path.write_text(json.dumps(evidence), "utf-8")
    text = report(verified).read_text("utf-8")
    assert "int8: worst" not in text
    assert ">q4<" in text


def test_nines_count_the_nines() -> None:
    assert [round(nines(1 - 10.0**-n), 6) for n in range(1, 6)] == [1, 2, 3, 4, 5]
    assert nines(1) == nines(1 - 1e-9) == 6
    assert nines(0) == 0
    assert nines(-1) < 0


@given(st.floats(0, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_few_round_and_within(low: float, span: float) -> None:
    found = ticks(low, low + span)
    assert 3 <= len(found) <= 11
    assert all(low - span * 1e-6 <= value <= low + span * (1 + 1e-6) for value in found)


def test_an_axis_ends_where_it_says() -> None:
    axis = Axis(0, 10, 100, 200)
    assert [axis.at(value) for value in (-5, 0, 5, 10, 99)] == [100, 100, 150, 200, 200]


def test_the_front_joins_what_nothing_beats() -> None:
    dots = [Dot("a", 1, 0.9, True, ""), Dot("b", 2, 0.99, True, ""), Dot("c", 3, 0.95, True, "")]
    small = scatter(dots, "size", more_is_better=False)
    fast = scatter(dots, "speed", more_is_better=True)
    assert [len(re.findall("points=", one)) for one in (small, fast)] == [1, 1]
    assert small.count('class="on"') == 2  # a and b: c is larger than b and worse
    assert fast.count('class="on"') == 2  # b and c: a is slower and worse
    failing = [*dots, Dot("d", 0.5, 0.999, False, "")]
    assert scatter(failing, "size", more_is_better=False).count('class="on"') == 2  # a failed one beats nobody


def test_labels_do_not_lie_on_each_other() -> None:
    dots = [Dot(f"variant-{n}", 100 + n, 0.99 + n * 1e-4, True, "") for n in range(9)]
    found = re.findall(r'class="name" text-anchor="start" x="([\d.]+)" y="([\d.]+)">([^<]+)', scatter(dots, "x", False))
    spots = [(float(x), float(y), len(name)) for x, y, name in found]
    for at, (x, y, size) in enumerate(spots):
        for other, base, _ in spots[at + 1 :]:
            assert abs(x - other) > 6 * size or abs(y - base) >= 12


def test_harm_is_darker_where_it_is_more_and_layers_have_their_place() -> None:
    found = re.findall(r'x="([\d.]+)" y="([\d.]+)"[^>]*fill-opacity="([\d.]+)"', heat(HARMS, "4"))
    assert len(found) == 6
    by_place = sorted((float(x), float(shade)) for x, _, shade in found)
    shades = [shade for _, shade in by_place]
    assert shades == sorted(shades, reverse=True)
    assert (max(shades), min(shades)) == (1.0, 0.06)
    assert heat({"embeddings.weight": {"4": 0.1}}, "4") == ""


def test_a_box_stands_between_its_quartiles() -> None:
    drawn = boxes([Box("int8", 0.9, (0.95, 0.96, 0.97, 0.98, 0.99))])
    (box,) = re.findall(r'class="box" x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', drawn)
    (median,) = re.findall(r'class="median" x1="([\d.]+)"', drawn)
    assert float(box[0]) < float(median) < float(box[0]) + float(box[1])
