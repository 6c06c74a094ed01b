# SPDX-License-Identifier: Apache-2.0
"""A step of the twelfth task costs what a step of the third did: the same calls, and no tensor but the scores' more."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_cl import Task, TaskStream, fit_stream
from lightning_cl.callbacks import ForgettingMonitor, ReplayMixer
from lightning_cl.replay import EpisodicMemory
from tests.stream_tools import Scored, points, trainer

TASKS, ROWS = 12, 16


class Calls(pl.Callback):
    """Counts the Python and C functions that each training step calls, and the tensors that are alive at each task's end.

    Unlike seconds, calls are the same in every run: one loop more over what past tasks left behind shows at once.
    """

    def __init__(self) -> None:
        self.steps: list[list[int]] = []
        self.tensors: list[int] = []
        self._count = 0

    def on_train_start(self, *args: Any) -> None:
        self.steps.append([])

    def on_train_batch_start(self, *args: Any) -> None:
        self._count = 0
        sys.setprofile(self._called)

    def on_train_batch_end(self, *args: Any) -> None:
        sys.setprofile(None)
        self.steps[-1].append(self._count)

    def on_train_end(self, *args: Any) -> None:
        gc.collect()
        self.tensors.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))

    def _called(self, frame: Any, event: str, argument: Any) -> None:
        self._count += event in ("call", "c_call")


def mixer() -> ReplayMixer:
    # Full after the second task, so that later tasks find it as large as the third does.
    return ReplayMixer(EpisodicMemory(2 * ROWS, policy="ring"))


def assert_flat(calls: Calls, cells: int) -> None:
    """Nothing grows but the task matrix, by ``cells`` a task: its score, its place and the scores of its rows."""
    assert len(calls.steps) == TASKS
    # The first step of a fit sets up what the others use.
    second = calls.steps[2][1:]
    for task in range(3, TASKS):
        assert calls.steps[task][1:] == second, f"task {task} calls more or less than task 2"
    assert second[0] > calls.steps[0][1]  # task 0 has nothing to replay: the count sees what replay costs
    growth = [later - earlier for earlier, later in zip(calls.tensors[3:-1], calls.tensors[4:], strict=True)]
    assert growth == [3 * cells] * len(growth), growth


@pytest.mark.parametrize("monitored", [False, True])
def test_a_trainer_for_each_task(tmp_path: Path, monitored: bool) -> None:
    calls, replay, module = Calls(), mixer(), Scored()
    monitor = [ForgettingMonitor("val_acc", plots=False, print_table=False)] if monitored else []
    val = [DataLoader(points(100 + i, 4), batch_size=4) for i in range(2)] if monitored else None
    for task in range(TASKS):
        train = DataLoader(points(task, ROWS), batch_size=4)
        # The counter comes first and last in a step where it can: hooks of callbacks after it are counted too.
        run = trainer(tmp_path, max_epochs=1, callbacks=[calls, replay, *monitor], num_sanity_val_steps=0)
        run.fit(module, train, val)
        module.seen.clear()
    assert_flat(calls, cells=2 if monitored else 0)


def test_one_trainer_for_a_stream(tmp_path: Path) -> None:
    calls, module = Calls(), Scored()
    tasks = [Task(f"t{i}", train=points(i, ROWS), test=points(100 + i, 4)) for i in range(TASKS)]
    monitor = ForgettingMonitor("test_acc", plots=False, print_table=False)
    run = trainer(tmp_path, max_epochs=1, callbacks=[calls, mixer(), monitor], num_sanity_val_steps=0)

    class Forget(pl.Callback):
        """The module's own list of batches is the test's, and grows."""

        def on_train_batch_end(self, *args: Any) -> None:
            module.seen.clear()

    run.callbacks.append(Forget())
    fit_stream(run, module, TaskStream(tasks, batch_size=4))
    # The stream keeps the scores as plain numbers, and the monitor its matrix.
    assert_flat(calls, cells=TASKS)
