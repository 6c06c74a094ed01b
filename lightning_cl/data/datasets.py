# SPDX-License-Identifier: Apache-2.0
"""Datasets that encode their rows when they are asked for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Literal

from torch.utils.data import Dataset, IterableDataset, get_worker_info

from lightning_cl.data.encoding import IGNORE_INDEX, Encoder
from lightning_cl.data.errors import DataError
from lightning_cl.data.examples import clean_example, example_characters, example_kind, metric_problem

Mode = Literal["train", "eval"]


class EncodedDataset(Dataset[Any]):
    """Rows of a map-style source, encoded one by one; rows that are no text rows pass through unchanged.

    A negative index is a **filler**: the row ``-1 - index``, encoded as usual but marked as not to be counted
    (``row`` is -1, labels are -100). :class:`~lightning_cl.data.EvalSampler` uses fillers to give every rank the same
    number of batches while each row counts once.

    Args:
        rows: a list of rows or any map-style dataset, as :func:`~lightning_cl.data.read_rows` returns it.
        encoder: the encoder; None when no row is text.
        mode: ``"train"`` or ``"eval"``.
        metric: the metric of evaluation, see :meth:`Encoder.encode_eval`.
        keep: whether encoded rows are kept: for rows that are evaluated again and again (8 bytes a token).

    Raises:
        TypeError: for a source without length or index.
    """

    def __init__(
        self,
        rows: Any,
        encoder: Encoder | None,
        mode: Mode = "train",
        metric: str | None = None,
        keep: bool = False,
    ) -> None:
        if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
            raise TypeError(f"{type(rows).__name__} has no length or index: use `EncodedIterableDataset`.")
        self.rows = rows
        self.encoder = encoder
        self.mode: Mode = mode
        self.metric = metric
        self._kept: dict[int, Any] | None = {} if keep else None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        place = index if index >= 0 else -1 - index
        item = None if self._kept is None else self._kept.get(place)
        if item is None:
            item = _encode(self.rows[place], self.encoder, self.mode, self.metric, f"row {place}")
            if self._kept is not None:
                self._kept[place] = item
        if isinstance(item, dict) and "metric" in item:
            return {**item, "row": index if index >= 0 else -1}
        if index < 0 and isinstance(item, dict) and "labels" in item:
            return {**item, "labels": item["labels"].clone().fill_(IGNORE_INDEX)}
        return item

    def lengths(self) -> list[int]:
        """Characters of each row, a measure of its length that costs no tokenizing; 0 for what is no text."""
        return [example_characters(self.rows[i]) if example_kind(self.rows[i]) else 0 for i in range(len(self.rows))]


class EncodedIterableDataset(IterableDataset[Any]):
    """Rows of an iterable source, encoded one by one and shared out over ranks and workers.

    The source yields every row, whoever asks; each rank and worker takes its own part, so that each row is seen once.
    A Hugging Face ``IterableDataset`` is split by its own means (``split_dataset_by_node``, its shards over workers).

    Args:
        rows: any iterable over rows.
        encoder: the encoder; None when no row is text.
        mode: ``"train"`` or ``"eval"``.
        metric: the metric of evaluation.
        rank: this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        rows: Any,
        encoder: Encoder | None,
        mode: Mode = "train",
        metric: str | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._splits_itself = _is_hub_iterable(rows)
        if self._splits_itself and world_size > 1:
            from datasets.distributed import split_dataset_by_node

            rows = split_dataset_by_node(rows, rank=rank, world_size=world_size)
        self.rows = rows
        self.encoder = encoder
        self.mode: Mode = mode
        self.metric = metric
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[Any]:
        numbered: Iterator[tuple[int, Any]] = enumerate(self.rows)
        if not self._splits_itself:
            worker = get_worker_info()
            workers = worker.num_workers if worker else 1
            part = self.rank * workers + (worker.id if worker else 0)
            numbered = itertools.islice(numbered, part, None, self.world_size * workers)
        for number, row in numbered:
            item = _encode(row, self.encoder, self.mode, self.metric, f"row {number}")
            if isinstance(item, dict) and "metric" in item:
                item["row"] = number
            yield item


def _encode(row: Any, encoder: Encoder | None, mode: Mode, metric: str | None, where: str) -> Any:
    if encoder is None or example_kind(row) is None:
        return row
    row = clean_example(row, where)
    if mode == "train":
        return encoder.encode_train(row)
    problem = metric_problem(row, metric)
    if problem is not None:
        raise DataError(f"{where}: {problem}.")
    return encoder.encode_eval(row, metric)


def _is_hub_iterable(rows: Any) -> bool:
    return any(c.__module__.startswith("datasets.") and c.__name__ == "IterableDataset" for c in type(rows).__mro__)
