# SPDX-License-Identifier: Apache-2.0
"""A stream resumed from any of its checkpoints ends, bit for bit, where the unbroken one ends."""

from __future__ import annotations

import contextlib
import random
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_cl import TaskStream, fit_stream
from lightning_cl.stream import files
from tests.helpers import spawn
from tests.stream_tools import Hooks, Killed, Net, Scored, Stream, points, stream, tasks, trainer, weights


def checkpoints_everywhere() -> list[pl.Callback]:
    """Checkpoints after every step, every validation and every epoch."""
    return [
        ModelCheckpoint(save_top_k=-1, every_n_train_steps=1, filename="s{step}"),
        ModelCheckpoint(save_top_k=-1, every_n_epochs=1, filename="e{epoch}"),
        ModelCheckpoint(save_top_k=-1, monitor="val_acc", save_on_train_epoch_end=False, filename="v{step}"),
    ]


def run(folder: Path, settings: dict[str, Any], ckpt_path: Any = None, extra: Any = ()) -> tuple[Net, Any, Hooks]:
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    hooks = Hooks()
    callbacks = [hooks, *checkpoints_everywhere(), *extra]
    if settings.get("stopping"):
        callbacks.append(EarlyStopping("val_acc", mode="max", patience=1))
    module = Scored(scheduled=settings.get("scheduled", False))
    loop = trainer(folder, callbacks=callbacks, **settings.get("trainer", {}))
    matrix = fit_stream(loop, module, stream(**settings.get("stream", {})), ckpt_path=ckpt_path)
    return module, matrix, hooks


def values(matrix: Any) -> dict[Any, float]:
    return {cell: score.value for cell, score in matrix.scores().items()}


SETTINGS = {
    "epochs": {"stream": {"count": 2}},
    "steps, schedule from the number of steps": {
        "trainer": {"max_steps": 4, "max_epochs": -1},
        "scheduled": True,
        "stream": {"count": 2},
    },
    "schedule from the number of steps": {"scheduled": True, "stream": {"count": 2}},
    "validation after every step": {"trainer": {"val_check_interval": 1}, "stream": {"count": 2}},
    "early stopping": {"stopping": True, "trainer": {"max_epochs": 4}, "stream": {"count": 2}},
    "accumulated gradients": {"trainer": {"accumulate_grad_batches": 2}, "stream": {"count": 2}},
    "stream of rows": {"stream": {"count": 2, "streams": True}, "scheduled": True},
    "stream of rows, two workers": {"stream": {"count": 2, "streams": True, "num_workers": 2, "rows": 7}},
    "two workers": {"stream": {"count": 2, "num_workers": 2, "rows": 7}, "scheduled": True},
}
# The others take the same way, more often.
QUICK = {"steps, schedule from the number of steps", "early stopping", "stream of rows"}


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SETTINGS])
def test_every_checkpoint_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    settings = SETTINGS[name]
    module, matrix, hooks = run(tmp_path / "whole", settings)
    expected = [call for call in hooks.calls if call[0] != "on_train_start"]
    found = sorted((tmp_path / "whole").glob("task_*/*.ckpt"))
    assert len(found) > 8
    for path in found:
        shutil.rmtree(tmp_path / "again", ignore_errors=True)
        resumed, again, after = run(tmp_path / "again", settings, path)
        assert torch.equal(weights(resumed), weights(module)), path
        assert values(again) == values(matrix), path
        # Every hook that was still to come came, once, at the same epoch and logged step.
        calls = [call for call in after.calls if call[0] != "on_train_start"]
        assert calls == expected[len(expected) - len(calls) :], path


class Kill(pl.Callback):
    """Ends the run at the n-th call of any hook, as a kill would: nothing of the Trainer runs after it."""

    HOOKS = (
        "on_train_batch_start",
        "on_before_optimizer_step",
        "on_train_batch_end",
        "on_validation_batch_end",
        "on_validation_end",
        "on_train_epoch_end",
        "on_test_batch_end",
        "on_save_checkpoint",
        "on_train_end",
        "setup",
        "teardown",
    )

    def __init__(self, after: int) -> None:
        self.after = after

    def __getattribute__(self, name: str) -> Any:
        if name in Kill.HOOKS:

            def call(*args: Any, **kwargs: Any) -> None:
                self.after -= 1
                if self.after == 0:
                    raise Killed(name)

            return call
        return super().__getattribute__(name)


def test_killed_again_and_again_the_run_ends_as_if_unbroken(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"stream": {"count": 3}}
    module, matrix, _ = run(tmp_path / "whole", settings)
    chance = random.Random(7)
    folder = tmp_path / "killed"
    for _ in range(40):
        try:
            resumed, again, _ = run(folder, settings, "last", [Kill(chance.randint(20, 110))])
            break
        except Killed:
            continue
    else:
        pytest.fail("the run never came to its end")
    assert torch.equal(weights(resumed), weights(module))
    assert values(again) == values(matrix)


def test_tasks_added_in_a_new_process_go_on_as_in_one_run(tmp_path: Path) -> None:
    """Tasks 0-1 with one Trainer, 2-3 with another."""
    whole, matrix, _ = run(tmp_path / "whole", {"stream": {"count": 4}})
    run(tmp_path / "first", {"stream": {"count": 2}})
    end = files.find_last_in(tmp_path / "first", "TaskStream")
    added, again, hooks = run(tmp_path / "second", {"stream": {"count": 4}}, end)
    assert torch.equal(weights(added), weights(whole))
    expected = values(matrix)
    # What was not known yet could not be measured: tasks 2 and 3 before stage 1.
    missing = {(stage, task) for stage in (-1, 0) for task in ("t2", "t3")}
    assert values(again) == {cell: value for cell, value in expected.items() if cell not in missing}
    assert {task for _, task, _, _ in hooks.calls} == {1, 2, 3}
    assert [c for c in hooks.calls if c[1] == 1] == [("on_train_start", 1, 2, 12), ("on_train_end", 1, 2, 12)]


def test_a_finished_stream_gives_its_matrix_and_trains_nothing(tmp_path: Path) -> None:
    module, matrix, _ = run(tmp_path, {"stream": {"count": 2}})

    class Nothing(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            raise AssertionError("a finished stream was trained on")

        on_test_batch_start = on_validation_batch_start = on_train_batch_start

    again, found, _ = run(tmp_path, {"stream": {"count": 2}}, "last", [Nothing()])
    assert values(found) == values(matrix)
    assert torch.equal(weights(again), weights(module))


def test_a_plain_fit_resumes_inside_the_task_of_its_checkpoint(tmp_path: Path) -> None:
    run(tmp_path / "whole", {"stream": {"count": 2}})
    data, module = stream(count=2), Scored()
    end = next(iter((tmp_path / "whole" / "task_1_t1").glob("sstep=4*.ckpt")))
    trainer(tmp_path).fit(module, datamodule=data, ckpt_path=end)
    assert data.current_index == 1
    assert len(module.seen) == 2  # of the second epoch's three batches one was behind


def test_a_stateful_source_is_read_from_its_beginning(tmp_path: Path) -> None:
    class Counting(Stream):
        """Goes on where it stands, as sources with a state do."""

        def __init__(self, dataset: Any) -> None:
            super().__init__(dataset)
            self.at = 0

        def __iter__(self) -> Any:
            while self.at < len(self.dataset):
                self.at += 1
                yield self.dataset[self.at - 1]
            self.at = 0

        def state_dict(self) -> dict[str, int]:
            return {"at": self.at}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.at = state["at"]

    def data() -> TaskStream:
        several = tasks(1)
        several[0].train = Counting(points(0))
        return TaskStream(several, batch_size=4)

    whole, broken = Scored(), Scored()
    torch.manual_seed(1)
    fit_stream(trainer(tmp_path / "a", callbacks=checkpoints_everywhere()), whole, data())
    same = data()
    torch.manual_seed(1)
    with pytest.raises(Killed):
        fit_stream(trainer(tmp_path / "b", callbacks=[*checkpoints_everywhere(), _KillAt(4)]), Scored(), same)
    fit_stream(trainer(tmp_path / "b", callbacks=checkpoints_everywhere()), broken, same, ckpt_path="last")
    assert [x.tolist() for x in whole.seen[-len(broken.seen) :]] == [x.tolist() for x in broken.seen]


class _KillAt(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise Killed


def _of_ranks(
    rank: int, folder: Path, devices: int, batch_size: int, ckpt: Any, steps: int, out: str, streams: bool
) -> None:
    torch.manual_seed(1)
    module = _Quiet()
    checkpoint = ModelCheckpoint(save_top_k=-1, every_n_train_steps=1, filename="s{step}")
    kwargs = {"strategy": "ddp", "devices": devices} if devices > 1 else {}
    kill = [_KillAt(steps)] if steps else []
    loop = trainer(folder, callbacks=[checkpoint, *kill], max_epochs=3, use_distributed_sampler=True, **kwargs)
    data = stream(count=1, rows=21, batch_size=batch_size, streams=streams)
    with contextlib.suppress(Killed):
        fit_stream(loop, module, data, ckpt_path=ckpt)
    spawn.save(
        folder / out, rank, {"weights": weights(module), "seen": [row for x in module.seen for row in x.tolist()]}
    )


class _Quiet(Scored):
    """No dropout and no noise: the weights depend on the rows alone."""

    def __init__(self) -> None:
        super().__init__()
        self.net[1].p = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        self.seen.append(x.detach().clone())
        # Summed, so that unequal shares of a batch weigh the same on one and on two processes.
        return torch.nn.functional.cross_entropy(self.net(x), y, reduction="sum") * self.trainer.world_size / 8


@pytest.mark.parametrize("streams", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_other_numbers_of_processes_draw_each_row_as_often_and_agree(tmp_path: Path, streams: bool) -> None:
    """Two processes, then one, then two again, each killed inside an epoch."""
    for name in ("one", "many"):
        (tmp_path / name).mkdir()
        for part in ("0", "1", "2"):
            (tmp_path / name / part).mkdir()
    _of_ranks(0, tmp_path / "one", 1, 8, None, 0, "0", streams)
    many = tmp_path / "many"
    spawn.run(_of_ranks, 2, many, 2, 4, None, 2, "0", streams)
    _of_ranks(0, many, 1, 8, _step(many, 2), 5, "1", streams)
    spawn.run(_of_ranks, 2, many, 2, 4, _step(many, 5), 0, "2", streams)
    alone = spawn.load(tmp_path / "one" / "0", 1)[0]
    parts = [*spawn.load(many / "0"), *spawn.load(many / "1", 1), *spawn.load(many / "2")]
    drawn = sorted(tuple(row) for part in parts for row in part["seen"])
    assert drawn == sorted(tuple(row) for row in alone["seen"])
    assert len(drawn) == 3 * 21
    torch.testing.assert_close(parts[-1]["weights"], alone["weights"], rtol=1e-4, atol=1e-5)
    assert torch.equal(parts[-1]["weights"], parts[-2]["weights"])


def _step(folder: Path, step: int) -> str:
    return str(next(iter(folder.glob(f"task_0_t0/sstep={step}*.ckpt"))))
