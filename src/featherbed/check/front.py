"""The trials of a search, drawn: size against the worst cosine, speed by the circles' area, the front joined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from featherbed.report import Bound

WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 30, 40, 60
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #333 } .title { font-size: 15px; font-weight: 600 }
.axis { stroke: #999 } .grid { stroke: #e5e5e5 } .bound { stroke: #c33; stroke-dasharray: 5 4 } .of { fill: #c33 }
.front { fill: none; stroke: #2563a8; stroke-width: 1.5 } .off { fill: #bbb } .on { fill: #2563a8 }
.best { fill: #e08a00 } circle { fill-opacity: .8; stroke: #fff }
"""


def front_of(trials: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Keys of the trials that no other one beats or equals in size, speed and worst cosine at once, by size."""

    def figures(key: str) -> tuple[float, float, float]:
        trial = trials[key]
        return -trial["size_mb"], trial["tokens_per_s"], trial["cos_min"]

    def beaten(key: str) -> bool:
        mine = figures(key)
        others = (figures(other) for other in trials if other != key)
        return any(all(b >= a for a, b in zip(mine, other, strict=True)) and other != mine for other in others)

    return sorted((key for key in trials if not beaten(key)), key=lambda key: float(trials[key]["size_mb"]))


def front_svg(
    trials: Mapping[str, Mapping[str, Any]], front: Sequence[str], winner: str | None, bounds: Sequence[Bound]
) -> str:
    """The picture, as SVG: it needs no font and no script."""
    across = _Scale([t["size_mb"] for t in trials.values()], LEFT, WIDTH - RIGHT)
    up = _Scale([t["cos_min"] for t in trials.values()], HEIGHT - BOTTOM, TOP + 20)
    fastest = max(t["tokens_per_s"] for t in trials.values())
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text class="title" x="{LEFT}" y="24">Mixed recipes: size, worst cosine, speed (area)</text>',
        *_axes(across, up),
    ]
    for bound in bounds:
        if bound.metric == "cos_min" and up.low <= bound.value <= up.high:
            y = up.at(bound.value)
            parts.append(f'<line class="bound" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="of" x="{LEFT + 6}" y="{y - 5:.1f}">cos_min ≥ {bound.value:g}</text>')
    line = " ".join(f"{across.at(trials[k]['size_mb']):.1f},{up.at(trials[k]['cos_min']):.1f}" for k in _rising(trials))
    parts.append(f'<polyline class="front" points="{line}"/>')
    for key, trial in trials.items():
        kind = "best" if key == winner else "on" if key in front else "off"
        x, y = across.at(trial["size_mb"]), up.at(trial["cos_min"])
        radius = 3 + 8 * (trial["tokens_per_s"] / fastest) ** 0.5
        words = f"{trial['size_mb']:.1f} MB, worst {trial['cos_min']:.4f}, {trial['tokens_per_s']:.0f} tokens/s"
        parts.append(
            f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"><title>{escape(words)}</title>'
        )
        parts.append("</circle>")
        if key == winner:
            side, shift = ("end", -14) if x > WIDTH / 2 else ("start", 14)
            below = -14 if y > HEIGHT - BOTTOM - 40 else 18  # not onto the axis
            text = f'<text x="{x + shift:.1f}" y="{y + below:.1f}" text-anchor="{side}">'
            parts.append(f"{text}tuned: {escape(words)}</text>")
    return "\n".join([*parts, "</svg>\n"])


def _rising(trials: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Trials by size, each better in its worst cosine than all smaller ones."""
    kept: list[str] = []
    for key in sorted(trials, key=lambda k: (trials[k]["size_mb"], -trials[k]["cos_min"])):
        if not kept or trials[key]["cos_min"] > trials[kept[-1]]["cos_min"]:
            kept.append(key)
    return kept


class _Scale:
    """Values onto pixels, with round marks."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        low, high = min(values), max(values)
        room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        self.low, self.high, self.start, self.end = low - room, high + room, start, end

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def marks(self) -> list[float]:
        rough = (self.high - self.low) / 6
        power = 10 ** _floor_log(rough)
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
        first = int(self.low / step) + (1 if self.low > 0 else 0)
        marks = [k * step for k in range(first, first + 12)]
        return [mark for mark in marks if self.low <= mark <= self.high]


def _floor_log(value: float) -> int:
    power = 0
    while 10.0**power > value:
        power -= 1
    while 10.0 ** (power + 1) <= value:
        power += 1
    return power


def _axes(across: _Scale, up: _Scale) -> list[str]:
    bottom, parts = HEIGHT - BOTTOM, []
    for mark in across.marks():
        x = across.at(mark)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{mark:g}</text>')
    for mark in up.marks():
        y = up.at(mark)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{mark:.6g}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{LEFT}" y1="{TOP}" y2="{bottom}"/>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 14}" text-anchor="middle">MB on disk</text>')
    parts.append(f'<text x="16" y="{TOP - 4}">worst cosine to fp32</text>')
    return parts
