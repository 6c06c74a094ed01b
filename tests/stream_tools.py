# SPDX-License-Identifier: Apache-2.0
"""Small tasks, modules and Trainers for the tests of the stream."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from lightning_cl import Task, TaskStream


def points(seed: int, rows: int = 10) -> TensorDataset:
    """Points in four dimensions, labelled by the sign of one of them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, generator=generator)
    return TensorDataset(x, (x[:, seed % 4] > 0).long())


class Stream(IterableDataset):
    """A map source read in order, without a length, knowing nothing of workers."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __iter__(self) -> Any:
        yield from (self.dataset[i] for i in range(len(self.dataset)))  # type: ignore[arg-type]


class Numbers(Dataset):
    """The numbers from ``first`` on."""

    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        if index >= self.count:
            raise IndexError(index)
        return self.first + index


def tasks(count: int = 3, rows: int = 10, streams: bool = False) -> list[Task]:
    def train(seed: int) -> Any:
        return Stream(points(seed, rows)) if streams else points(seed, rows)

    return [Task(f"t{i}", train=train(i), val=points(i + 10, 6), test=points(i + 20, 8)) for i in range(count)]


def stream(count: int = 3, rows: int = 10, streams: bool = False, **kwargs: Any) -> TaskStream:
    return TaskStream(tasks(count, rows, streams), **{"batch_size": 4, "seed": 3, **kwargs})


class Net(pl.LightningModule):
    """An ordinary module whose training draws from all three random generators."""

    def __init__(self, scheduled: bool = False, lr: float = 1e-2) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 2))
        self.scheduled = scheduled
        self.lr = lr
        self.seen: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.seen.append(x.detach().clone())
        noise = float(np.random.rand()) + random.random()
        loss = torch.nn.functional.cross_entropy(self.net(x) + 0.1 * noise, y)
        self.log("train_loss", loss)
        return loss

    def _evaluate(self, name: str, batch: Any) -> None:
        x, y = batch
        logits = self.net(x)
        self.log(f"{name}_acc", (logits.argmax(1) == y).float().mean(), batch_size=len(x), sync_dist=True)
        self.log(f"{name}_loss", torch.nn.functional.cross_entropy(logits, y), batch_size=len(x), sync_dist=True)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate("test", batch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        if not self.scheduled:
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 1.0 / (1.0 + step / (steps if 0 < steps < 1000 else 50))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Scored(Net):
    """Logs one metric only, so that the matrix needs no name."""

    def _evaluate(self, name: str, batch: Any) -> None:
        x, y = batch
        self.log(f"{name}_acc", (self.net(x).argmax(1) == y).float().mean(), batch_size=len(x), sync_dist=True)


def trainer(folder: Path, **kwargs: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(folder),
        **kwargs,
    }
    if any(isinstance(c, pl.callbacks.ModelCheckpoint) for c in settings.get("callbacks", ())):
        settings["enable_checkpointing"] = True
    return pl.Trainer(**settings)


def weights(module: pl.LightningModule) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


class Hooks(pl.Callback):
    """Writes down which hooks ran, without drawing anything."""

    NAMES = (
        "on_train_start",
        "on_train_epoch_start",
        "on_train_batch_end",
        "on_validation_end",
        "on_train_epoch_end",
        "on_train_end",
    )

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int, int]] = []

    def _note(self, name: str, trainer: pl.Trainer) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            steps = trainer.fit_loop.epoch_loop._batches_that_stepped
            self.calls.append((name, trainer.datamodule.current_index, trainer.current_epoch, steps))


def _hook(name: str) -> Any:
    def call(self: Hooks, trainer: pl.Trainer, *args: Any) -> None:
        self._note(name, trainer)

    return call


for _name in Hooks.NAMES:
    setattr(Hooks, _name, _hook(_name))


class Killed(BaseException):
    """What a test raises where a real run would be killed."""
