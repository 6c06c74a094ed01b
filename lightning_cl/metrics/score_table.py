# SPDX-License-Identifier: Apache-2.0
"""Where the task matrix keeps its cells: states of a torchmetrics metric, which survive checkpoints and join over ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_cl.metrics.scores import Range, Score, decode_names, flat, join, name_key

_STATES = {"names": torch.uint8, "cells": torch.int64, "values": torch.float64, "row_scores": torch.float64}


class ScoreTable(Metric):
    """The scores by (stage, task), and the tasks' names in their order.

    Every cell is one entry of ``cells`` (rank, stage, key of the name, rows, number of row scores), of ``values`` (value,
    lower, upper) and of ``row_scores``, so that concatenation over the ranks keeps them together.

    Args:
        tasks: the names, where they are known; else they are learnt in order of arrival.
        kwargs: arguments of :class:`torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = True

    names: Any
    cells: Any
    values: Any
    row_scores: Any

    def __init__(self, tasks: Sequence[str] | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.declared = None if tasks is None else list(tasks)
        self._index: dict[tuple[int, ...], int] = {}
        # The decoded cells, valid as long as the states hold these very tensors.
        self._seen: list[Tensor] = []
        self._seen_table: dict[tuple[int, str], Score] = {}
        for state in _STATES:
            self.add_state(state, default=[], dist_reduce_fx="cat", persistent=True)

    @property
    def tasks(self) -> list[str]:
        """All names, probes too, in the order given or learnt."""
        if self.declared is not None:
            return list(self.declared)
        return list(dict.fromkeys(decode_names(flat(self.names)))) if len(self.names) else []

    @property
    def stages(self) -> list[int]:
        """The stages with at least one score."""
        return sorted({stage for stage, _ in self._table()})

    def scores(self) -> dict[tuple[int, str], Score]:
        """Every known cell by (stage, task), in the metrics' own units."""
        return self._table()

    def score(self, stage: int, task: str) -> Score | None:
        """One cell, or None where nothing was measured."""
        return self._table().get((stage, task))

    def _store(self, stage: int, task: str, value: float, rows: int, interval: Range, scores: Tensor) -> None:
        key = self._learn(task)
        rank = torch.distributed.get_rank() if _distributed() else 0
        entry = {
            "cells": torch.tensor([rank, stage, key, rows, len(scores)], dtype=torch.int64, device=self.device),
            "values": torch.tensor([value, *interval], dtype=torch.float64, device=self.device),
            "row_scores": scores.to(self.device),
        }
        position = self._position([rank, stage, key])
        for state, tensor in entry.items():
            if position is None:
                getattr(self, state).append(tensor)
            else:
                getattr(self, state)[position] = tensor

    def _position(self, cell: list[int]) -> int | None:
        # The index is a memory of where cells lie; a reset or a loaded state makes it stale, which is checked.
        position = self._index.get(tuple(cell))
        if position is None or position >= len(self.cells) or self.cells[position][:3].tolist() != cell:
            if len(self._index) != len(self.cells) or position is not None:
                self._index = {tuple(known[:3].tolist()): i for i, known in enumerate(self.cells)}
            position = self._index.get(tuple(cell))
        if position is None:
            self._index[tuple(cell)] = len(self.cells)
        return position

    def _learn(self, task: str) -> int:
        if task not in (decode_names(flat(self.names)) if len(self.names) else ()):
            self.names.append(torch.tensor([*task.encode(), 0], dtype=torch.uint8, device=self.device))
        return name_key(task)

    def _table(self) -> dict[tuple[int, str], Score]:
        if not len(self.cells):
            return {}
        held = [*self.cells, *self.values]
        if len(held) == len(self._seen) and all(a is b for a, b in zip(held, self._seen, strict=True)):
            return dict(self._seen_table)
        cells = flat(self.cells).view(-1, 5).tolist()
        values = flat(self.values).view(-1, 3).tolist()
        scores = flat(self.row_scores).cpu()
        names = {name_key(name): name for name in decode_names(flat(self.names))}
        parts: dict[tuple[int, str], dict[int, Score]] = {}
        offset = 0
        for (rank, stage, key, rows, size), (value, low, high) in zip(cells, values, strict=True):
            per_row = scores[offset : offset + size] if size else None
            interval = None if math.isnan(low) else (low, high)
            score = Score(value, None if rows < 0 else rows, interval, per_row)
            parts.setdefault((stage, names[key]), {})[rank] = score
            offset += size
        order = {task: position for position, task in enumerate(self.tasks)}
        places = sorted(parts, key=lambda cell: (cell[0], order[cell[1]]))
        table = {place: join(list(parts[place].values())) for place in places}
        if isinstance(self.cells, list):
            self._seen, self._seen_table = held, table
        return dict(table)

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        # A rank without scores joins with empty tensors of the states' own dtypes: the gather needs equal ones.
        for state, dtype in _STATES.items():
            if isinstance(getattr(self, state), list):
                flat = [t.flatten() for t in getattr(self, state)]
                setattr(self, state, [torch.cat(flat) if flat else torch.zeros(0, dtype=dtype, device=self.device)])
        super()._sync_dist(dist_sync_fn, process_group)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if state_dict.get(prefix + "cells"):
            self._update_count = max(self._update_count, 1)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
