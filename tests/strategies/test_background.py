# SPDX-License-Identifier: Apache-2.0
"""Checkpoints written in the background: snapshots, order, failures, and a run that resumes from them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_cl import fit_stream
from lightning_cl.strategies import BackgroundCheckpointIO, CLFSDPStrategy, CLSingleDeviceStrategy
from tests.helpers import spawn
from tests.stream_tools import Killed, Scored, stream, trainer


def test_a_failed_write_is_raised_and_removes_nothing(tmp_path: Path) -> None:
    io = BackgroundCheckpointIO()
    old = tmp_path / "old.ckpt"
    io.save_checkpoint({"step": 1}, old)
    (tmp_path / "file").write_text("")
    io.save_checkpoint({"step": 2}, tmp_path / "file" / "new.ckpt")
    io.remove_checkpoint(old)  # as ModelCheckpoint does when the new one is "there"
    with pytest.raises(OSError, match=r"Could not write .*new.ckpt.* is untouched"):
        io.save_checkpoint({"step": 3}, tmp_path / "third.ckpt")
    assert io.load_checkpoint(old) == {"step": 1}
    # After the error was raised the plugin goes on.
    io.save_checkpoint({"step": 3}, tmp_path / "third.ckpt")
    io.remove_checkpoint(old)
    io.teardown()
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["third.ckpt"]


def test_what_cannot_be_read_back_is_refused_at_once(tmp_path: Path) -> None:
    io = BackgroundCheckpointIO()
    with pytest.raises(TypeError, match=r"`checkpoint.odd` is a `object`, .*only by running code"):
        io.save_checkpoint({"odd": object()}, tmp_path / "a.ckpt")
    with pytest.raises(TypeError, match="`storage_options"):
        io.save_checkpoint({}, tmp_path / "a.ckpt", storage_options={"a": 1})


def test_what_is_written_is_the_moment_of_the_save_in_memory_that_is_used_again(tmp_path: Path) -> None:
    io = BackgroundCheckpointIO()
    weight, other = torch.zeros(3, 5), torch.arange(4).expand(2, 4)
    sparse = torch.eye(3).to_sparse()
    used = set()
    for step in range(3):
        io.save_checkpoint(
            {"w": weight, "same": weight, "t": weight.T, "o": other, "s": sparse}, tmp_path / f"{step}.ckpt"
        )
        weight += 1
        used |= {tensor.data_ptr() for kind in io._memory._kept.values() for tensor in kind}
    assert len(used) == 3  # of `w`, its transposed and `o`
    for step in range(3):
        found = io.load_checkpoint(tmp_path / f"{step}.ckpt")
        assert torch.equal(found["w"], torch.full((3, 5), float(step)))
        assert torch.equal(found["same"], found["w"])
        assert torch.equal(found["t"], found["w"].T)
        assert torch.equal(found["o"], other)
        assert torch.equal(found["s"].to_dense(), torch.eye(3))
    io.teardown()
    assert not io._memory._kept


class _KillAt(ModelCheckpoint):
    """Keeps the last checkpoint only, and ends the run at a step."""

    def __init__(self, step: int | None) -> None:
        super().__init__(save_top_k=1, monitor="step", mode="max", every_n_train_steps=1)
        self.end = step

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.end and trainer.datamodule.current_index == 1:
            raise Killed


def _fit(folder: Path, strategy: Any, kill: int | None, ckpt_path: str | None = None, **kwargs: Any) -> torch.Tensor:
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    module = Scored()
    run = trainer(folder, strategy=strategy, callbacks=[_KillAt(kill)], **kwargs)
    try:
        fit_stream(run, module, stream(count=2), ckpt_path=ckpt_path)
    except Killed:
        return torch.zeros(0)
    from lightning_cl.weights import local

    return torch.cat([local(p).detach().flatten() for p in module.parameters()])


def test_a_run_resumes_from_checkpoints_of_the_background(tmp_path: Path) -> None:
    def strategy(background: bool) -> CLSingleDeviceStrategy:
        return CLSingleDeviceStrategy(checkpoint_io=BackgroundCheckpointIO() if background else None)

    whole = _fit(tmp_path / "whole", strategy(False), None)
    _fit(tmp_path / "broken", strategy(True), 3)
    assert len(list((tmp_path / "broken" / "task_1_t1").glob("*.ckpt"))) == 1
    assert torch.equal(whole, _fit(tmp_path / "broken", strategy(True), None, "last"))


def _two_ranks(rank: int, folder: Path) -> None:
    def strategy() -> CLFSDPStrategy:
        return CLFSDPStrategy(checkpoint_io=BackgroundCheckpointIO())

    whole = _fit(folder / "whole", strategy(), None, devices=2)
    _fit(folder / "broken", strategy(), 2, devices=2)
    assert torch.equal(whole, _fit(folder / "broken", strategy(), None, "last", devices=2))


@pytest.mark.slow
def test_two_processes_resume_from_checkpoints_of_the_background(tmp_path: Path) -> None:
    spawn.run(_two_ranks, 2, tmp_path)
