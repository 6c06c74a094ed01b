# SPDX-License-Identifier: Apache-2.0
"""The stream on two processes: rows counted, rows of the matrix agreed on, resumed under DDP and under FSDP2."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_cl import Task, TaskStream, fit_stream
from tests.helpers import models, spawn
from tests.stream_tools import Killed, Numbers, Stream, trainer


class Counts(pl.LightningModule):
    """Writes down the rows it sees, and logs each process's own mean."""

    def __init__(self, sync: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.sync = sync
        self.trained: list[list[int]] = []
        self.tested: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.trained.append([self.current_epoch, *batch.tolist()])
        return self.weight.sum()

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.tested += batch.tolist()
        self.log("mean", batch.float().mean(), batch_size=len(batch), sync_dist=self.sync)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _count(rank: int, folder: Path, streams: bool, workers: int, sync: bool) -> None:
    def source(first: int, rows: int) -> Any:
        return Stream(Numbers(first, rows)) if streams else Numbers(first, rows)

    module = Counts(sync)
    tasks = [Task(n, train=source(0, 17), test=source(100 * i, 7)) for i, n in enumerate("ab")]
    data = TaskStream(tasks, batch_size=4, num_workers=workers)
    matrix = fit_stream(trainer(folder, strategy="ddp", devices=2, max_epochs=2), module, data)
    scores = {cell: score.value for cell, score in matrix.scores().items()}
    spawn.save(folder, rank, {"trained": module.trained, "tested": module.tested, "scores": scores})


@pytest.mark.parametrize(
    ("streams", "workers", "sync"),
    [
        (False, 0, True),
        pytest.param(True, 0, False, marks=pytest.mark.slow),
        pytest.param(False, 2, False, marks=pytest.mark.slow),
        pytest.param(True, 2, True, marks=pytest.mark.slow),
    ],
)
def test_each_row_once_an_epoch_and_once_in_each_evaluation(
    tmp_path: Path, streams: bool, workers: int, sync: bool
) -> None:
    spawn.run(_count, 2, tmp_path, streams, workers, sync)
    ranks = spawn.load(tmp_path)
    assert len(ranks[0]["trained"]) == len(ranks[1]["trained"]) == 2 * 2 * 3
    for epoch in range(2):
        rows = [row for rank in ranks for seen in rank["trained"] if seen[0] == epoch for row in seen[1:]]
        assert sorted(rows) == sorted([*range(17), *range(17)])  # both tasks have the same rows
    tested = sorted(ranks[0]["tested"] + ranks[1]["tested"])
    assert tested == sorted(3 * [*range(7), *range(100, 107)])
    for rank in ranks:
        assert rank["scores"] == {
            (stage, task): mean for stage in (-1, 0, 1) for task, mean in (("a", 3.0), ("b", 103.0))
        }


class KillAt(pl.Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.datamodule.current_index == 1 and trainer.global_step == 3:
            raise Killed


def _resume(rank: int, folder: Path, strategy: str) -> None:
    ends = []
    for name, kill, ckpt_path in (("whole", False, None), ("broken", True, None), ("broken", False, "last")):
        torch.manual_seed(1)
        module = models.PlainLM(models.lora(models.tiny_llama()), optimizer="adamw")
        tasks = [Task(f"t{i}", train=models.TokenRows(10, seed=i), val=models.TokenRows(4, seed=9)) for i in range(2)]
        data = TaskStream(tasks, batch_size=2, collate_fn=models.collate, seed=3)
        checkpoint = ModelCheckpoint(save_top_k=-1, every_n_train_steps=1)
        run = trainer(
            folder / name, strategy=strategy, devices=2, callbacks=[checkpoint, *([KillAt()] if kill else [])]
        )
        if kill:
            with contextlib.suppress(Killed):
                fit_stream(run, module, data)
            continue
        matrix = fit_stream(run, module, data, ckpt_path=ckpt_path)
        flat = weights_of(module)
        ends.append((flat, {cell: score.value for cell, score in matrix.scores().items()}))
    spawn.save(folder, rank, ends)


def weights_of(module: pl.LightningModule) -> torch.Tensor:
    from lightning_cl.weights import local

    return torch.cat([local(p).detach().flatten() for p in module.parameters() if p.requires_grad])


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "cl_fsdp"])
def test_a_stream_on_two_processes_resumes_bit_for_bit(tmp_path: Path, strategy: str) -> None:
    spawn.run(_resume, 2, tmp_path, strategy)
    for (whole, scores), (resumed, again) in spawn.load(tmp_path):
        assert torch.equal(whole, resumed)
        assert scores == again
