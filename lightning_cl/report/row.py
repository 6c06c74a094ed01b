# SPDX-License-Identifier: Apache-2.0
"""A finished row of the task matrix: to the loggers, the terminal and the disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_cl.metrics import TaskMatrix
from lightning_cl.report import display, loggers, results
from lightning_cl.report.plots import curves, heat_map
from lightning_cl.report.provenance import provenance
from lightning_cl.report.tables import run_tables


def show(trainer: pl.Trainer, matrix: TaskMatrix, table: bool, figures: Mapping[str, Any]) -> None:
    """Log the figures as ``cl/NAME`` (undefined ones are left out) and the plots, and print both tables.

    Args:
        trainer: whose loggers are used, at the step at which Lightning logs.
        matrix: the task matrix.
        table: whether to print.
        figures: matplotlib figures by what is added to ``cl/task_matrix``.
    """
    figures = _with_routing(trainer, figures)
    rows = display.figures_of(matrix, display.last_stage(matrix))
    loggers.log_scalars(trainer, {f"cl/{key}": value for key, _, value, _ in rows if value is not None})
    if table:
        from rich.console import Console

        Console().print(run_tables(matrix))
    loggers.log_figures(trainer, {f"cl/task_matrix{suffix}": figure for suffix, figure in figures.items()})


def draw(matrix: TaskMatrix) -> dict[str, Any]:
    """The plots of one run, by what is added to the name of their file."""
    return {"": heat_map(matrix), "_stages": curves(matrix)}


def write(
    trainer: pl.Trainer,
    matrix: TaskMatrix,
    folder: Path,
    stem: str,
    parts: Mapping[str, Any],
    figures: Mapping[str, Any],
) -> None:
    """Write the result files, with what made them.

    Raises:
        OSError: if one cannot be written.
    """
    confusion = _confusion(trainer)
    sent = None if confusion is None else confusion.document()
    made = {"routing": sent, "world_size": trainer.world_size, "provenance": provenance()}
    results.write(folder, matrix, {**parts, **made}, stem=stem, figures=_with_routing(trainer, figures))


def check_writable(folder: Path, stem: str, size: int = 1 << 20) -> None:
    """Write and remove a file as large as the results of a stream can be expected to get.

    Raises:
        OSError: if that is not possible.
    """
    from lightning_cl.strategies.files import write_atomically

    probe = folder / f".{stem}.probe"
    write_atomically(probe, lambda file: _zeros(file, size))
    probe.unlink()


def _confusion(trainer: pl.Trainer) -> Any:
    """Where a router has sent each task's samples, stage by stage, if the Trainer has one."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        confusion: Any = getattr(callback, "confusion", None)
        if getattr(confusion, "stages", None):
            return confusion
    return None


def _with_routing(trainer: pl.Trainer, figures: Mapping[str, Any]) -> Mapping[str, Any]:
    confusion = _confusion(trainer) if figures else None
    return figures if confusion is None else {**figures, "_routing": confusion.plot()}


def _zeros(file: Any, size: int) -> None:
    file.write(b"\0" * size)
