"""The report in a real browser: light, dark, on a phone and printed, of the committed evidence of all-MiniLM-L6-v2.

The evidence is what featherbed wrote; by hand are the model's name and the folder before "en.dev.jsonl", and tune.json
is of another build of the same model.

make browser        these tests; needs Chromium
make screenshots    the same, and docs/img/report-*.png anew
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Browser, FloatRect, Page, sync_playwright

from featherbed.check.page import page
from featherbed.folder import open_folder

EVIDENCE = Path(__file__).parent / "evidence"
IMAGES = Path(__file__).parents[2] / "docs" / "img"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
Scheme = Literal["light", "dark"]
SCHEMES: tuple[Scheme, ...] = ("light", "dark")
KEEP = "SCREENSHOTS"  # set by make screenshots
NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    assert path, f"expected Chromium ({', '.join(NAMES)}) on the PATH or in CHROMIUM, found none; install it"
    with sync_playwright() as running:
        started = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(page(open_folder(EVIDENCE)), "utf-8")
    return path


def opened(browser: Browser, path: Path, size: dict[str, int], scheme: Scheme = "light") -> Page:
    """The page at a size and in a theme; anything that it logs or fetches fails the test."""
    tab = browser.new_page(viewport={"width": size["width"], "height": size["height"]}, color_scheme=scheme)
    noise: list[str] = []
    tab.on("console", lambda message: noise.append(message.text))
    tab.on("pageerror", lambda error: noise.append(str(error)))
    tab.on("request", lambda request: noise.append(request.url) if request.url != path.as_uri() else None)
    tab.goto(path.as_uri())
    assert noise == []
    return tab


def pixel_size(image: Path) -> tuple[int, int]:
    """Width and height, as a PNG's header has them."""
    width, height = struct.unpack(">II", image.read_bytes()[16:24])
    return width, height


def shot(tab: Page, name: str, tmp_path: Path, height: int) -> Path:
    """The top of the page as a PNG, among the docs' pictures when that was asked for."""
    path = (IMAGES if os.environ.get(KEEP) else tmp_path) / name
    assert tab.viewport_size is not None
    area = FloatRect(x=0, y=0, width=tab.viewport_size["width"], height=height)
    tab.screenshot(path=path, full_page=True, clip=area)
    return path


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_nothing_is_wider_than_the_window(browser: Browser, written: Path, size: dict[str, int]) -> None:
    tab = opened(browser, written, size)
    assert tab.evaluate("document.documentElement.scrollWidth") <= size["width"]


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_every_figure_and_table_can_be_seen(browser: Browser, written: Path, size: dict[str, int]) -> None:
    tab = opened(browser, written, size)
    figures = tab.locator("figure svg").all()
    assert len(figures) >= 5
    for figure in figures:
        box = figure.bounding_box()
        assert box is not None
        assert box["width"] >= 300
        assert box["height"] >= 80
    assert tab.locator("section h2").count() >= 6


def test_no_label_of_a_figure_leaves_it(browser: Browser, written: Path) -> None:
    tab = opened(browser, written, DESKTOP)
    outside = tab.evaluate(
        """() => [...document.querySelectorAll('svg text')].filter(text => {
            const inner = text.getBoundingClientRect(), outer = text.ownerSVGElement.getBoundingClientRect();
            return inner.left < outer.left - 1 || inner.right > outer.right + 1
                || inner.top < outer.top - 1 || inner.bottom > outer.bottom + 1;
        }).map(text => text.textContent)"""
    )
    assert outside == []


def test_no_two_names_of_a_figure_lie_on_each_other(browser: Browser, written: Path) -> None:
    tab = opened(browser, written, DESKTOP)
    pairs = tab.evaluate(
        """() => [...document.querySelectorAll('.figures svg')].flatMap(svg => {
            const names = [...svg.querySelectorAll('.name')].map(n => [n.textContent, n.getBoundingClientRect()]);
            return names.flatMap(([a, x], at) => names.slice(at + 1).filter(([, y]) =>
                x.left < y.right - 1 && y.left < x.right - 1 && x.top < y.bottom - 4 && y.top < x.bottom - 4
            ).map(([b]) => a + ' on ' + b));
        })"""
    )
    assert pairs == []


@pytest.mark.parametrize("scheme", SCHEMES)
def test_text_stands_out_from_its_ground_in_both_themes(browser: Browser, written: Path, scheme: Scheme) -> None:
    """Contrast of at least 4.5 to 1, as WCAG 2.2 AA wants it, for text, notes, verdicts and figures' labels."""
    tab = opened(browser, written, DESKTOP, scheme)
    ratios = tab.evaluate(
        """() => {
            const light = colour => {
                const parts = colour.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
                    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
            };
            const ground = light(getComputedStyle(document.body).backgroundColor);
            return ['body', '.note', '.good', 'th', 'svg .tick', 'svg .name'].map(name => {
                const style = getComputedStyle(document.querySelector(name));
                const ink = light(name.startsWith('svg') ? style.fill : style.color);
                return [name, (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05)];
            });
        }"""
    )
    assert {name: ratio for name, ratio in ratios if ratio < 4.5} == {}


def test_dark_is_dark(browser: Browser, written: Path) -> None:
    grounds = [
        opened(browser, written, DESKTOP, scheme).evaluate("getComputedStyle(document.body).backgroundColor")
        for scheme in SCHEMES
    ]
    assert grounds[0] != grounds[1]


def test_the_worst_texts_open_on_a_click(browser: Browser, written: Path) -> None:
    tab = opened(browser, written, PHONE)
    first = tab.locator("details").first
    assert not first.locator(".text").first.is_visible()
    first.locator("summary").click()
    assert first.locator(".text").first.is_visible()


def test_it_prints_on_a_few_pages(browser: Browser, written: Path) -> None:
    tab = opened(browser, written, DESKTOP)
    pdf = tab.pdf(format="A4", print_background=False)
    assert 2 <= pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") <= 8


def test_pictures_of_the_docs_are_of_this_page(browser: Browser, written: Path, tmp_path: Path) -> None:
    desktop = shot(opened(browser, written, DESKTOP), "report-desktop.png", tmp_path, 1500)
    phone = shot(opened(browser, written, PHONE), "report-phone.png", tmp_path, 1700)
    dark = shot(opened(browser, written, DESKTOP, "dark"), "report-dark.png", tmp_path, 1500)
    for image in (desktop, phone, dark):
        assert pixel_size(image) == pixel_size(IMAGES / image.name)
