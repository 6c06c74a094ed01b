# SPDX-License-Identifier: Apache-2.0
"""How scores and figures are written: units, labels and colours, the same in tables, plots and pages."""

from __future__ import annotations

import math
from typing import Any

from lightning_cl.metrics import TaskMatrix

#: Names of the figures as people read them, in the order in which they are shown.
FIGURE_TITLES = {
    "average": "average",
    "backward_transfer": "backward transfer (BWT)",
    "forward_transfer": "forward transfer (FWT)",
    "forgetting": "forgetting",
    "intransigence": "intransigence",
    "learning_accuracy": "learning accuracy",
}
#: Short names of the figures, as on the command line.
ALIASES = {
    "bwt": "backward_transfer",
    "fwt": "forward_transfer",
    "acc": "average",
    "la": "learning_accuracy",
}
#: The figures of which less is better.
LOWER_IS_BETTER = ("forgetting", "intransigence")
#: Told apart by people with the usual colour-vision deficiencies (Okabe and Ito, 2008), without its yellow.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#7a5195", "#8c6d31", "#4d4d4d")
_RAMP = ((247, 250, 253), (198, 219, 239), (107, 174, 214), (33, 113, 181), (8, 48, 107))
_SHARES = ("accuracy", "exact_match", "rouge_l", "token_f1")


def is_share(matrix: TaskMatrix, task: str) -> bool:
    """Whether the task's scores are shares between 0 and 1, which are shown in points (x 100)."""
    metric = matrix.metrics.get(task, "")
    if any(metric == name or metric.endswith(("_" + name, "/" + name)) for name in _SHARES):
        return all(-1e-9 <= score.value <= 1 + 1e-9 for score in _finite(matrix, task))
    known = _finite(matrix, task)
    if matrix.mode_of(task) == "min" or "loss" in metric.lower() or not known:
        return False
    return all(0 <= score.value <= 1 for score in known)


def scale_of(matrix: TaskMatrix, task: str) -> float:
    """The factor from the metric's own unit to what is shown: 100 for shares, else 1."""
    return 100.0 if is_share(matrix, task) else 1.0


def figure_scale(matrix: TaskMatrix) -> float:
    """The factor from the figures' own unit to what is shown: 100 (points) for shares and normalised scores."""
    tasks = matrix.train_tasks
    shares = all(matrix.range_of(task) is not None or is_share(matrix, task) for task in tasks)
    return 100.0 if tasks and shares else 1.0


def probe_scale(matrix: TaskMatrix, probe: str) -> float:
    """The same for a probe's ``general_change``."""
    return 100.0 if matrix.range_of(probe) is not None or is_share(matrix, probe) else 1.0


def scale_of_figure(matrix: TaskMatrix, name: str) -> float:
    """The factor for any figure by name, ``general_change/PROBE`` among them."""
    if name.startswith("general_change/"):
        return probe_scale(matrix, name.split("/", 1)[1])
    return figure_scale(matrix)


def number(value: float | None, scale: float = 1.0, sign: bool = False) -> str:
    """A score as people read it: one decimal for points, three for anything small.

    Example:
        >>> number(0.7643, 100), number(3.2881), number(-0.02, 100, sign=True), number(None)
        ('76.4', '3.288', '-2.0', '-')
    """
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    shown = value * scale
    text = f"{shown:{'+' if sign else ''}.{1 if scale == 100.0 or abs(shown) >= 100 else 3}f}"
    return text[1:] if text in ("-0.0", "-0.000", "+0.0", "+0.000") else text


def interval(ends: Any, scale: float = 1.0, sign: bool = False) -> str:
    """An interval in brackets, or nothing."""
    return "" if ends is None else f"[{number(ends[0], scale, sign)}, {number(ends[1], scale, sign)}]"


def stage_label(matrix: TaskMatrix, stage: int) -> str:
    """What a stage is called: "before", then "after NAME"."""
    names = matrix.train_tasks
    if stage < 0:
        return "before"
    return f"after {names[stage]}" if stage < len(names) else f"after stage {stage}"


def rows_of(matrix: TaskMatrix, task: str) -> str:
    """Number of test rows of a task: one number, or a range where the stages differ."""
    counts = sorted({score.rows for (_, t), score in matrix.scores().items() if t == task and score.rows is not None})
    if not counts:
        return "?"
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"


def metric_label(matrix: TaskMatrix, task: str) -> str:
    """The task's metric, and whether lower is better."""
    metric = matrix.metrics.get(task, "score")
    return f"{metric}, lower is better" if matrix.mode_of(task) == "min" else metric


def figures_of(matrix: TaskMatrix, stage: int) -> list[tuple[str, str, float | None, str]]:
    """(key, title, value, reason) of each figure, the probes' changes among them, after a stage."""
    found = matrix.at(stage)
    reasons = dict(matrix.reasons)
    rows = [(name, FIGURE_TITLES[name], found[name], reasons.get(name, "")) for name in FIGURE_TITLES]
    for probe, change in found.get("general_change", {}).items():
        key = f"general_change/{probe}"
        rows.append((key, f"general change: {probe}", change, reasons.get(key, "")))
    return rows


def last_stage(matrix: TaskMatrix) -> int:
    """The last stage with a score that has a training task."""
    return min(max(matrix.stages, default=-1), len(matrix.train_tasks) - 1)


def ramp(share: float) -> str:
    """A colour from nearly white (0) to dark blue (1), ``#rrggbb``."""
    position = min(max(share, 0.0), 1.0) * (len(_RAMP) - 1)
    low = min(int(position), len(_RAMP) - 2)
    mixed = (round(a + (b - a) * (position - low)) for a, b in zip(_RAMP[low], _RAMP[low + 1], strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def shades(matrix: TaskMatrix) -> dict[tuple[int, str], float]:
    """For each cell how good its score is among those of the same kind of metric, from 0 (worst) to 1 (best)."""
    table = {cell: score.value for cell, score in matrix.scores().items() if math.isfinite(score.value)}
    kinds: dict[Any, list[tuple[int, str]]] = {}
    for cell in table:
        task = cell[1]
        # A probe's scores move little; beside the tasks' they would all have one shade.
        own = task if matrix.role_of(task) == "probe" else ""
        kinds.setdefault((own, matrix.metrics.get(task), matrix.mode_of(task)), []).append(cell)
    result = {}
    for (_, _, mode), cells in kinds.items():
        values = [table[cell] for cell in cells]
        low, high = min(values), max(values)
        for cell in cells:
            share = (table[cell] - low) / (high - low) if high > low else 0.5
            result[cell] = share if mode == "max" else 1 - share
    return result


def _finite(matrix: TaskMatrix, task: str) -> list[Any]:
    return [s for (_, t), s in matrix.scores().items() if t == task and math.isfinite(s.value)]
