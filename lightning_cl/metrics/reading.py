# SPDX-License-Identifier: Apache-2.0
"""The score of each task out of what an evaluation logged."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_cl.distributed import gather_objects
from lightning_cl.metrics.loaders import loop_of, rows_of_loader
from lightning_cl.metrics.lookup import find_score, label_of, logged_for


@dataclass(frozen=True)
class Reading:
    """What one evaluation says of one task, the same on every rank.

    Attributes:
        label: what the metric is called, whatever loop logged it.
        value: the score.
        rows: rows behind it, where that can be known.
        scores: the score of each row, where the module keeps them in the value's unit.
    """

    label: str
    value: float
    rows: int | None = None
    scores: list[float] | None = None


class ScoreReader:
    """Finds a metric among those that Lightning logged for each loader.

    Args:
        metric: its name, as :func:`~lightning_cl.metrics.find_score` takes it.

    Attributes:
        found: whether it was seen once; until then its absence is an error.
    """

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.found = False

    def read(self, trainer: pl.Trainer, pl_module: pl.LightningModule, names: list[str]) -> dict[str, Reading]:
        """The tasks' scores in the evaluation that has just run. A collective call.

        Args:
            trainer: the Trainer.
            pl_module: its module; its ``row_scores``, if there are any, hold the rows' scores by loader.
            names: the task of each loader.

        Raises:
            MisconfigurationException: if nothing ever logged the metric, with the names that exist.
        """
        logged = {name: float(value) for name, value in trainer.callback_metrics.items() if _is_number(value)}
        self._check(trainer, pl_module, names, logged)
        own = own_metrics(trainer)
        per_row: dict[int, Any] = getattr(pl_module, "row_scores", None) or {}
        local: dict[str, Reading] = {}
        for index, task in enumerate(names):
            name, _ = find_score(logged, index, len(names), task, self.metric, own.get(task))
            if name is not None:
                scores = [float(score) for score in per_row.get(index, ())]
                rows = rows_of_loader(trainer, index)
                local[task] = Reading(label_of(name, task), logged[name], rows, scores or None)
        parts = gather_objects(local)
        return {task: _joined([part[task] for part in parts]) for task in local}

    def check_sanity(self, trainer: pl.Trainer, pl_module: pl.LightningModule, names: list[str]) -> None:
        """Refuse a metric that the sanity check did not log, before anything is trained.

        Raises:
            MisconfigurationException: with the names that exist.
        """
        # Lightning drops the sanity check's values and shows them to no callback, but keeps their names.
        seen = {}
        for key, result in (getattr(trainer, "_results", None) or {}).items():
            loader = re.search(r"\.(\d+)$", key)
            seen[result.meta.name + (f"/dataloader_idx_{loader[1]}" if loader else "")] = 0.0
        self._check(trainer, pl_module, names, seen)

    def _check(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, names: list[str], logged: Mapping[str, float]
    ) -> None:
        if self.found:
            return
        own = own_metrics(trainer)
        for index, task in enumerate(names):
            if find_score(logged, index, len(names), task, self.metric)[0] is not None:
                self.found = True
                return
        tested = is_overridden("test_step", pl_module) and "test" in self.metric
        if not names or (loop_of(trainer) == "val" and tested):
            return
        existing = {label for index in range(len(names)) for label in logged_for(logged, index, len(names))}
        if len(names) > 1 and self.metric in logged:
            raise MisconfigurationException(
                f"`ForgettingMonitor(metric={self.metric!r})`: it is logged once for all {len(names)} loaders, so the tasks"
                " cannot be told apart. Log it in the evaluation step, or under a name that holds the task's, and give"
                " `metric='{task}/...'`."
            )
        told = [metric for metric in own.values() if metric is not None]
        raise MisconfigurationException(
            f"`ForgettingMonitor(metric={self.metric!r})`: nothing logs a metric of that name for the loaders of"
            f" {', '.join(map(repr, names))}. Logged are {', '.join(map(repr, sorted(existing))) or 'no metrics at all'}"
            f"{' (the tasks name ' + ', '.join(map(repr, dict.fromkeys(told))) + ')' if told else ''}. Give one of these as"
            " `metric`, or log the score with `self.log` in the evaluation step."
        )


def own_metrics(trainer: pl.Trainer) -> dict[str, str | None]:
    """The metric that each task of the Trainer's stream names for itself."""
    tasks = getattr(getattr(trainer, "datamodule", None), "tasks", ())
    return {task.name: task.metric for task in tasks if hasattr(task, "metric")}


def _joined(parts: list[Reading]) -> Reading:
    """One reading from those of all ranks."""
    first = parts[0]
    values = [part.value for part in parts]
    # A metric logged without `sync_dist` differs over the ranks; their decisions must not.
    value = values[0] if len(set(values)) == 1 else sum(values) / len(values)
    scores = [part.scores or [] for part in parts]
    # Each rank holds its own rows, or (CausalLMModule) every rank holds all of them.
    whole = all(part == scores[0] for part in scores) and (first.rows is None or len(scores[0]) >= first.rows)
    joined = scores[0] if whole else [score for part in scores for score in part]
    usable = bool(joined) and _same_unit(value, joined)
    return Reading(first.label, value, len(joined) or first.rows, joined if usable else None)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.numel() == 1)


def _same_unit(value: float, scores: list[float]) -> bool:
    """Whether the rows' scores can be what the value is the mean of (a percentage of shares is not)."""
    mean = sum(scores) / len(scores)
    return abs(mean - value) <= max(0.02, 0.25 * max(abs(mean), abs(value)))
