# SPDX-License-Identifier: Apache-2.0
"""The report of one run or several as one HTML page that needs nothing else: no script, no network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from typing import Any

from lightning_cl.metrics import TaskMatrix
from lightning_cl.report import display, routing, svg
from lightning_cl.report.run import Run, differences, unfinished

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f3f5f7; color: #1b1f24;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 2px; letter-spacing: -0.01em; }
h2 { font-size: 19px; margin: 34px 0 10px; }
h3 { font-size: 14px; margin: 0 0 8px; color: #57606a; font-weight: 600; }
.sub { color: #57606a; margin: 0 0 18px; }
.card { background: #fff; border: 1px solid #dde2e7; border-radius: 10px; padding: 16px 18px; margin: 0 0 14px;
  overflow-x: auto; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(500px, 1fr)); gap: 14px; }
.grid .card { margin: 0; }
.small { grid-template-columns: repeat(auto-fill, minmax(360px, 1fr)); }
.warn { border-left: 4px solid #d55e00; background: #fff8f3; }
.warn ul { margin: 4px 0 0; padding-left: 20px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 6px 14px 6px 0; border-bottom: 1px solid #eceff2; vertical-align: top; }
th:first-child, td:first-child { text-align: left; padding-right: 28px; }
th { font-weight: 600; color: #57606a; font-size: 13px; }
td b { font-weight: 650; }
td.left { text-align: left; }
td .ends { white-space: nowrap; }
td .ends, .note { color: #57606a; font-size: 12.5px; }
td .none { color: #8c6d31; font-size: 12.5px; display: inline-block; max-width: 300px; text-align: right; }
pre { background: #f6f8fa; border-radius: 6px; padding: 12px; overflow-x: auto; font-size: 12.5px; line-height: 1.45; }
summary { cursor: pointer; font-weight: 600; }
svg { display: block; font-family: inherit; }
svg.chart { max-width: 100%; height: auto; }
.key { display: inline-block; width: 22px; height: 12px; border: 2px solid #d55e00; vertical-align: -1px;
  margin-right: 4px; }
"""
#: With more runs than this, the figures have a row for each run, and lines side by side no bands.
_MANY = 4
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(runs: Sequence[Run], problems: Sequence[str] = (), title: str = "Forgetting report") -> str:
    """The whole page.

    Args:
        runs: at least one run.
        problems: what could not be read, said at the top.
        title: the page's title.
    """
    body = [f"<h1>{escape(title)}</h1>", f'<p class="sub">{_names(runs)}</p>', _warnings(runs, problems)]
    body.append("<h2>Figures</h2>" + _figures(runs))
    if len(runs) > 1:
        body.append("<h2>Runs side by side</h2>" + _side_by_side(runs))
    for run in runs:
        body.append(_run(run, alone=len(runs) == 1))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>{''.join(body)}</main></body></html>\n"
    )


def _names(runs: Sequence[Run]) -> str:
    tasks = runs[0].matrix.train_tasks
    listed = ", ".join(escape(run.name) for run in runs)
    return f"{len(runs)} run{'s' if len(runs) > 1 else ''}: {listed}. {len(tasks)} tasks: {escape(' → '.join(tasks))}."


def _warnings(runs: Sequence[Run], problems: Sequence[str]) -> str:
    lines = [escape(line) for line in [*problems, *unfinished(runs)]]
    for run in runs:
        for event in run.document.get("events") or ():
            what = {"warn": "only warned", "stop": "the stream was stopped", "restore": "the weights were put back"}
            lines.append(
                f"{escape(run.name)}: forgetting of {event['forgetting']:.4g} after task {event['stage']}"
                f" ({escape(str(event['task']))}) exceeded the limit; {what.get(event['action'], event['action'])}."
            )
    unlike = differences(runs)
    if unlike:
        lines.append("These runs were not made alike, so nothing is averaged over them:")
        lines += [escape(line) for line in unlike]
    if not lines:
        return ""
    return '<div class="card warn"><b>Note</b><ul>' + "".join(f"<li>{line}</li>" for line in lines) + "</ul></div>"


def _figures(runs: Sequence[Run]) -> str:
    columns: list[dict[str, tuple[str, float | None, str, Any, float]]] = []
    for run in runs:
        stage = display.last_stage(run.matrix)
        ends = run.document.get("figure_intervals") or {}
        columns.append(
            {
                key: (title, value, reason, ends.get(key), display.scale_of_figure(run.matrix, key))
                for key, title, value, reason in display.figures_of(run.matrix, stage)
            }
        )
    keys = list(dict.fromkeys(key for column in columns for key in column))
    titles = {key: next(column[key][0] for column in columns if key in column) for key in keys}
    heads = [
        escape(titles[key]) + (" <span class='note'>(less is better)</span>" if key in display.LOWER_IS_BETTER else "")
        for key in keys
    ]
    names = [escape(run.name) for run in runs]
    cells = [[_figure(run, key, column.get(key)) for key in keys] for run, column in zip(runs, columns, strict=True)]
    if len(runs) <= _MANY:
        table = _table(names, heads, [list(row) for row in zip(*cells, strict=True)])
        return f'<div class="card">{table}{_unit_note(runs)}</div>'
    # A column without any value would only repeat its reason.
    known = [i for i, key in enumerate(keys) if any(key in column and column[key][1] is not None for column in columns)]
    table = _table([heads[i] for i in known], names, [[row[i] for i in known] for row in cells])
    unknown = [f"{titles[key]}: none ({columns[0][key][2]})." for i, key in enumerate(keys) if i not in known]
    return f'<div class="card">{table}{_unit_note(runs, unknown)}</div>'


def _figure(run: Run, key: str, found: tuple[str, float | None, str, Any, float] | None) -> str:
    if found is None:
        return "<td>-</td>"
    _, value, reason, ends, scale = found
    sign = key not in ("average", "learning_accuracy")
    if value is None:
        shown = f"<span class='none'>none: {escape(reason)}</span>"
    else:
        shown = f"<b>{display.number(value, scale, sign)}</b>"
        shown += f" <span class='ends'>{display.interval(ends, scale, sign)}</span>"
    data = "" if value is None else f"{value!r}"
    about = f'data-run="{escape(run.name)}" data-figure="{escape(key)}" data-value="{data}"'
    return f'<td class="figure" {about}>{shown}</td>'


def _table(columns: Sequence[str], rows: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{column}</th>" for column in columns)
    body = "".join(f"<tr><td>{name}</td>{''.join(row)}</tr>" for name, row in zip(rows, cells, strict=True))
    return f"<table><tr><th></th>{head}</tr>{body}</table>"


def _unit_note(runs: Sequence[Run], more: Sequence[str] = ()) -> str:
    notes = ["Brackets: 95 % bootstrap intervals over the test rows.", *more]
    if any(display.is_share(run.matrix, task) for run in runs for task in run.matrix.tasks):
        notes.append("Scores between 0 and 1 are shown in points (x 100).")
    flipped = sorted({task for run in runs for task in run.matrix.tasks if run.matrix.mode_of(task) == "min"})
    if flipped:
        notes.append(
            f"For {', '.join(flipped)} lower is better: the figures' signs are flipped, so that higher is better."
        )
    return f'<p class="note">{escape(" ".join(notes))}</p>'


def _side_by_side(runs: Sequence[Run]) -> str:
    tasks = list(dict.fromkeys(task for run in runs for task in [*run.matrix.train_tasks, *run.matrix.probes]))
    cards, many = [], len(runs) > _MANY
    names: dict[str, svg.Line] = {}
    for task in tasks:
        having = [run for run in runs if task in run.matrix.tasks]
        lines = [
            # Twice as many looks as colours: the second round has solid and dashed lines the other way round.
            _line(
                run.matrix,
                task,
                run.name,
                display.COLOURS[index % len(display.COLOURS)],
                dashed=(index + index // len(display.COLOURS)) % 2 == 1,
            )
            for index, run in enumerate(runs)
            if task in run.matrix.tasks
        ]
        names |= {line.name: line for line in lines}
        if many:
            # So many bands over each other would hide the lines.
            lines = [replace(line, bands={}) for line in lines]
        longest = max((run.matrix for run in having), key=lambda m: len(m.stages))
        unit = _unit(having[0].matrix, task)
        picture = svg.chart(lines, _ticks(longest), unit, width=430, height=220, legend=not many)
        probe = " (probe)" if task in having[0].matrix.probes else ""
        cards.append(f'<div class="card"><h3>{escape(task)}{probe}</h3>{picture}</div>')
    shared = svg.legend(list(names.values())) if many else ""
    return f'{shared}<div class="grid small">{"".join(cards)}</div>'


def _run(run: Run, alone: bool) -> str:
    name = "" if alone else f"{escape(run.name)}: "
    heading = f"{name}task matrix" if name else "Task matrix"
    matrix = run.matrix
    parts = [
        f'<section data-run="{escape(run.name)}"><h2>{heading}</h2>',
        f'<div class="card">{svg.heat_map(matrix)}<p class="note"><span class="key"></span>the task just learnt; darker is'
        " better within a kind of metric; ↓: lower is better; hover a cell for its numbers.</p></div>",
        "<h2>Each task over the stages</h2>",
        f'<div class="grid">{_tasks_over_stages(matrix, matrix.train_tasks)}</div>',
    ]
    if matrix.probes:
        parts += ["<h2>General ability</h2>", f'<div class="grid">{_tasks_over_stages(matrix, matrix.probes)}</div>']
    if run.terms:
        parts += ["<h2>Loss terms</h2>", f'<div class="grid">{_terms(run)}</div>']
    if run.costs:
        parts += ["<h2>Cost</h2>", _costs(run)]
    parts.append(routing.section(run))
    return "".join(parts) + f"<h2>Origin</h2>{_origin(run)}</section>"


def _tasks_over_stages(matrix: TaskMatrix, tasks: Sequence[str]) -> str:
    panels: dict[str, list[str]] = {}
    for task in tasks:
        panels.setdefault(_unit(matrix, task), []).append(task)
    cards = []
    for unit, names in panels.items():
        lines = []
        for task in names:
            line = _line(matrix, task, task, display.COLOURS[matrix.tasks.index(task) % len(display.COLOURS)])
            line.ring = matrix.train_tasks.index(task) if task in matrix.train_tasks else None
            lines.append(line)
        cards.append(f'<div class="card">{svg.chart(lines, _ticks(matrix), unit, width=640, height=280)}</div>')
    return "".join(cards)


def _line(matrix: TaskMatrix, task: str, name: str, colour: str, dashed: bool = False) -> svg.Line:
    scale = display.scale_of(matrix, task)
    known = {stage: score for (stage, t), score in matrix.scores().items() if t == task}
    return svg.Line(
        name,
        [(stage, score.value * scale) for stage, score in known.items()],
        {s: (v.interval[0] * scale, v.interval[1] * scale) for s, v in known.items() if v.interval is not None},
        colour,
        dashed,
    )


def _ticks(matrix: TaskMatrix) -> dict[float, str]:
    return {
        stage: "before" if stage < 0 else display.stage_label(matrix, stage).removeprefix("after ")
        for stage in matrix.stages
    }


def _unit(matrix: TaskMatrix, task: str) -> str:
    return display.metric_label(matrix, task) + (" (points)" if display.is_share(matrix, task) else "")


def _terms(run: Run) -> str:
    counts = ("cl/replay_rows", "cl/replay_separate", "cl/task_weight")
    # A weight that adapts, the divergence that it holds and the loss differ by orders of magnitude: a chart each.
    kinds = {"_ratio": "ratio to the task's loss", "_weight": "weights that adapt", "_kl": "divergence (nats a token)"}
    groups: dict[str, list[str]] = {kind: [] for kind in ("loss terms", *kinds.values(), "counts")}
    for name in run.terms:
        kind = next((kind for end, kind in kinds.items() if name.endswith(end)), "loss terms")
        groups["counts" if name in counts else kind].append(name)
    cards = []
    for kind, names in groups.items():
        lines = [
            svg.Line(
                name, [(x, float(y)) for x, y in run.terms[name]], colour=display.COLOURS[i % len(display.COLOURS)]
            )
            for i, name in enumerate(names)
        ]
        if lines:
            cards.append(
                f'<div class="card"><h3>{escape(kind)}, by logger step</h3>{svg.chart(lines, width=640)}</div>'
            )
    return "".join(cards)


def _costs(run: Run) -> str:
    labels = {
        "prepare_seconds": "preparation",
        "train_seconds": "training",
        "finish_seconds": "fitting",
        "evaluation_seconds": "evaluation",
    }
    labels = {key: label for key, label in labels.items() if any(cost.get(key) for cost in run.costs.values())}
    rows: dict[str, dict[str, float]] = {}
    for stage, cost in sorted(run.costs.items()):
        parts = {label: cost[key] for key, label in labels.items() if key in cost}
        if parts:
            rows[display.stage_label(run.matrix, stage).replace("after ", "task ")] = parts
    total = {label: sum(parts.get(label, 0.0) for parts in rows.values()) for label in labels.values()}
    steps = sum(cost.get("steps", 0.0) for cost in run.costs.values())
    memory = max((cost.get("peak_memory_bytes", 0.0) for cost in run.costs.values()), default=0.0)
    facts = [f"{label}: {seconds:.1f} s" for label, seconds in total.items()]
    facts += [f"optimizer steps: {steps:.0f}"] if steps else []
    facts += [f"peak device memory: {memory / 2**30:.2f} GiB"] if memory else []
    facts += [f"files of the run: {run.disk_bytes / 2**20:.1f} MiB"]
    facts[-1] += ". Generation, collection and fitting before the first step count as preparation."
    picture = svg.bars(rows, list(labels.values()), "s")
    return f'<div class="card">{picture}<p class="note">{escape("; ".join(facts))}</p></div>'


def _origin(run: Run) -> str:
    made = run.made_by
    lines = [("folder", str(run.folder))]
    lines += [("command", " ".join(made["command"]))] if made.get("command") else []
    lines += [(key, str(made[key])) for key in ("commit", "hardware") if made.get(key)]
    if made.get("versions"):
        lines.append(("versions", ", ".join(f"{name} {version}" for name, version in made["versions"].items())))
    if math.isfinite(run.document.get("world_size", math.nan)):
        lines.append(("processes", str(run.document["world_size"])))
    facts = "".join(f"<tr><td>{escape(key)}</td><td class='left'>{escape(value)}</td></tr>" for key, value in lines)
    config = "<p class='note'>No config.yaml was saved with this run.</p>"
    if run.config is not None:
        config = f"<details><summary>Configuration</summary><pre>{escape(run.config)}</pre></details>"
    return f'<div class="card"><table>{facts}</table>{config}</div>'
