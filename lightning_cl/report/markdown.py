# SPDX-License-Identifier: Apache-2.0
"""A summary of runs in Markdown, for a pull request."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_cl.report import display, routing
from lightning_cl.report.run import Run, differences, unfinished


def summary(runs: Sequence[Run], problems: Sequence[str] = (), checks: Sequence[str] = ()) -> str:
    """Figures side by side, each run's last row, and what to be careful about.

    Args:
        runs: at least one run.
        problems: what could not be read.
        checks: results of thresholds, one line each.
    """
    lines = ["### Forgetting report", "", *_figures(runs), ""]
    for run in runs:
        lines += [*_last_row(run), "", *routing.summary(run)]
    flipped = sorted({task for run in runs for task in run.matrix.tasks if run.matrix.mode_of(task) == "min"})
    notes = ["Brackets: 95 % bootstrap over the test rows. Scores between 0 and 1 are in points (x 100)."]
    if flipped:
        notes.append(f"Lower is better for {', '.join(flipped)}: its figures' signs are flipped.")
    unlike = differences(runs)
    if unlike:
        notes.append("The runs were not made alike, so nothing is averaged: " + "; ".join(unlike) + ".")
    lines += [f"- {line}" for line in [*checks, *notes, *unfinished(runs), *problems]]
    return "\n".join(lines) + "\n"


def _figures(runs: Sequence[Run]) -> list[str]:
    lines = ["| | " + " | ".join(_cell(run.name) for run in runs) + " |", "| --- |" + " ---: |" * len(runs)]
    columns = []
    for run in runs:
        columns.append({f[0]: f for f in display.figures_of(run.matrix, display.last_stage(run.matrix))})
    for key in dict.fromkeys(key for column in columns for key in column):
        cells = []
        title = key
        for run, column in zip(runs, columns, strict=True):
            if key not in column:
                cells.append("-")
                continue
            _, title, value, reason = column[key]
            scale, sign = display.scale_of_figure(run.matrix, key), key not in ("average", "learning_accuracy")
            ends = (run.document.get("figure_intervals") or {}).get(key)
            shown = f"{display.number(value, scale, sign)} {display.interval(ends, scale, sign)}".strip()
            cells.append(_cell(shown if value is not None else f"none ({reason})"))
        lines.append(f"| {_cell(title)} | " + " | ".join(cells) + " |")
    return lines


def _last_row(run: Run) -> list[str]:
    matrix = run.matrix
    tasks, stage = [*matrix.train_tasks, *matrix.probes], max(matrix.stages)
    known = matrix.scores()
    head = [_cell(task + (" (probe)" if task in matrix.probes else "")) for task in tasks]
    cells = []
    for task in tasks:
        score, scale = known.get((stage, task)), display.scale_of(matrix, task)
        if score is None:
            cells.append("-")
        else:
            cells.append(f"{display.number(score.value, scale)} {display.interval(score.interval, scale)}".strip())
    rows = [display.rows_of(matrix, task) for task in tasks]
    return [
        f"**{_cell(run.name)}** {display.stage_label(matrix, stage)}:",
        "",
        "| | " + " | ".join(head) + " |",
        "| --- |" + " ---: |" * len(tasks),
        "| score | " + " | ".join(cells) + " |",
        "| test rows | " + " | ".join(rows) + " |",
    ]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
