# SPDX-License-Identifier: Apache-2.0
"""Evaluation on several ranks in which each row counts once and no rank waits for another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler
from torchmetrics import Metric


class CountedRows:
    """Takes the repeated row out of what a ``DistributedSampler`` gives a rank.

    The sampler fills up the ranks that have a row less with a repeated one. Here it is left out, unless its rank would
    then have a batch less than the others and, under FSDP, leave them waiting: then it stays, alone in its batch, and
    :func:`run_step` runs that batch without counting it.

    Args:
        sampler: an evaluation sampler (without shuffling).
        batch_size: rows of a batch.

    Attributes:
        filler: index of the batch that must not count, or None.

    Example:
        >>> sampler = DistributedSampler(range(5), num_replicas=2, rank=1, shuffle=False)
        >>> list(sampler), list(CountedRows(sampler, batch_size=2)), list(CountedRows(sampler, batch_size=3))
        ([1, 3, 0], [1, 3, 0], [1, 3])
    """

    def __init__(self, sampler: DistributedSampler, batch_size: int) -> None:
        self.sampler = sampler
        rows = len(sampler)
        extra = len(sampler.dataset) % sampler.num_replicas  # type: ignore[arg-type]
        repeated = extra != 0 and sampler.rank >= extra
        alone = repeated and rows % batch_size == 1 % batch_size
        self.filler = (rows - 1) // batch_size if alone else None
        self._length = rows - 1 if repeated and not alone else rows

    def __iter__(self) -> Iterator[int]:
        for position, index in enumerate(self.sampler):
            if position < self._length:
                yield index

    def __len__(self) -> int:
        return self._length

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on."""
        self.sampler.set_epoch(epoch)


def count_each_row_once(dataloader: object) -> object:
    """Take repeated rows out of an evaluation loader that Lightning has spread over the ranks, in place.

    Training loaders, which are shuffled, loaders with batch samplers or samplers of their own, and loaders that drop the
    last batch anyway stay as they are.
    """
    if not isinstance(dataloader, DataLoader):
        return dataloader
    batches = dataloader.batch_sampler
    if type(batches) is not BatchSampler or batches.drop_last:
        return dataloader
    sampler = batches.sampler
    if type(sampler) in (DistributedSampler, DistributedSamplerWrapper) and not sampler.shuffle:  # type: ignore[union-attr]
        batches.sampler = CountedRows(sampler, batches.batch_size)  # type: ignore[arg-type]
    return dataloader


def run_step(module: Any, args: tuple[Any, ...], call: Callable[[], Any]) -> Any:
    """Run an evaluation step; one whose batch is a filler leaves logged values and metrics as they were.

    Args:
        module: the LightningModule.
        args: the step's arguments: batch, its index and, with several loaders, the loader's index.
        call: runs the step.
    """
    if not _is_filler(module, args):
        return call()
    with _uncounted(module):
        return call()


def _is_filler(module: Any, args: tuple[Any, ...]) -> bool:
    loaders = module.trainer._evaluation_loop._combined_loader
    if loaders is None or len(args) < 2:
        return False
    loader = loaders.flattened[args[2] if len(args) > 2 else 0]
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    return isinstance(sampler, CountedRows) and sampler.filler == args[1]


@contextmanager
def _uncounted(module: Any) -> Iterator[None]:
    before = {id(m): (m._copy_state_dict(), m._update_count, m._computed) for m in _metrics(module)}
    log = module.log
    inside = "log" in module.__dict__

    def log_without_weight(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        # The name must be logged, since its reduction is collective. A repeated row changes no minimum or maximum.
        kwargs["batch_size"] = 0
        summed = kwargs.get("reduce_fx") in ("sum", torch.sum)
        log(name, value * 0 if summed and not isinstance(value, Metric) else value, *args, **kwargs)

    module.__dict__["log"] = log_without_weight
    try:
        yield
    finally:
        if inside:
            module.__dict__["log"] = log
        else:
            del module.__dict__["log"]
        for metric in _metrics(module):
            if id(metric) not in before:
                metric.reset()
                continue
            state, metric._update_count, metric._computed = before[id(metric)]
            for name, value in state.items():
                setattr(metric, name, value)


def _metrics(module: Any) -> list[Any]:
    return [part for part in module.modules() if isinstance(part, Metric)]
