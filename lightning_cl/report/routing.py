# SPDX-License-Identifier: Apache-2.0
"""What a router did in a run: where samples went, how often rightly, and what the routes cost in scores."""

from __future__ import annotations

from html import escape

from lightning_cl.report import display, svg
from lightning_cl.report.run import Run

#: Titles of the ways to choose the adapters, in the order of the report.
MODES = {"oracle": "oracle (the task's own adapter)", "routed": "routed", "base": "base model"}


def section(run: Run) -> str:
    """The report's part on routing as HTML; empty for a run without a router."""
    routing = run.routing
    if routing is None:
        return ""
    last = max(routing["stages"], key=int)
    counts, learnt = routing["stages"][last], routing["learnt"][last]
    columns = list(dict.fromkeys([*learnt, *(name for row in counts.values() for name in row)]))
    accuracy = _accuracy(run)
    cards = [f'<div class="card">{svg.confusion(counts, columns)}</div>']
    if accuracy:
        line = svg.Line("routing accuracy", [(stage, 100 * share) for stage, share in accuracy.items()])
        ticks = {float(stage): display.stage_label(run.matrix, stage).removeprefix("after ") for stage in accuracy}
        cards.append(f'<div class="card">{svg.chart([line], ticks, "% of samples", width=640, height=240)}</div>')
    if routing.get("scores"):
        cards.append(f'<div class="card">{_scores(run)}</div>')
    return f"<h2>Routing</h2>{''.join(cards)}"


def summary(run: Run) -> list[str]:
    """The same in a few lines of Markdown; none for a run without a router."""
    routing = run.routing
    if routing is None:
        return []
    shares = ", ".join(f"{100 * share:.1f} %" for share in _accuracy(run).values())
    lines = [f"Routing accuracy after each task: {shares}."]
    averages = {mode: _average(run, mode) for mode in MODES if mode in (routing.get("scores") or {})}
    shown = [f"{mode} {display.number(value, scale)}" for mode, (value, scale) in averages.items()]
    return [*lines, *([f"Average over the tasks learnt: {', '.join(shown)}."] if shown else []), ""]


def _accuracy(run: Run) -> dict[int, float]:
    assert run.routing is not None
    shares = {int(stage): share for stage, share in (run.routing.get("accuracy") or {}).items() if share is not None}
    return dict(sorted(shares.items()))


def _average(run: Run, mode: str) -> tuple[float, float]:
    """The mean score over the training tasks, and what to multiply it with to show it."""
    assert run.routing is not None
    scores = run.routing["scores"][mode]
    tasks = [task for task in scores if task in run.matrix.train_tasks]
    scale = display.scale_of(run.matrix, tasks[0]) if tasks else 1.0
    return sum(scores[task] for task in tasks) / max(1, len(tasks)), scale


def _scores(run: Run) -> str:
    assert run.routing is not None
    scores = run.routing["scores"]
    modes = [mode for mode in MODES if mode in scores]
    tasks = list(dict.fromkeys(task for mode in modes for task in scores[mode]))
    head = "".join(f"<th>{escape(MODES[mode])}</th>" for mode in modes)
    lines = []
    for task in tasks:
        scale = display.scale_of(run.matrix, task) if task in run.matrix.tasks else 1.0
        cells = "".join(
            f'<td data-mode="{mode}" data-scored="{escape(task)}" data-value="{scores[mode][task]!r}">'
            f"{display.number(scores[mode][task], scale)}</td>"
            if task in scores[mode]
            else "<td>-</td>"
            for mode in modes
        )
        lines.append(f"<tr><td>{escape(task)}</td>{cells}</tr>")
    means = "".join(f"<td><b>{display.number(*_average(run, mode))}</b></td>" for mode in modes)
    return f"<table><tr><th></th>{head}</tr>{''.join(lines)}<tr><td>average</td>{means}</tr></table>"
