# SPDX-License-Identifier: Apache-2.0
"""Plots of task matrices with matplotlib, without its global state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_cl.metrics import TaskMatrix
from lightning_cl.report import display

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Beyond this many cells their numbers could not be read, and drawing them would take longer than a small task.
_MOST_CELLS = 400


def heat_map(matrix: TaskMatrix, title: str = "Task matrix") -> Figure:
    """The matrix as a heat map: a row per stage, a column per task, darker is better within a kind of metric.

    The cell of the task just learnt is framed; probes stand apart at the right.
    """
    stages, tasks, probes = matrix.stages, matrix.train_tasks, matrix.probes
    gap = 0.35 if probes and tasks else 0.0
    columns = {task: j + (gap if task in probes else 0.0) for j, task in enumerate([*tasks, *probes])}
    figure = _figure(1.6 + 1.15 * max(len(columns), 2), 1.5 + 0.55 * max(len(stages), 2))
    axes = figure.add_subplot()
    shades = display.shades(matrix)
    from matplotlib.patches import Rectangle

    known = matrix.scores()
    numbers = len(known) <= _MOST_CELLS
    if not numbers:
        from matplotlib.colors import to_rgb

        pixels = [[to_rgb(display.ramp(shades.get((s, t), 0.0))) for t in columns] for s in stages]
        axes.imshow(pixels, extent=(0, len(columns), len(stages), 0), aspect="auto", interpolation="nearest")
        columns = {task: j for j, task in enumerate(columns)}
    for (stage, task), score in known.items() if numbers else ():
        share = shades.get((stage, task), 0.0)
        x, y = columns[task], stages.index(stage)
        axes.add_patch(Rectangle((x, y), 1, 1, facecolor=display.ramp(share), edgecolor="white", linewidth=1.5))
        if 0 <= stage < len(tasks) and tasks[stage] == task:
            axes.add_patch(
                Rectangle((x + 0.04, y + 0.05), 0.92, 0.9, fill=False, edgecolor=display.COLOURS[1], linewidth=1.6)
            )
        scale, ink = display.scale_of(matrix, task), "white" if share > 0.55 else "#1b1f24"
        axes.text(
            x + 0.5, y + 0.42, display.number(score.value, scale), ha="center", va="center", color=ink, fontsize=10
        )
        if score.interval is not None:
            half = (score.interval[1] - score.interval[0]) / 2
            small = f"±{display.number(half, scale)}"
            axes.text(x + 0.5, y + 0.76, small, ha="center", va="center", color=ink, fontsize=6.5)
    axes.set_xlim(0, max(columns.values(), default=0) + 1)
    axes.set_ylim(max(len(stages), 1), 0)
    axes.set_yticks([i + 0.5 for i in range(len(stages))], [display.stage_label(matrix, stage) for stage in stages])
    labels = [f"{task}\n{_note(matrix, task)}" if numbers else task for task in columns]
    size, rotation = (8, 0) if numbers else (5, 90)
    axes.set_xticks([x + 0.5 for x in columns.values()], labels, fontsize=size, rotation=rotation)
    if not numbers:
        axes.tick_params(axis="y", labelsize=5)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    if numbers:
        axes.set_xlabel(
            "framed: the task just learnt; darker: better; ±: 95 % bootstrap over the test rows", fontsize=7
        )
    return figure


def curves(matrix: TaskMatrix, title: str = "Each task over the stages") -> Figure:
    """Each task's score after each stage, with intervals; a panel per kind of metric, the stage that learnt it marked."""
    panels = _panels({"": matrix})
    figure = _figure(2.2 + 0.8 * min(max(len(matrix.stages), 4), 16), 0.6 + 2.6 * max(len(panels), 1))
    for row, (label, tasks) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(max(len(panels), 1), 1, row)
        for task in tasks:
            colour = _colour(matrix, task)
            _line(axes, matrix, task, color=colour, label=task + (" (probe)" if task in matrix.probes else ""))
            if task in matrix.train_tasks:
                stage = matrix.train_tasks.index(task)
                score = matrix.score(stage, task)
                if score is not None:
                    y = score.value * display.scale_of(matrix, task)
                    axes.plot(
                        [stage], [y], "o", markersize=8, markerfacecolor="white", markeredgecolor=colour, zorder=4
                    )
        _stage_axis(axes, matrix, label)
        if len(tasks) <= 20:
            axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        if row == 1:
            axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    return figure


def side_by_side(matrices: Mapping[str, TaskMatrix], title: str = "Runs side by side") -> Figure:
    """A panel per task: its score over the stages in each run, in that run's colour."""
    names: dict[str, None] = {}
    for matrix in matrices.values():
        names.update(dict.fromkeys([*matrix.train_tasks, *matrix.probes]))
    across = min(max(len(names), 1), 3)
    down = math.ceil(max(len(names), 1) / across)
    figure = _figure(1.0 + 3.1 * across, 1.1 + 2.3 * down)
    for position, task in enumerate(names, 1):
        axes = figure.add_subplot(down, across, position)
        for index, (run, matrix) in enumerate(matrices.items()):
            if task not in matrix.tasks:
                continue
            style = "-" if index % 2 == 0 else "--"
            _line(axes, matrix, task, color=display.COLOURS[index % len(display.COLOURS)], label=run, linestyle=style)
        first = next(matrix for matrix in matrices.values() if task in matrix.tasks)
        if task in first.train_tasks:
            axes.axvline(first.train_tasks.index(task), color="#b0b7bf", linewidth=0.8, linestyle=":", zorder=0)
        _stage_axis(axes, max(matrices.values(), key=lambda m: len(m.stages)), display.metric_label(first, task), 6.5)
        axes.set_title(task + (" (probe)" if task in first.probes else ""), fontsize=9)
        if position == 1:
            axes.legend(fontsize=7, frameon=False)
    figure.suptitle(title, x=0.02, ha="left", fontsize=11, fontweight="bold")
    return figure


def _line(axes: Any, matrix: TaskMatrix, task: str, **style: Any) -> None:
    scale = display.scale_of(matrix, task)
    known = [(s, score) for (s, t), score in matrix.scores().items() if t == task and math.isfinite(score.value)]
    axes.plot(
        [s for s, _ in known], [v.value * scale for _, v in known], marker="o", markersize=3.5, linewidth=1.6, **style
    )
    bars = [(s, v.interval) for s, v in known if v.interval is not None]
    if bars and len(matrix.tasks) <= 20:
        low, high = [e[0] * scale for _, e in bars], [e[1] * scale for _, e in bars]
        axes.fill_between([s for s, _ in bars], low, high, color=style["color"], alpha=0.10, linewidth=0)


def _stage_axis(axes: Any, matrix: TaskMatrix, label: str, size: float = 8) -> None:
    names = ["before" if s < 0 else display.stage_label(matrix, s).removeprefix("after ") for s in matrix.stages]
    every = max(1, len(names) // 20)
    axes.set_xticks(matrix.stages[::every], names[::every], fontsize=size, rotation=0 if len(names) <= 5 else 30)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_ylabel(label, fontsize=size)
    axes.grid(axis="y", color="#e5e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _panels(matrices: Mapping[str, TaskMatrix]) -> dict[str, list[str]]:
    panels: dict[str, list[str]] = {}
    for matrix in matrices.values():
        for task in [*matrix.train_tasks, *matrix.probes]:
            unit = " (points)" if display.is_share(matrix, task) else ""
            panels.setdefault(display.metric_label(matrix, task) + unit, []).append(task)
    return panels


def _colour(matrix: TaskMatrix, task: str) -> str:
    return display.COLOURS[matrix.tasks.index(task) % len(display.COLOURS)]


def _note(matrix: TaskMatrix, task: str) -> str:
    rows = display.rows_of(matrix, task)
    metric = matrix.metrics.get(task, "")
    arrow = "lower is better" if matrix.mode_of(task) == "min" else ""
    return "\n".join(part for part in (metric, arrow, f"{rows} rows" if rows != "?" else "") if part)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(min(width, 20.0), min(height, 20.0)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
