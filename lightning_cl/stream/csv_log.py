# SPDX-License-Identifier: Apache-2.0
"""Lightning's CSV log of a resumed run: each row once, as if the run had never stopped."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn


def keep(trainer: pl.Trainer) -> list[int]:
    """How many rows each CSVLogger has written; called for each checkpoint.

    A CSVLogger deletes the ``metrics.csv`` that it finds in its folder when it logs for the first time, so a copy is left
    beside it for the process that resumes.
    """
    counts = []
    for logger in _loggers(trainer):
        path = _path(logger)
        try:
            logger.experiment.save()
            counts.append(len(_rows(path)))
            if path.is_file():
                part = _copy(path).with_suffix(".part")
                shutil.copyfile(path, part)
                os.replace(part, _copy(path))
        except OSError as error:
            rank_zero_warn(f"{path} could not be kept for a resume ({error.strerror or error}).")
            counts.append(0)
    return counts


def read(trainer: pl.Trainer, counts: list[int]) -> list[list[dict[str, str]]]:
    """The rows that were there when the checkpoint was written; called before the loggers begin to log."""
    found = []
    for logger, count in zip(_loggers(trainer), counts, strict=False):
        copies = (_rows(_copy(_path(logger))), _rows(_path(logger)))
        found.append(max(copies, key=len)[:count])
    return found


def put_back(trainer: pl.Trainer, rows: list[list[dict[str, str]]]) -> None:
    """Begin the logs with these rows."""
    for logger, kept in zip(_loggers(trainer), rows, strict=False):
        if kept:
            experiment: Any = logger.experiment
            _path(logger).unlink(missing_ok=True)
            experiment.metrics = [{key: value for key, value in row.items() if value != ""} for row in kept]
            experiment.save()


def _loggers(trainer: pl.Trainer) -> list[CSVLogger]:
    if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
        return []
    return [logger for logger in trainer.loggers if isinstance(logger, CSVLogger)]


def _path(logger: CSVLogger) -> Path:
    return Path(logger.log_dir) / "metrics.csv"


def _copy(path: Path) -> Path:
    return path.with_name(f".{path.name}.kept")


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with open(path, newline="") as file:
            return list(csv.DictReader(file))
    except OSError:
        return []
