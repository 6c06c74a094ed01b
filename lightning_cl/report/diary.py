# SPDX-License-Identifier: Apache-2.0
"""What a run writes down on its way for the report: time, memory, validation curves and loss terms."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

#: At most this many values of a loss term are kept; beyond, every second one is dropped.
MOST_POINTS = 400
_TERM = re.compile(r"cl/.+|(train[_/])?loss(_step)?")


@dataclass
class Diary:
    """Notes in plain types; they stay few, however long the run is.

    Attributes:
        costs: seconds, optimizer steps and peak memory by stage.
        curves: each validation inside a fit: stage, logger step, task, value.
        terms: the loss and its added terms by name: [[logger step, value], ...].
        strides: least distance in steps between two kept values of a term.

    Example:
        >>> diary = Diary()
        >>> diary.take_down({"cl/kl": 0.5, "val_acc": 0.9}, step=10)
        >>> diary.terms
        {'cl/kl': [[10, 0.5]]}
    """

    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    curves: list[list[Any]] = field(default_factory=list)
    terms: dict[str, list[list[float]]] = field(default_factory=dict)
    strides: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._started: dict[str, float] = {}

    def start(self, clock: str) -> None:
        """Start ``"prepare_seconds"``, ``"train_seconds"`` or ``"evaluation_seconds"``."""
        self._started[clock] = time.monotonic()

    def stop(self, clock: str, stage: int) -> None:
        """Book the time since the start, if there was one, on a stage."""
        started = self._started.pop(clock, None)
        if started is None:
            return
        seconds = time.monotonic() - started
        cost = self.costs.setdefault(str(stage), {})
        cost[clock] = cost.get(clock, 0.0) + seconds
        if clock == "evaluation_seconds" and "train_seconds" in self._started:
            # A validation inside a fit is not training.
            self._started["train_seconds"] += seconds

    def end_task(self, stage: int, steps: int) -> None:
        """Book the end of a task's training."""
        self.stop("train_seconds", stage)
        cost = self.costs.setdefault(str(stage), {})
        cost["steps"] = float(steps)
        if torch.cuda.is_available():
            cost["peak_memory_bytes"] = float(torch.cuda.max_memory_allocated())

    def add_validation(self, stage: int, step: int, scores: Iterable[tuple[str, float]]) -> None:
        """Note a validation inside a fit."""
        self.curves += [[stage, step, task, value] for task, value in scores]

    def take_down(self, metrics: Mapping[str, Any], step: int) -> None:
        """Keep the loss and its terms among the metrics, thinner and thinner as they grow many."""
        for name, value in metrics.items():
            if not _TERM.fullmatch(name):
                continue
            points = self.terms.setdefault(name, [])
            if points and step - points[-1][0] < self.strides.get(name, 1):
                continue
            points.append([step, float(value)])
            if len(points) > MOST_POINTS:
                del points[1::2]
                self.strides[name] = int(points[-1][0] - points[-2][0])

    def to_dict(self) -> dict[str, Any]:
        """The notes for a checkpoint; ``Diary(**saved)`` reads them back."""
        return asdict(self)
