"""The front of a search, and its picture."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

from featherbed.check.front import front_of, front_svg
from featherbed.report import Bound


def trial(size: float, speed: float, worst: float) -> dict[str, Any]:
    return {"size_mb": size, "tokens_per_s": speed, "cos_min": worst}


TRIALS = {
    "small": trial(10, 100, 0.90),
    "fast": trial(20, 300, 0.95),
    "beaten": trial(21, 200, 0.94),
    "faithful": trial(30, 150, 0.99),
}


def test_the_front_has_what_nobody_equals_in_everything() -> None:
    assert front_of(TRIALS) == ["small", "fast", "faithful"]


def test_equal_trials_are_both_on_the_front() -> None:
    assert front_of({"one": trial(1, 1, 0.5), "two": trial(1, 1, 0.5)}) == ["one", "two"]


def test_the_picture_is_xml_with_a_circle_a_trial_inside_its_frame() -> None:
    root = ElementTree.fromstring(front_svg(TRIALS, front_of(TRIALS), "fast", [Bound("cos_min", 0.93)]))
    width, height = (float(n) for n in root.attrib["viewBox"].split()[2:])
    circles = [e for e in root.iter() if e.tag.endswith("circle")]
    assert sorted(c.attrib["class"] for c in circles) == ["best", "off", "on", "on"]
    for circle in circles:
        assert 0 < float(circle.attrib["cx"]) < width
        assert 0 < float(circle.attrib["cy"]) < height
    words = "".join(root.itertext())
    assert "tuned: 20.0 MB" in words
    assert "cos_min ≥ 0.93" in words


def test_a_single_trial_can_be_drawn() -> None:
    ElementTree.fromstring(front_svg({"one": trial(1, 1, 0.5)}, ["one"], None, []))
