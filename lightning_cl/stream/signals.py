# SPDX-License-Identifier: Apache-2.0
"""Signals of the scheduler, acted on by all processes of a run at the same step."""

from __future__ import annotations

import signal
from typing import Any

import lightning.pytorch as pl

from lightning_cl.distributed import sum_over_ranks, world_size


class AgreedSignals:
    """Notes SIGTERM and SLURM's requeue signal when they come, and acts when every process has reached the same step.

    A scheduler signals the processes of a run one after the other, each at another place of its step. Lightning's own
    handlers make collective calls there (a broadcast, a checkpoint), which meet other calls on the other processes and
    hang. With one process Lightning's handlers stay as they are.
    """

    def __init__(self) -> None:
        self._connector: Any = None
        self._terminate = self._requeue = False
        self._act_on_requeue: Any = None

    def take_over(self, trainer: pl.Trainer) -> None:
        """Put the notes in place of Lightning's handlers, before it registers them."""
        if world_size() == 1 or self._connector is not None:
            return
        connector: Any = trainer._signal_connector
        self._connector, self._act_on_requeue = connector, connector._slurm_sigusr_handler_fn

        def terminate(signum: int, frame: Any) -> None:
            if not self._terminate and trainer.strategy.launcher is not None:
                trainer.strategy.launcher.kill(signum)  # to the processes that this one started
            self._terminate = True

        def requeue(signum: int, frame: Any) -> None:
            self._requeue = True

        connector._sigterm_notifier_fn, connector._slurm_sigusr_handler_fn = terminate, requeue

    def give_back(self) -> None:
        """Leave the Trainer as it was."""
        if self._connector is not None:
            del self._connector._sigterm_notifier_fn, self._connector._slurm_sigusr_handler_fn
            self._connector = None

    def agree(self) -> None:
        """Act on what any process was told; called on all of them at the end of each step. Collective."""
        if self._connector is None:
            return
        terminate, requeue = sum_over_ranks([float(self._terminate), float(self._requeue)])
        if requeue:
            self._requeue = False
            self._act_on_requeue(signal.SIGUSR1, None)
        if terminate:
            self._connector.received_sigterm = True
