# SPDX-License-Identifier: Apache-2.0
"""Charts as inline SVG: no script, no network, and every value readable from the marks' ``data-`` attributes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from lightning_cl.metrics import TaskMatrix
from lightning_cl.report import display

_INK, _MUTED, _GRID = "#1b1f24", "#57606a", "#e5e8eb"


@dataclass
class Line:
    """One line of a chart.

    Attributes:
        name: its name in the legend.
        points: (x, y) in shown units.
        bands: x -> (low, high) in shown units.
        colour: ``#rrggbb``.
        dashed: whether the line is dashed.
        ring: the x of the point that is marked by a ring.
    """

    name: str
    points: list[tuple[float, float]]
    bands: dict[float, tuple[float, float]] = field(default_factory=dict)
    colour: str = display.COLOURS[0]
    dashed: bool = False
    ring: float | None = None


def heat_map(matrix: TaskMatrix) -> str:
    """The task matrix: a cell carries ``data-stage``, ``data-task``, ``data-value`` (the metric's own unit), ``-low``,
    ``-high`` and ``-rows``.
    """
    tasks = [*matrix.train_tasks, *matrix.probes]
    stages, known, shades = matrix.stages, matrix.scores(), display.shades(matrix)
    left, top, width, height = 30 + 7 * max((len(display.stage_label(matrix, s)) for s in stages), default=0), 8, 96, 46
    gap = 22 if matrix.probes and matrix.train_tasks else 0
    place = {task: left + i * width + (gap if task in matrix.probes else 0) for i, task in enumerate(tasks)}
    parts = []
    for row, stage in enumerate(stages):
        y = top + row * height
        parts.append(_text(left - 10, y + height / 2 + 4, display.stage_label(matrix, stage), anchor="end"))
        for task in tasks:
            score = known.get((stage, task))
            if score is None:
                parts.append(_text(place[task] + width / 2, y + height / 2 + 4, "-", fill=_MUTED))
                continue
            parts.append(
                _cell(matrix, stage, task, score, place[task], y, width, height, shades.get((stage, task), 0.0))
            )
    bottom = top + len(stages) * height
    for task in tasks:
        x = place[task] + width / 2
        role = " (probe)" if task in matrix.probes else ""
        metric = matrix.metrics.get(task, "score") + (" ↓" if matrix.mode_of(task) == "min" else "")
        parts.append(_text(x, bottom + 18, _short(task + role, 16), weight=600, title=task + role))
        parts.append(_text(x, bottom + 33, _short(metric, 17), size=10, fill=_MUTED))
        parts.append(_text(x, bottom + 47, f"{display.rows_of(matrix, task)} rows", size=10, fill=_MUTED))
    return _svg(left + len(tasks) * width + gap + 8, bottom + 56, parts, "heat-map", "Task matrix")


def chart(
    lines: Sequence[Line],
    ticks: Mapping[float, str] | None = None,
    label: str = "",
    width: int = 560,
    height: int = 250,
    legend: bool = True,
) -> str:
    """Lines over x; a point carries ``data-series``, ``data-x`` and ``data-y`` in shown units.

    Args:
        lines: what to draw.
        ticks: labels on the x axis by position; default: round numbers.
        label: what the y axis shows.
        width: of the picture in pixels, with the legend.
        height: of the picture in pixels.
        legend: whether names stand at the right.
    """
    lines = [_finite(line) for line in lines]
    values = [y for line in lines for _, y in line.points]
    values += [end for line in lines for band in line.bands.values() for end in band]
    # All ticks lie inside, also those of stages at which nothing was measured.
    xs = [*(x for line in lines for x, _ in line.points), *(ticks or ())] or [0.0]
    marks = _round_ticks(min(values, default=0.0), max(values, default=1.0))
    low, high = marks[0], marks[-1]
    legend_width = 44 + 7 * max((min(len(line.name), 24) for line in lines), default=0) if legend else 10
    left, right, top = 58, width - legend_width, 28
    tilted = ticks is not None and len(ticks) > 1 and max(map(len, ticks.values())) * 6.5 * len(ticks) > right - left
    bottom = height - (54 if tilted else 34)
    first, last = min(xs), max(xs)

    def at_x(x: float) -> float:
        return left + 12 + (right - left - 24) * ((x - first) / (last - first) if last > first else 0.5)

    def at_y(y: float) -> float:
        return bottom - (bottom - top) * (y - low) / (high - low)

    parts = []
    for mark in marks:
        parts.append(f'<line x1="{left}" x2="{right}" y1="{at_y(mark):.2f}" y2="{at_y(mark):.2f}" stroke="{_GRID}"/>')
        parts.append(_text(left - 6, at_y(mark) + 4, f"{mark:g}", anchor="end", size=10, fill=_MUTED))
    round_marks = {mark: f"{mark:g}" for mark in _round_ticks(first, last) if first <= mark <= last}
    for x, name in (ticks or round_marks).items():
        turn = f' transform="rotate(-28 {at_x(x):.1f} {bottom + 14})"' if tilted else ""
        anchor = "end" if tilted else "middle"
        parts.append(_text(at_x(x), bottom + 17, _short(name, 16), size=10, fill=_MUTED, anchor=anchor, more=turn))
    parts.append(_text(8, 12, label, anchor="start", size=11, fill=_MUTED))
    for line in lines:
        parts.append(_drawn(line, at_x, at_y))
    for row, line in enumerate(lines if legend else ()):
        parts.append(_named(line, right + 8, top + 8 + 17 * row))
    return _svg(width, max(height, top + 17 * len(lines) + 8 if legend else 0), parts, "chart", label)


def legend(lines: Sequence[Line], width: int = 1100) -> str:
    """Looks and names of lines that several charts share.

    Args:
        lines: the lines; their points do not matter.
        width: of the picture in pixels; names that do not fit go into another row.
    """
    parts, x, y = [], 0, 12
    for line in lines:
        needed = 44 + 7 * min(len(line.name), 24)
        if x and x + needed > width:
            x, y = 0, y + 20
        parts.append(_named(line, x, y))
        x += needed
    return _svg(width, y + 12, parts, "legend", "Legend")


def bars(rows: Mapping[str, Mapping[str, float]], kinds: Sequence[str], unit: str, width: int = 760) -> str:
    """Stacked horizontal bars; a piece carries ``data-row``, ``data-part`` and ``data-value``.

    Args:
        rows: row -> part -> value.
        kinds: the parts in the order in which they are stacked.
        unit: unit of the values, as it is written.
        width: of the picture in pixels.
    """
    colours = dict(zip(kinds, display.COLOURS, strict=False))
    left, thick = 30 + 7 * max((min(len(row), 26) for row in rows), default=0), 24
    total = max((sum(values.values()) for values in rows.values()), default=0.0) or 1.0
    scale = (width - left - 90) / total
    parts = []
    for index, part in enumerate(kinds):
        start = left + index * 150
        parts.append(f'<rect x="{start}" y="4" width="11" height="11" fill="{colours[part]}"/>')
        parts.append(_text(start + 16, 14, part, anchor="start", size=11))
    for index, (row, values) in enumerate(rows.items()):
        y, x = 26 + index * (thick + 6), float(left)
        parts.append(_text(left - 10, y + thick / 2 + 4, _short(row, 26), anchor="end"))
        for part in kinds:
            if part not in values:
                continue
            value = values[part]
            parts.append(
                f'<rect class="bar" x="{x:.2f}" y="{y}" width="{value * scale:.2f}" height="{thick}" fill="{colours[part]}"'
                f' data-row="{escape(row)}" data-part="{escape(part)}" data-value="{value!r}">'
                f"<title>{escape(row)}, {escape(part)}: {value:.4g} {unit}</title></rect>"
            )
            x += value * scale
        parts.append(_text(x + 8, y + thick / 2 + 4, f"{sum(values.values()):.3g} {unit}", anchor="start", size=11))
    return _svg(width, 30 + len(rows) * (thick + 6), parts, "bars", "Cost")


def confusion(counts: Mapping[str, Mapping[str, int]], columns: Sequence[str]) -> str:
    """Where samples were sent: a row per task, shares of the row; a cell carries ``data-task``, ``-sent``, ``-count``."""
    left, width, height = 30 + 7 * max((len(task) for task in counts), default=0), 84, 34
    parts = []
    for column, name in enumerate(columns):
        parts.append(_text(left + (column + 0.5) * width, 16, _short(name, 13), weight=600, title=name))
    for row, (task, sent) in enumerate(counts.items()):
        y, total = 26 + row * height, sum(sent.values()) or 1
        parts.append(_text(left - 10, y + height / 2 + 4, task, anchor="end"))
        for column, name in enumerate(columns):
            count = sent.get(name, 0)
            ink = "#ffffff" if count / total > 0.55 else _INK
            x = left + column * width
            parts.append(
                f'<g class="cell" data-task="{escape(task)}" data-sent="{escape(name)}" data-count="{count}">'
                f"<title>{count} of {total} samples of {escape(task)} went to {escape(name)}</title>"
                f'<rect x="{x}" y="{y}" width="{width - 2}" height="{height - 2}" fill="{display.ramp(count / total)}"/>'
                f"{_text(x + width / 2, y + height / 2 + 4, f'{100 * count / total:.1f} %', fill=ink)}</g>"
            )
    return _svg(left + len(columns) * width + 8, 34 + len(counts) * height, parts, "confusion", "Routing confusion")


def _cell(
    matrix: TaskMatrix, stage: int, task: str, score: Any, x: float, y: float, width: float, height: float, shade: float
) -> str:
    scale, ink = display.scale_of(matrix, task), "#ffffff" if shade > 0.55 else _INK
    low, high = score.interval or ("", "")
    text = display.number(score.value, scale)
    ends = display.interval(score.interval, scale)
    learnt = 0 <= stage < len(matrix.train_tasks) and matrix.train_tasks[stage] == task
    frame = ""
    if learnt:
        frame = (
            f'<rect x="{x + 3}" y="{y + 3}" width="{width - 8}" height="{height - 8}" fill="none"'
            f' stroke="{display.COLOURS[1]}" stroke-width="2"/>'
        )
    small = _text(x + width / 2 - 1, y + height / 2 + 15, ends, size=9, fill=ink) if ends else ""
    return (
        f'<g class="cell" data-stage="{stage}" data-task="{escape(task)}" data-value="{score.value!r}" data-low="{low}"'
        f' data-high="{high}" data-rows="{"" if score.rows is None else score.rows}">'
        f"<title>{escape(task)}, {escape(display.stage_label(matrix, stage))}: {text} {ends}</title>"
        f'<rect x="{x}" y="{y}" width="{width - 2}" height="{height - 2}" fill="{display.ramp(shade)}"/>{frame}'
        f"{_text(x + width / 2 - 1, y + height / 2 + (1 if ends else 4), text, size=13, fill=ink)}{small}</g>"
    )


def _named(line: Line, x: float, y: float) -> str:
    dash = ' stroke-dasharray="6 4"' if line.dashed else ""
    stroke = f'<line x1="{x}" x2="{x + 16}" y1="{y}" y2="{y}" stroke="{line.colour}" stroke-width="2.5"{dash}/>'
    return stroke + _text(x + 21, y + 4, _short(line.name, 24), anchor="start", size=11)


def _drawn(line: Line, at_x: Any, at_y: Any) -> str:
    parts = []
    banded = [(x, *line.bands[x]) for x, _ in line.points if x in line.bands]
    if len(banded) > 1:
        there = " ".join(f"{at_x(x):.2f},{at_y(high):.2f}" for x, _, high in banded)
        back = " ".join(f"{at_x(x):.2f},{at_y(low):.2f}" for x, low, _ in reversed(banded))
        parts.append(f'<polygon points="{there} {back}" fill="{line.colour}" fill-opacity="0.10"/>')
    path = " ".join(f"{at_x(x):.2f},{at_y(y):.2f}" for x, y in line.points)
    dash = ' stroke-dasharray="6 4"' if line.dashed else ""
    parts.append(f'<polyline points="{path}" fill="none" stroke="{line.colour}" stroke-width="2"{dash}/>')
    many = len(line.points) > 40
    for x, y in line.points:
        ring = line.ring is not None and x == line.ring
        radius, fill = (5.0, "#ffffff") if ring else (0.9 if many else 3.0, line.colour)
        parts.append(
            f'<circle cx="{at_x(x):.2f}" cy="{at_y(y):.2f}" r="{radius}" fill="{fill}" stroke="{line.colour}"'
            f' stroke-width="{1.8 if ring else 0}" data-series="{escape(line.name)}" data-x="{x:g}" data-y="{y!r}">'
            f"<title>{escape(line.name)}: {y:.4g}</title></circle>"
        )
    return "".join(parts)


def _finite(line: Line) -> Line:
    points = [(x, y) for x, y in line.points if math.isfinite(y)]
    return Line(line.name, points, line.bands, line.colour, line.dashed, line.ring)


def _round_ticks(low: float, high: float) -> list[float]:
    """About five round numbers that enclose the range."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _text(
    x: float,
    y: float,
    text: str,
    anchor: str = "middle",
    size: int = 12,
    fill: str = _INK,
    weight: int = 400,
    title: str = "",
    more: str = "",
) -> str:
    hint = f"<title>{escape(title)}</title>" if title and title != text else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}"'
        f' fill="{fill}"{more}>{hint}{escape(text)}</text>'
    )


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _svg(width: float, height: float, parts: Sequence[str], kind: str, label: str) -> str:
    return (
        f'<svg class="{kind}" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}"'
        f' width="{width:.0f}" height="{height:.0f}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )
