# SPDX-License-Identifier: Apache-2.0
"""From what Lightning logged in one evaluation to the scores of the task matrix."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cl.distributed import gather_objects, rank, world_size
from lightning_cl.stream.plan import batch_sizes, part_of
from lightning_cl.stream.task import Task, mode_of

if TYPE_CHECKING:
    from lightning_cl.metrics import TaskMatrix
    from lightning_cl.stream.task_stream import TaskStream


def find_monitor(trainer: pl.Trainer) -> Any:
    """The Trainer's ForgettingMonitor, or None."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if any(cls.__name__ == "ForgettingMonitor" for cls in type(callback).__mro__):
            return callback
    return None


def read_scores(
    stream: TaskStream,
    stage: int,
    tasks: Sequence[Task],
    logged: Sequence[Mapping[str, float]],
    monitor: Any,
    row_scores: Mapping[int, Sequence[float]] | None = None,
) -> None:
    """Put one evaluation's scores into the stream's cells; called on all processes.

    Args:
        stream: the stream.
        stage: the row.
        tasks: the task of each loader.
        logged: what ``trainer.test`` or ``trainer.validate`` returned.
        monitor: the ForgettingMonitor, or None.
        row_scores: the score of each row by loader, where the module keeps them (``CausalLMModule`` does).

    Raises:
        MisconfigurationException: before the first task, for a metric that was asked for by name and is not logged.
    """
    from lightning_cl.metrics import find_score

    together: dict[str, float] = {}
    for entry in logged:
        together.update(entry)
    for index, task in enumerate(tasks):
        wanted = getattr(monitor, "metric", None)
        own = None if task.metric is None else task.metric.rpartition(".")[2]  # a class is logged by its name
        found, reason = find_score(together, index, len(tasks), task.name, wanted, own)
        if wanted is None and own is not None and (found is None or not _names(found, own)):
            # A metric that was asked for is not replaced by the only one that was logged.
            found, reason = None, f"nothing logs {task.metric!r} for {task.name!r}"
        if found is None and together:
            names = ", ".join(sorted({_bare(name) for name in together}))
            reason += "" if "logged:" in reason else f" (logged: {names})"
        if found is None:
            if stage == -1 and together and (wanted or task.metric):
                raise MisconfigurationException(
                    f"No score for task {task.name!r}: {reason}. Name a metric that the module logs in its evaluation,"
                    " with one value a loader."
                )
            stream.missing[stage, task.name] = reason
            continue
        rows = _rows(stream.trainer, index)
        value = _agree(together[found], rows, stream.eval_batch_size)
        cell: dict[str, Any] = {"value": value, "rows": rows, "metric": task.metric or _bare(found)}
        scores = list((row_scores or {}).get(index, ()))
        if scores and all(math.isfinite(score) for score in scores):
            cell["scores"], cell["rows"] = scores, len(scores)
        stream.cells[stage, task.name] = cell


def matrix_of(stream: TaskStream) -> TaskMatrix:
    """The stream's cells as a :class:`~lightning_cl.metrics.TaskMatrix`."""
    from lightning_cl.metrics import TaskMatrix

    metrics = {task: cell["metric"] for (_, task), cell in stream.cells.items() if cell.get("metric")}
    monitor = find_monitor(stream.trainer) if stream.trainer is not None else None
    modes = {}
    for task in stream.tasks:
        if task.higher_is_better is not None or task.metric is not None or monitor is None:
            given = task.higher_is_better is not None or task.metric is not None
            modes[task.name] = task.mode if given else mode_of(metrics.get(task.name))
        else:
            modes[task.name] = getattr(monitor, "mode", "max")
    matrix = TaskMatrix(
        tasks=[task.name for task in stream.tasks],
        roles={task.name: task.role for task in stream.tasks},
        modes=modes,
        metrics=metrics,
    )
    for (stage, name), cell in sorted(stream.cells.items()):
        matrix.update(stage, name, cell["value"], rows=cell.get("rows"), scores=cell.get("scores"))
    return matrix


def _rows(trainer: pl.Trainer | None, index: int) -> int | None:
    """How many rows one loader gave to all processes in the evaluation that just ended."""
    from lightning_cl.metrics.loaders import loaders_of
    from lightning_cl.stream.loader import TaskLoader

    loader = loaders_of(trainer)[index] if trainer is not None else None
    return loader.position()["rows"] if isinstance(loader, TaskLoader) else None


def _agree(value: float, rows: int | None, batch_size: int) -> float:
    """The value of all processes together, where the module logged each process's own.

    Each process had nearly as many rows as any other; their exact shares weigh the mean.
    """
    value = float(value)
    if world_size() == 1:
        return value
    share = 1
    if rows is not None:
        sizes = batch_sizes(rows, batch_size, world_size())
        share = sum(len(part_of(0, size, rank(), world_size())) for size in sizes)
    values = gather_objects((value, share))
    if all(other == values[0][0] for other, _ in values):
        return value
    return sum(other * weight for other, weight in values) / sum(weight for _, weight in values)


def _names(logged: str, metric: str) -> bool:
    return re.split("[_/]", _bare(logged))[-1] == metric or _bare(logged).endswith(metric)


def _bare(name: str) -> str:
    """A metric's name without the loader and without the kind of evaluation."""
    return re.sub(r"^(val|valid|validation|test)[_/]", "", name.rsplit("/dataloader_idx_", 1)[0])
