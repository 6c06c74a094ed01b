# SPDX-License-Identifier: Apache-2.0
"""Which task an evaluation loader belongs to, in streams and in projects that know nothing of them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn

Loop = Literal["val", "test"]


class LoaderNames:
    """Names the loaders of each evaluation.

    A :class:`~lightning_cl.TaskStream` says itself which task a loader belongs to. Elsewhere, in this order: a data set
    object that was named before keeps its name; the keys of a dict of loaders; the given names, or ``task_0``,
    ``task_1``, ..., by position. A single loader that was never seen, in a later task than the first, is taken as the
    current task's: counted as the first task's, it would show learning as transfer.

    Args:
        names: the tasks' names by position.
    """

    def __init__(self, names: Sequence[str] | None = None) -> None:
        self.names = list(names) if names is not None else None
        self._seen: list[tuple[weakref.ref[Any], str]] = []

    def of(self, trainer: pl.Trainer, stage: int) -> list[str]:
        """The task of each loader of the evaluation that runs, by ``dataloader_idx``."""
        loop = loop_of(trainer)
        stream: Any = getattr(trainer, "datamodule", None)
        if hasattr(stream, "loader_tasks"):
            return [task.name for task in stream.loader_tasks(loop)]
        loaders = loaders_of(trainer)
        if isinstance(loaders, Mapping):
            return self._remember([str(key) for key in loaders], list(loaders.values()))
        listed = list(loaders) if isinstance(loaders, (list, tuple)) else [loaders]
        names = []
        for position, loader in enumerate(listed):
            known = self._known(loader)
            alone = len(listed) == 1 and stage > 0 and (self.names is None or len(self.names) > 1)
            names.append(known or self._by_position(stage if alone else position))
        if len(set(names)) < len(names):
            names = [self._by_position(position) for position in range(len(listed))]
        return self._remember(names, listed)

    def _by_position(self, position: int) -> str:
        if self.names is not None and position < len(self.names):
            return self.names[position]
        return f"task_{position}"

    def _known(self, loader: Any) -> str | None:
        dataset = getattr(loader, "dataset", None)
        return next((name for ref, name in self._seen if dataset is not None and ref() is dataset), None)

    def _remember(self, names: list[str], loaders: list[Any]) -> list[str]:
        self._seen = [(ref, name) for ref, name in self._seen if ref() is not None]
        for name, loader in zip(names, loaders, strict=True):
            dataset = getattr(loader, "dataset", None)
            if dataset is not None and self._known(loader) is None:
                try:
                    self._seen.append((weakref.ref(dataset), name))
                except TypeError:
                    continue  # lists and tuples take no weak references: their position names them
        return names


def loop_of(trainer: pl.Trainer) -> Loop:
    """Whether the evaluation that runs is a validation (also inside a fit) or a test."""
    return "test" if trainer.state.fn == TrainerFn.TESTING else "val"


def loaders_of(trainer: pl.Trainer) -> Any:
    """The loaders of the evaluation that runs, as the project gave them."""
    if trainer.state.fn == TrainerFn.TESTING:
        loop = trainer.test_loop
    elif trainer.state.fn == TrainerFn.VALIDATING:
        # `trainer.val_dataloaders` would still show those of an earlier fit.
        loop = trainer.validate_loop
    else:
        loop = trainer.fit_loop.epoch_loop.val_loop
    combined = loop._combined_loader
    return [] if combined is None else combined.iterables


def loader_count(trainer: pl.Trainer) -> int:
    """Number of validation loaders given to ``trainer.fit`` itself; 1 where a hook will make them."""
    source = getattr(trainer.fit_loop.epoch_loop.val_loop, "_data_source", None)
    loaders = getattr(source, "instance", None)
    return len(loaders) if isinstance(loaders, (list, tuple, Mapping)) else 1


def rows_of_loader(trainer: pl.Trainer, index: int) -> int | None:
    """Number of rows that one loader gives in the evaluation that runs, where that can be known."""
    loaders = loaders_of(trainer)
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    loader = loaders[index] if isinstance(loaders, (list, tuple)) else loaders
    batches = (trainer.num_test_batches if loop_of(trainer) == "test" else trainer.num_val_batches)[index]
    try:
        rows, length = len(loader.dataset), len(loader)
    except (AttributeError, TypeError):
        return None
    if batches >= length:
        return rows
    size = getattr(loader, "batch_size", None)
    return None if size is None else min(rows, int(batches) * size * trainer.world_size)
