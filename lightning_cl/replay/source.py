# SPDX-License-Identifier: Apache-2.0
"""What a replay source is: it hands out rows, and may learn from the rows that pass by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from lightning_cl.replay.rows import Row

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_cl.attachment import Attachment


def replay_mixers(trainer: pl.Trainer) -> list[Any]:
    """The callbacks of a Trainer that add replay rows."""
    callbacks: list[Any] = getattr(trainer, "callbacks", [])
    return [callback for callback in callbacks if getattr(callback, "adds_replay_rows", False)]


def replay_sources(trainer: pl.Trainer) -> list[Any]:
    """Their sources, in order."""
    return [source for mixer in replay_mixers(trainer) for source in getattr(mixer, "sources", [])]


def replay_pad_values(trainer: pl.Trainer) -> dict[str, float]:
    """What they fill shorter rows with, by key."""
    return {key: value for mixer in replay_mixers(trainer) for key, value in mixer.pad_values.items()}


class ReplaySource(ABC):
    """Where :class:`~lightning_cl.callbacks.ReplayMixer` takes replay rows from.

    A source lives as long as its mixer and survives new Trainers. Its methods are called on every rank, in the order
    :meth:`prepare`, :meth:`start`, then :meth:`observe` and :meth:`draw` in each step, then :meth:`end_task`.
    """

    @property
    def holds_past_tasks(self) -> bool:
        """Whether the rows come from earlier tasks, which the model before the first task never learnt."""
        return False

    @property
    def name(self) -> str:
        """How rows of this source are labelled in ``step.replay.sources``: the class's name."""
        return type(self).__name__

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task_index: int) -> None:
        """Called in ``setup``, before sharding: read data, refuse what cannot work."""

    def start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, attachment: Attachment) -> None:
        """Called when the task starts and the model can be run: collect or generate what this task needs."""

    @property
    def version(self) -> int | None:
        """A number that changes with :meth:`known_rows`, on all ranks at once; None if rows are not known ahead."""
        return None

    def known_rows(self) -> list[Row]:
        """All rows that :meth:`draw` takes from until :attr:`version` changes, the same on all ranks."""
        return []

    def observe(self, rows: list[Row]) -> None:
        """Called with the task's own rows of a step, before replay rows are drawn."""

    @property
    def observes(self) -> bool:
        """Whether :meth:`observe` wants rows now; splitting a batch into rows is not free."""
        return False

    @abstractmethod
    def available(self) -> int:
        """How many different rows can be drawn now; equal on all ranks."""

    @abstractmethod
    def draw(self, count: int, rank: int, world_size: int) -> list[Row]:
        """Take this rank's ``count`` rows; the other ranks take ``count`` other rows in the same call."""

    def end_task(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task_index: int) -> None:
        """Called when the task has ended, on all ranks."""

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart: plain types and tensors; called on all ranks."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take :meth:`state_dict` back."""
