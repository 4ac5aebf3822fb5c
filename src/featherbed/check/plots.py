"""Figures as SVG without script or font: circles, boxes and a heat map, in the colours of the page they stand in."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, WIDE = 480, 320, 760
LEFT, RIGHT, TOP, BOTTOM = 58, 18, 14, 46
CLOSEST = 1e-6  # 1 − cosine that is drawn as none
LEAST = 1e-12  # harm that is drawn as none
LABEL = 13  # height of a label's line
LAYER = re.compile(r"(?:^|\.)layers?\.(\d+)\.(.+?)(?:\.weight)?$")


@dataclass(frozen=True)
class Dot:
    """A variant in a scatter: where, whether its gates held, what a pointer over it reads."""

    name: str
    x: float
    cosine: float
    passed: bool
    words: str


@dataclass(frozen=True)
class Box:
    """A variant's cosines: the worst, and those below which 5, 25, 50, 75 and 95 per cent of the texts lie."""

    name: str
    worst: float
    percentiles: tuple[float, float, float, float, float]


@dataclass(frozen=True)
class Axis:
    """From values to the paper: ``low`` stands at ``start``, ``high`` at ``end``."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Where a value stands; values beyond an end stand there."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def nines(cosine: float) -> float:
    """−log10(1 − cosine): 0.99 is 2, 0.999 is 3; at most 6."""
    return -math.log10(max(1 - cosine, CLOSEST))


def ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers between two."""
    span = high - low
    step = 10 ** math.floor(math.log10(span))
    step = next(step * part for part in (1, 0.5, 0.25, 0.2, 0.1) if span / (step * part) >= 3.5)
    first = math.ceil(low / step - 1e-9)
    return [step * at for at in range(first, math.floor(high / step + 1e-9) + 1)]


def scatter(dots: Sequence[Dot], across: str, more_is_better: bool) -> str:
    """Worst cosine, in nines, against something: the front joined, every dot named beside it."""
    x = Axis(0, max(dot.x for dot in dots) * 1.12, LEFT, WIDTH - RIGHT)
    y = _nines_axis([dot.cosine for dot in dots], HEIGHT - BOTTOM, TOP)
    parts = _nines_grid(y, LEFT, WIDTH - RIGHT)
    parts += [
        _text("tick", x.at(value), HEIGHT - BOTTOM + 17, f"{value:g}", "middle") for value in ticks(x.low, x.high)
    ]
    parts.append(_text("label", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, across, "middle"))
    spots = {dot.name: (x.at(dot.x), y.at(nines(dot.cosine))) for dot in dots}
    front = _front(dots, more_is_better)
    line = " ".join("{:.1f},{:.1f}".format(*spots[dot.name]) for dot in front)
    parts.append(f'<polyline class="front" points="{line}"/>')
    placed: list[tuple[float, float, float]] = []
    for dot in sorted(dots, key=lambda d: -d.cosine):
        across_at, up_at = spots[dot.name]
        kind = "failed" if not dot.passed else "on" if dot in front else "off"
        title = f"<title>{escape(dot.words)}</title>"
        parts.append(f'<circle class="{kind}" cx="{across_at:.1f}" cy="{up_at:.1f}" r="5">{title}</circle>')
        others = [spot for name, spot in spots.items() if name != dot.name]
        parts.append(_label(dot.name, spots[dot.name], placed, others))
    return _svg(HEIGHT, parts, f"worst cosine against {across}")


def _front(dots: Sequence[Dot], more_is_better: bool) -> list[Dot]:
    """Dots whose gates held and that no other such one beats or equals in both, from left to right."""
    side = 1 if more_is_better else -1
    dots = [dot for dot in dots if dot.passed]

    def beaten(dot: Dot) -> bool:
        better = [other for other in dots if other.x * side >= dot.x * side and other.cosine >= dot.cosine]
        return any((other.x, other.cosine) != (dot.x, dot.cosine) for other in better)

    return sorted((dot for dot in dots if not beaten(dot)), key=lambda dot: dot.x)


def _label(
    name: str,
    spot: tuple[float, float],
    placed: list[tuple[float, float, float]],
    others: Sequence[tuple[float, float]],
) -> str:
    """The name beside its dot, at the first of some places where nothing else is."""
    width = 6.4 * len(name)
    left_of, middle = -9 - width, -width / 2
    tries = [(9, 4), (left_of, 4), (middle, -9), (middle, 18), (9, -8), (9, 15), (left_of, -8), (left_of, 15)]
    tries += [(middle, -22), (middle, 31), (9, -20), (9, 27)]
    tries += [(side, 4 + up * LABEL * away) for away in range(2, 12) for up in (-1, 1) for side in (14, left_of - 5)]

    def free(dx: float, dy: float) -> bool:
        left, base = spot[0] + dx, spot[1] + dy
        if left < 4 or left + width > WIDTH - 4 or base < LABEL or base > HEIGHT - BOTTOM - 2:
            return False
        over = any(left < end and left + width > start and abs(base - other) < LABEL for start, end, other in placed)
        return not over and not any(left - 6 < x < left + width + 6 and base - 15 < y < base + 6 for x, y in others)

    dx, dy = next((one for one in tries if free(*one)), tries[0])
    left, base = spot[0] + dx, spot[1] + dy
    placed.append((left, left + width, base))
    if abs(dy - 4) <= 2 * LABEL:
        return _text("name", left, base, name)
    end = left - 2 if dx > 0 else left + width + 2
    line = f'<line class="leader" x1="{spot[0]:.1f}" y1="{spot[1]:.1f}" x2="{end:.1f}" y2="{base - 4:.1f}"/>'
    return line + _text("name", left, base, name)


def boxes(rows: Sequence[Box]) -> str:
    """A row a variant: a line from its worst cosine to the 95th percentile, a box of the middle half, its median."""
    pitch, left, width = 30, 120, WIDE
    height = TOP + pitch * len(rows) + BOTTOM
    x = _nines_axis([value for row in rows for value in (row.worst, row.percentiles[-1])], left, width - RIGHT)
    parts = _nines_grid(x, TOP, height - BOTTOM, upright=True)
    parts.append(_text("label", (left + width) / 2, height - 8, "cosine to fp32", "middle"))
    for at, row in enumerate(rows):
        middle = TOP + pitch * (at + 0.5)
        five, low, median, high, top = (x.at(nines(value)) for value in row.percentiles)
        worst = x.at(nines(row.worst))
        words = f"{row.name}: worst {row.worst:.5f}, median {row.percentiles[2]:.5f}"
        parts += [
            _text("name", left - 12, middle + 4, row.name, "end"),
            f"<g><title>{escape(words)}</title>",
            f'<line class="whisker" x1="{worst:.1f}" x2="{top:.1f}" y1="{middle}" y2="{middle}"/>',
            f'<line class="whisker" x1="{five:.1f}" x2="{five:.1f}" y1="{middle - 4}" y2="{middle + 4}"/>',
            f'<rect class="box" x="{low:.1f}" y="{middle - 8}" width="{max(high - low, 1.5):.1f}" height="16" rx="2"/>',
            f'<line class="median" x1="{median:.1f}" x2="{median:.1f}" y1="{middle - 8}" y2="{middle + 8}"/>',
            f'<circle class="worst" cx="{worst:.1f}" cy="{middle}" r="3.5"/></g>',
        ]
    return _svg(height, parts, "cosines of each variant's texts to fp32", width)


def heat(harms: Mapping[str, Mapping[str, float]], level: str) -> str:
    """What rounding each weight to ``level`` bits takes from the embedding: layers across, kinds of weights down."""
    cells = {m.group(2, 1): row[level] for name, row in harms.items() if (m := LAYER.search(name)) and level in row}
    if not cells:
        return ""
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    layers = sorted({int(layer) for _, layer in cells})
    low, high = (math.log10(max(edge, LEAST)) for edge in (min(cells.values()), max(cells.values())))
    left, pitch, top = 190, 26, 24
    step = min(60.0, (WIDE - left - RIGHT) / len(layers))
    shown = [(at, layer) for at, layer in enumerate(layers) if step >= 18 or layer % 4 == 0]
    parts = [_text("tick", left + step * (at + 0.5), top - 8, f"{layer}", "middle") for at, layer in shown]
    for down, kind in enumerate(kinds):
        y = top + pitch * down
        parts.append(_text("name", left - 10, y + pitch / 2 + 4, kind, "end"))
        for at, layer in enumerate(layers):
            harm = cells.get((kind, str(layer)))
            if harm is not None:
                share = (math.log10(max(harm, LEAST)) - low) / (high - low) if high > low else 1.0
                title = f"<title>layer {layer}, {escape(kind)}: {harm:.1e}</title>"
                place = f'x="{left + step * at:.1f}" y="{y}" width="{step - 2:.1f}" height="{pitch - 2}"'
                parts.append(f'<rect class="cell" {place} fill-opacity="{0.06 + 0.94 * share:.3f}">{title}</rect>')
    return _svg(top + pitch * len(kinds) + 6, parts, f"harm of rounding each weight to {level} bits", WIDE)


def _nines_axis(cosines: Sequence[float], start: float, end: float) -> Axis:
    low = min(nines(cosine) for cosine in cosines)
    high = max(nines(cosine) for cosine in cosines)
    return Axis(low - 0.25, max(high, low + 1) + 0.2, start, end)


def _round_cosines(axis: Axis) -> Iterator[tuple[float, str]]:
    """Nines and how they are written: 0.9, 0.99 and so on, with 0.95 and 0.98 between where there is room."""
    between = (1.0, 0.5, 0.2) if axis.high - axis.low <= 3.2 else (1.0,)
    for exponent in range(1, 6):
        for share in between:
            yield nines(1 - share * 10.0**-exponent), f"{1 - share * 10.0**-exponent:.{exponent + (share != 1.0)}f}"
    yield nines(1), "1"


def _nines_grid(axis: Axis, first: float, last: float, upright: bool = False) -> list[str]:
    parts = []
    for value, words in _round_cosines(axis):
        if axis.low <= value <= axis.high:
            at = axis.at(value)
            if upright:
                parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{first}" y2="{last}"/>')
                parts.append(_text("tick", at, last + 17, words, "middle"))
            else:
                parts.append(f'<line class="grid" x1="{first}" x2="{last}" y1="{at:.1f}" y2="{at:.1f}"/>')
                parts.append(_text("tick", first - 7, at + 4, words, "end"))
    return parts


def _text(kind: str, x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" text-anchor="{anchor}" x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>'


def _svg(height: float, parts: Sequence[str], label: str, width: float = WIDTH) -> str:
    inside = "\n".join(parts)
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">\n{inside}\n</svg>'
