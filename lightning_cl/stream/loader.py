# SPDX-License-Identifier: Apache-2.0
"""A loader whose position is the number of batches trained, whatever was fetched ahead and by how many workers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, islice
from typing import Any

import torch
from lightning.fabric.utilities.data import sized_len
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data._utils import worker as _worker

from lightning_cl.stream.plan import batch_sizes, batches_of_stream, part_of

#: What :meth:`TaskLoader.position` returns: the epoch, and how much of it is behind.
Position = dict[str, int]


def is_iterable(dataset: Any) -> bool:
    """Whether a source is read in order (no ``__getitem__``)."""
    return isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")


class TaskLoader:
    """Batches of one task's rows: each row once an epoch over all processes and workers, from any position on.

    All processes follow one plan, so they take equally many batches and share each global batch as evenly as possible;
    a process's batches do not depend on ``num_workers``. The order of the rows depends on ``seed`` and the epoch alone.
    Iterable sources are read whole by every process and worker, each of which keeps its own rows.

    It is no ``torch.utils.data.DataLoader``, so that Lightning does not put a ``DistributedSampler`` in it, which
    repeats rows. It is stateful in Lightning's and torchdata's sense (``state_dict`` and ``load_state_dict``).

    Args:
        dataset: a map or an iterable source.
        batch_size: rows of a process's batch.
        collate_fn: list of rows -> batch.
        shuffle: whether each epoch has another order (map sources).
        seed: of the order.
        rank: this process.
        world_size: number of processes.
        num_workers: worker processes.
        pin_memory: see ``torch.utils.data.DataLoader``.
        persistent_workers: keep the workers between epochs (map sources).
        position: where to begin, from :meth:`position`.
        order: the rows in the order of an epoch without shuffling (map sources); by default as they stand.
        encode: (row, its number) -> row, for the rows of an iterable source that this process keeps.
        beginning: the first ``state_dict()`` of an iterable source that has one; a resume reads the source from there.

    Example:
        >>> loader = TaskLoader(list(range(5)), batch_size=2, collate_fn=list)
        >>> list(loader), len(loader)
        ([[0, 1], [2, 3], [4]], 3)
        >>> resumed = TaskLoader(list(range(5)), 2, list, position=loader.position(batches=2))
        >>> list(resumed), len(resumed)
        ([[4]], 3)
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        collate_fn: Callable[[list[Any]], Any],
        shuffle: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
        persistent_workers: bool = False,
        position: Position | None = None,
        order: Sequence[int] | None = None,
        encode: Callable[[Any, int], Any] | None = None,
        beginning: Any = None,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.collate_fn = collate_fn
        self.shuffle = shuffle
        self.num_workers = num_workers
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._streams = is_iterable(dataset)
        self._start: Position = dict(position or {"epoch": 0, "batches": 0, "rows": 0})
        self._order = order
        self._encode = encode
        self._beginning = beginning
        self._ends: dict[int, int] = {}
        self._taken = 0
        self._options: dict[str, Any] = {
            "num_workers": num_workers,
            "pin_memory": pin_memory,
            # With a generator of its own no iterator draws its workers' seed from the global random state.
            "generator": torch.Generator(),
        }
        self._map_loader: DataLoader | None = None
        if not self._streams:
            self._map_loader = DataLoader(
                dataset,
                batch_sampler=_Indices(self),
                collate_fn=collate_fn,
                persistent_workers=persistent_workers and num_workers > 0,
                **self._options,
            )
        #: Called with the epoch whenever Lightning announces one.
        self.on_epoch: Callable[[int], None] | None = None
        # Where Lightning looks for a `set_epoch`.
        self.batch_sampler = _Clock(self)

    def set_epoch(self, epoch: int) -> None:
        """Begin epoch ``epoch``; in the epoch of the position given, what is behind stays behind."""
        if epoch != self._start["epoch"]:
            self._start = {"epoch": epoch, "batches": 0, "rows": 0}
        if self.on_epoch is not None:
            self.on_epoch(epoch)

    def __len__(self) -> int:
        """Batches of the whole epoch, with those that are behind."""
        rows = sized_len(self.dataset)
        if rows is None:
            raise TypeError(f"a stream of `{type(self.dataset).__name__}` has no length")
        return self._start["batches"] + len(self._sizes(rows))

    def __iter__(self) -> Iterator[Any]:
        """The batches of the epoch that are not behind."""
        # Nothing is read before the first batch is asked for: Lightning makes iterators before it announces the epoch.
        self._taken = self._start["batches"]
        self._options["generator"].manual_seed(self._mix(self._start["epoch"], self._rank + 1))
        if self._map_loader is not None:
            for batch in self._map_loader:
                self._taken += 1
                yield batch
            return
        self._ends = {}
        if self._start["batches"] and self._beginning is not None:
            self.dataset.load_state_dict(copy.deepcopy(self._beginning))
        stream = _RowStream(self.dataset, self.batch_size, self._rank, self._world_size, self._start)
        # Without a batch size the DataLoader gives what the stream yields, a whole batch, to `collate_fn`.
        collate: Any = _EndAndBatch(self.collate_fn, self._encode)
        for end, batch in DataLoader(stream, batch_size=None, collate_fn=collate, **self._options):
            self._taken += 1
            self._ends[self._taken] = end
            # A checkpoint never asks for a batch that lies further back than what Lightning fetches ahead.
            self._ends.pop(self._taken - 16, None)
            yield batch

    def position(self, batches: int | None = None) -> Position:
        """Where the epoch stands after ``batches`` of its batches (all that were taken, by default)."""
        batches = self._taken if batches is None else batches
        done = batches - self._start["batches"]
        if done <= 0:
            rows = self._start["rows"]
        elif self._streams:
            rows = self._ends[batches]
        else:
            rows = self._start["rows"] + sum(self._sizes(len(self.dataset))[:done])
        return {"epoch": self._start["epoch"], "batches": batches, "rows": rows}

    def state_dict(self) -> dict[str, Any]:
        """The position after the batches taken so far."""
        return dict(self.position())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin the next iteration there."""
        self._start, self._taken = dict(state), state["batches"]

    def _sizes(self, rows: int) -> list[int]:
        return batch_sizes(rows - self._start["rows"], self.batch_size, self._world_size)

    def _mix(self, *parts: int) -> int:
        value = self._seed
        for part in parts:
            value = (value * 6364136223846793005 + part * 1442695040888963407 + 1) % 2**63
        return value

    def _epoch_indices(self) -> Iterator[list[int]]:
        rows = len(self.dataset)
        if self.shuffle:
            generator = torch.Generator().manual_seed(self._mix(self._start["epoch"], 0))
            order: Sequence[int] = torch.randperm(rows, generator=generator).tolist()
        else:
            order = range(rows) if self._order is None else self._order
        sizes = self._sizes(rows)
        for size, end in zip(sizes, accumulate(sizes, initial=self._start["rows"]), strict=False):
            yield [order[i] for i in part_of(end, size, self._rank, self._world_size)]

    # Lightning shuts workers down through this attribute of a loader.
    @property
    def _iterator(self) -> Any:
        return None if self._map_loader is None else self._map_loader._iterator

    @_iterator.setter
    def _iterator(self, value: Any) -> None:
        if self._map_loader is not None:
            self._map_loader._iterator = value


class _Indices:
    """The batch sampler of a map source: this process's indices of the current epoch."""

    def __init__(self, loader: TaskLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[list[int]]:
        return self._loader._epoch_indices()

    def __len__(self) -> int:
        return len(self._loader)


class _Clock:
    def __init__(self, loader: TaskLoader) -> None:
        self.sampler = self
        self._loader = loader

    def set_epoch(self, epoch: int) -> None:
        self._loader.set_epoch(epoch)


class _EndAndBatch:
    """Collates the rows and lets the position through; a class, so that workers can be started by ``spawn`` too."""

    def __init__(self, collate_fn: Callable[[list[Any]], Any], encode: Callable[[Any, int], Any] | None) -> None:
        self._collate_fn = collate_fn
        self._encode = encode

    def __call__(self, item: tuple[int, int, list[Any]]) -> tuple[int, Any]:
        end, first, rows = item
        if self._encode is not None:
            rows = [self._encode(row, first + i) for i, row in enumerate(rows)]
        return end, self._collate_fn(rows)


class _RowStream(IterableDataset):
    """This worker's batches of an iterable source, each with the number of rows used after it."""

    def __init__(self, dataset: Iterable[Any], batch_size: int, rank: int, world_size: int, start: Position) -> None:
        self._dataset = dataset
        self._batch_size = batch_size
        self._rank = rank
        self._world_size = world_size
        self._start = start

    def __iter__(self) -> Iterator[tuple[int, int, list[Any]]]:
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        set_epoch = getattr(self._dataset, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(self._start["epoch"])
        rows = islice(_read_as_one(self._dataset), self._start["rows"], None)
        batches = batches_of_stream(rows, self._batch_size, self._rank, self._world_size, self._start["rows"])
        for number, batch in enumerate(batches):
            # The DataLoader takes from its workers in turn, so this gives the order that one worker would give.
            if number % workers == worker:
                yield batch


def _read_as_one(dataset: Iterable[Any]) -> Iterator[Any]:
    """Reads a source as if there were no workers: what a source does about them itself would lose rows here."""
    iterator = None
    while True:
        info, _worker._worker_info = _worker._worker_info, None
        try:
            iterator = iter(dataset) if iterator is None else iterator
            row = next(iterator)
        except StopIteration:
            return
        finally:
            _worker._worker_info = info
        yield row
