# SPDX-License-Identifier: Apache-2.0
"""Tables of the task matrix for the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from lightning_cl.metrics import TaskMatrix
from lightning_cl.report import display


def matrix_table(matrix: TaskMatrix, title: str = "Task matrix") -> Table:
    """R[stage, task] with intervals: a row per stage, a column per task, number of test rows in the head.

    Example:
        >>> matrix = TaskMatrix(["a", "b"])
        >>> for stage, values in enumerate([(0.9, 0.2), (0.7, 0.8)]):
        ...     for task, value in zip("ab", values):
        ...         matrix.update(stage, task, value, rows=50)
        >>> "after b" in as_text(matrix_table(matrix))
        True
    """
    table = Table(title=title, title_justify="left", caption_justify="left", show_lines=False)
    table.add_column("", no_wrap=True)
    known = matrix.scores()
    tasks = [*matrix.train_tasks, *matrix.probes]
    for task in tasks:
        head = Text(task, style="bold")
        if matrix.role_of(task) == "probe":
            head.append(" (probe)", style="italic")
        head.append(f"\n{display.metric_label(matrix, task)}\n{display.rows_of(matrix, task)} rows", style="dim")
        table.add_column(head, justify="right")
    for stage in matrix.stages:
        cells: list[Text] = []
        for task in tasks:
            score = known.get((stage, task))
            if score is None:
                cells.append(Text("-", style="dim"))
                continue
            scale = display.scale_of(matrix, task)
            learnt = stage >= 0 and stage < len(matrix.train_tasks) and matrix.train_tasks[stage] == task
            cell = Text(display.number(score.value, scale), style="bold" if learnt else "")
            ends = display.interval(score.interval, scale)
            if ends:
                cell.append("\n" + ends, style="dim")
            cells.append(cell)
        table.add_row(display.stage_label(matrix, stage), *cells)
    notes = []
    if any(score.interval is not None for score in known.values()):
        notes.append("brackets: 95 % bootstrap over the test rows")
    if any(display.is_share(matrix, task) for task in tasks):
        notes.append("shares in points (x 100)")
    table.caption = "; ".join(notes) or None
    return table


def summary_table(matrices: Mapping[str, TaskMatrix], title: str = "Summary") -> Table:
    """The figures of one run or of several side by side, with intervals, and why a figure is missing.

    Args:
        matrices: task matrices by the name of their run.
        title: the table's title.
    """
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("")
    columns = {}
    for name, matrix in matrices.items():
        stage = display.last_stage(matrix)
        table.add_column(name, justify="right")
        columns[name] = {row[0]: row for row in display.figures_of(matrix, stage)}, matrix.figure_intervals(stage)
    keys = list(dict.fromkeys(key for figures, _ in columns.values() for key in figures))
    for key in keys:
        cells = []
        title_of_row = key
        for name, (figures, intervals) in columns.items():
            if key not in figures:
                cells.append(Text("-", style="dim"))
                continue
            _, title_of_row, value, reason = figures[key]
            scale = display.scale_of_figure(matrices[name], key)
            sign = key not in ("average", "learning_accuracy")
            cell = Text(display.number(value, scale, sign) if value is not None else f"none: {reason}")
            cell.stylize("dim" if value is None else "bold")
            ends = display.interval(intervals.get(key), scale, sign)
            if ends:
                cell.append(" " + ends, style="dim")
            cells.append(cell)
        table.add_row(title_of_row, *cells)
    flipped = {task for matrix in matrices.values() for task in matrix.tasks if matrix.mode_of(task) == "min"}
    if flipped:
        table.caption = (
            f"Signs are flipped for {', '.join(sorted(flipped))} (lower is better): higher is always better."
        )
    return table


def run_tables(matrix: TaskMatrix, name: str = "this run") -> RenderableType:
    """Both tables of one run."""
    return Group(matrix_table(matrix), summary_table({name: matrix}))


def as_text(renderable: RenderableType, width: int = 160) -> str:
    """A table as plain text."""
    console = Console(width=width, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()
