"""Curves as a small SVG by hand: one panel a figure, one line a contestant, so that no plotting library is needed."""

from collections.abc import Mapping
from html import escape
from pathlib import Path

Curves = Mapping[str, Mapping[str, list[float | None]]]
PANELS = (
    "normalized entropy",
    "hit rate at 10",
    "hit rate at 50",
    "hit rate at 10, common",
    "id has its own row",
    "occupancy",
    "evictions",
)
COLOURS = ("#9e9e9e", "#8d6e63", "#000000", "#d32f2f", "#f57c00", "#1976d2", "#7b1fa2", "#388e3c", "#00838f", "#c0ca33")
WIDTH, HEIGHT, LEFT, TOP = 460, 200, 52, 40
ACROSS = 2


def curves(path: Path, title: str, given: Curves) -> None:
    """given: contestant -> figure -> values, evenly along the stream. Panels without any values are left out."""
    panels = [name for name in PANELS if any(_points(lines.get(name, [])) for lines in given.values())]
    down = -(-len(panels) // ACROSS)
    width, height = ACROSS * (WIDTH + LEFT) + 20, TOP + down * (HEIGHT + TOP) + 20 * (1 + len(given) // 5)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="18" font-size="14">{escape(title)}</text>',
    ]
    for number, panel in enumerate(panels):
        x, y = LEFT + number % ACROSS * (WIDTH + LEFT), TOP + 10 + number // ACROSS * (HEIGHT + TOP)
        parts += _panel(panel, {name: lines[panel] for name, lines in given.items() if panel in lines}, [*given], x, y)
    for number, name in enumerate(given):
        x, y = LEFT + number % 5 * 190, TOP + down * (HEIGHT + TOP) + 10 + number // 5 * 18
        parts.append(f'<rect x="{x}" y="{y - 9}" width="14" height="10" fill="{_colour(number)}"/>')
        parts.append(f'<text x="{x + 20}" y="{y}">{escape(name)}</text>')
    path.write_text("\n".join([*parts, "</svg>"]) + "\n")


def _panel(title: str, lines: Mapping[str, list[float | None]], order: list[str], x: int, y: int) -> list[str]:
    values = [value for line in lines.values() for _, value in _points(line)]
    low, high = min(values), max(values)
    if title == "normalized entropy":  # the first steps, before anything is learned, would flatten the rest
        high = min(high, sorted(values)[int(0.98 * len(values))])
    span = (high - low) or 1.0
    parts = [
        f'<text x="{x}" y="{y - 6}">{escape(title)}</text>',
        f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#cccccc"/>',
        f'<text x="{x - 4}" y="{y + 9}" text-anchor="end">{high:.3g}</text>',
        f'<text x="{x - 4}" y="{y + HEIGHT}" text-anchor="end">{low:.3g}</text>',
    ]
    for name, line in lines.items():
        at = [
            f"{x + place * WIDTH:.1f},{y + HEIGHT - HEIGHT * (min(value, high) - low) / span:.1f}"
            for place, value in _points(line)
        ]
        parts.append(f'<polyline points="{" ".join(at)}" fill="none" stroke="{_colour(order.index(name))}"/>')
    return parts


def _points(line: list[float | None]) -> list[tuple[float, float]]:
    """(place from 0 to 1, value) of what exists."""
    last = max(1, len(line) - 1)
    return [(n / last, value) for n, value in enumerate(line) if value is not None]


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]
