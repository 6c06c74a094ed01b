# SPDX-License-Identifier: Apache-2.0
"""Episodic memory: rows of past tasks, kept within a fixed capacity."""

from __future__ import annotations

import hashlib
import heapq
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_cl.distributed import gather_objects, rank, world_size
from lightning_cl.replay.rows import Row
from lightning_cl.replay.shuffle import ShuffledWalk
from lightning_cl.replay.source import ReplaySource

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_cl.attachment import Attachment

# Priorities are 62-bit integers: they survive JSON, int64 tensors and negation.
_PRIORITY_RANGE = 1 << 62


class EpisodicMemory(ReplaySource):
    """Keeps rows of the tasks that were trained on and replays them in later ones.

    Rows are taken from the training batches as they pass by, each once. The memory of all ranks is one: every row has a
    priority, a hash of its content and of ``seed``, and the ``capacity`` rows of lowest priority are kept. That is a
    uniform sample without replacement of all rows seen (reservoir sampling by random keys: Efraimidis and Spirakis,
    Information Processing Letters 97, 2006), and it is the same sample whatever the number of ranks, the order of the
    rows, or a restart in between.

    Args:
        capacity: rows kept in all.
        policy: ``"reservoir"`` (uniform over all rows seen), ``"ring"`` (the latest rows), or ``"task_balanced"`` (an
            equal share of the capacity for each task seen).
        replay_current_task: also replay rows of the task they came from, while it is being trained.
        device: where the rows are kept: ``"cpu"``, or ``"model"`` for the device of the model.
        seed: chooses the rows and the order in which they are replayed.

    Raises:
        ValueError: for a capacity below 1, or an unknown policy or device.

    Example:
        >>> memory = EpisodicMemory(capacity=2)
        >>> memory.observe([Row({"x": torch.tensor([float(i)])}, id=str(i), task="a") for i in range(5)])
        >>> memory.end_task(None, None, 0)
        >>> len(memory)
        2
    """

    def __init__(
        self,
        capacity: int,
        policy: Literal["reservoir", "ring", "task_balanced"] = "reservoir",
        replay_current_task: bool = False,
        device: Literal["cpu", "model"] = "cpu",
        seed: int = 0,
    ) -> None:
        if capacity < 1:
            raise ValueError(
                f"`EpisodicMemory(capacity={capacity})`: a memory must hold at least 1 row. Leave the source out to train"
                " without a memory."
            )
        if policy not in ("reservoir", "ring", "task_balanced"):
            raise ValueError(f'`EpisodicMemory(policy={policy!r})`: use "reservoir", "ring" or "task_balanced".')
        if device not in ("cpu", "model"):
            raise ValueError(f'`EpisodicMemory(device={device!r})`: use "cpu", or "model" for the device of the model.')
        self.capacity = capacity
        self.policy = policy
        self.replay_current_task = replay_current_task
        self.device = device
        self.seed = seed
        self._walk = ShuffledWalk(seed)
        self._kept: list[tuple[int, Row]] = []
        # Candidates of the current task: a heap of (-priority, arrival, row), so that the worst is dropped first.
        self._candidates: list[tuple[int, int, Row]] = []
        self._candidate_ids: set[str] = set()
        self._tasks: list[str] = []
        self._arrivals = 0
        self._task = ""
        self._first_epoch = True
        self._trainer: pl.Trainer | None = None
        self._place = torch.device("cpu")

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def holds_past_tasks(self) -> bool:
        """Always: that is what a memory is for."""
        return True

    def start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, attachment: Attachment) -> None:
        """Bring the rows to the device that they belong to."""
        self._trainer = trainer
        if self.device == "model":
            self._place = pl_module.device
            self._place_rows()

    @property
    def observes(self) -> bool:
        """Rows are taken in a task's first epoch: later ones bring the same rows again."""
        return self._trainer is None or self._trainer.current_epoch == 0

    def observe(self, rows: list[Row]) -> None:
        """Take rows of the current task into the draw."""
        for row in rows:
            if row.id in self._candidate_ids:
                continue
            self._arrivals += 1
            entry = (-self._priority(row), self._arrivals, row)
            if len(self._candidates) < self.capacity:
                heapq.heappush(self._candidates, entry)
            elif entry > self._candidates[0]:
                dropped = heapq.heapreplace(self._candidates, entry)
                self._candidate_ids.discard(dropped[2].id)
            else:
                continue
            self._candidate_ids.add(row.id)
            row.source = self.name

    def available(self) -> int:
        """Rows that can be replayed now."""
        return len(self._kept) + (len(self._candidates) if self.replay_current_task else 0)

    def draw(self, count: int, rank: int, world_size: int) -> list[Row]:
        """The next ``count`` rows of the shuffled walk over the memory."""
        kept = len(self._kept)
        drawn = []
        for index in self._walk.take(count, self.available(), rank, world_size):
            drawn.append(self._kept[index][1] if index < kept else self._candidates[index - kept][2])
        return drawn

    def end_task(self, trainer: pl.Trainer | None, pl_module: pl.LightningModule | None, task_index: int) -> None:
        """Put the task's rows, of all ranks, into the memory, and drop what exceeds the capacity."""
        entries = [*self._kept, *self._all_candidates()]
        self._tasks += [task for task in dict.fromkeys(r.task or "" for _, r in entries) if task not in self._tasks]
        self._kept = self._within_capacity(entries)
        self._place_rows()
        self._candidates, self._candidate_ids = [], set()

    def _priority(self, row: Row) -> int:
        if self.policy == "ring":
            # Newer rows have lower priority numbers, which are kept; ranks interleave.
            return _PRIORITY_RANGE - (self._arrivals * world_size() + rank())
        # A hash, not a random number: a row has the same priority on every rank, in every epoch and after a restart.
        digest = hashlib.blake2b(f"{self.seed}:{row.id}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % _PRIORITY_RANGE

    def _within_capacity(self, entries: list[tuple[int, Row]]) -> list[tuple[int, Row]]:
        by_priority = sorted(entries, key=lambda entry: (entry[0], entry[1].id))
        if self.policy != "task_balanced":
            return by_priority[: self.capacity]
        # Shares differ by one row where the capacity does not divide; what one task cannot fill goes to the others.
        groups = {task: [e for e in by_priority if (e[1].task or "") == task] for task in self._tasks}
        kept: list[tuple[int, Row]] = []
        room, tasks = self.capacity, sorted(groups, key=lambda task: len(groups[task]))
        for position, task in enumerate(tasks):
            share = room // (len(tasks) - position)
            kept += groups[task][:share]
            room -= min(share, len(groups[task]))
        return sorted(kept, key=lambda entry: (entry[0], entry[1].id))

    def _all_candidates(self) -> list[tuple[int, Row]]:
        """The candidates of all ranks, each row once; equal on all ranks. A collective call."""
        mine = [(-negated, row) for negated, _, row in self._candidates]
        if world_size() == 1:
            return mine
        unique = {row.id: (priority, row) for part in gather_objects(mine) for priority, row in part}
        return list(unique.values())

    def _place_rows(self) -> None:
        if self._place.type == "cpu":
            return
        for _, row in self._kept:
            row.content = {k: v.to(self._place) if isinstance(v, Tensor) else v for k, v in row.content.items()}

    def state_dict(self) -> dict[str, Any]:
        """The rows, the current task's candidates of all ranks, and the place in the walk. A collective call."""
        candidates = self._all_candidates()
        return {
            "kept": _pack(self._kept),
            "candidates": _pack(candidates),
            "tasks": list(self._tasks),
            "arrivals": max(gather_objects(self._arrivals)),
            "walk": self._walk.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the memory back. Every rank takes all candidates; they are united again when the task ends."""
        self._kept = [(priority, self._mine(row)) for priority, row in _unpack(state["kept"])]
        self._arrivals = state["arrivals"]
        self._tasks = list(state["tasks"])
        self._candidates, self._candidate_ids = [], set()
        for order, (priority, row) in enumerate(_unpack(state["candidates"])):
            heapq.heappush(self._candidates, (-priority, order, self._mine(row)))
            self._candidate_ids.add(row.id)
        self._walk.load_state_dict(state["walk"])
        self._place_rows()

    def _mine(self, row: Row) -> Row:
        row.source = self.name
        return row


def _pack(entries: list[tuple[int, Row]]) -> dict[str, Any]:
    """Rows as a few long tensors: a million rows are then as quick to save as one."""
    paths = sorted({path for _, row in entries for path in row.content})
    columns: dict[str, Any] = {}
    for path in paths:
        values = [row.content.get(path) for _, row in entries]
        if all(isinstance(v, Tensor) for v in values):
            tensors = [v.cpu() for v in values if isinstance(v, Tensor)]
            columns[path] = {
                "data": torch.cat([t.reshape(-1) for t in tensors]),
                "shapes": [list(t.shape) for t in tensors],
            }
        else:
            columns[path] = {"values": values}
    rows = [row for _, row in entries]
    return {
        "columns": columns,
        "priorities": [priority for priority, _ in entries],
        "ids": [row.id for row in rows],
        "tokens": [row.tokens for row in rows],
        "tasks": [row.task for row in rows],
    }


def _unpack(state: dict[str, Any]) -> list[tuple[int, Row]]:
    contents: list[dict[str, Any]] = [{} for _ in state["ids"]]
    for path, column in state["columns"].items():
        if "values" in column:
            values = column["values"]
        else:
            sizes = [torch.Size(shape).numel() for shape in column["shapes"]]
            values = [
                part.reshape(s).clone() for part, s in zip(column["data"].split(sizes), column["shapes"], strict=True)
            ]
        for content, value in zip(contents, values, strict=True):
            if value is not None:
                content[path] = value
    rows = [
        Row(content, *meta)
        for content, *meta in zip(contents, state["ids"], state["tokens"], state["tasks"], strict=True)
    ]
    return list(zip(state["priorities"], rows, strict=True))
