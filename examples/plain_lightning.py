# SPDX-License-Identifier: Apache-2.0
"""An ordinary Lightning project, one Trainer a task, and the two lines that make it remember.

The module, the data and the loop know nothing of lightning-cl. Run it as ``python examples/plain_lightning.py``; with
``--forget`` it runs without the two callbacks.
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cl.callbacks import ForgettingMonitor, ReplayMixer
from lightning_cl.replay import EpisodicMemory


class Classifier(pl.LightningModule):
    """Two layers on vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 2))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        x, y = batch
        self.log("val_acc", (self.net(x).argmax(1) == y).float().mean(), batch_size=len(x))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def make_task(seed: int) -> tuple[DataLoader, DataLoader]:
    """Vectors around a centre of their own, labelled by a random plane through it: tasks that need not collide."""
    generator = torch.Generator().manual_seed(seed)
    centre, plane = 2 * torch.randn(16, generator=generator), torch.randn(16, generator=generator)
    noise = torch.randn(512, 16, generator=generator)
    data = TensorDataset(centre + noise, (noise @ plane > 0).long())
    train, val = torch.utils.data.random_split(data, [384, 128], generator=generator)
    return DataLoader(train, batch_size=32, shuffle=True), DataLoader(val, batch_size=128)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train three tasks, each with a Trainer of its own, as such projects do; gives the figures of the task matrix."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--forget", action="store_true", help="train without replay")
    forget = parser.parse_args(arguments).forget
    pl.seed_everything(0, verbose=False)
    tasks = [make_task(seed) for seed in range(3)]
    model = Classifier()

    monitor = ForgettingMonitor("val_acc", plots=False)
    callbacks = [monitor] if forget else [ReplayMixer(EpisodicMemory(capacity=200)), monitor]

    for train, _ in tasks:
        trainer = pl.Trainer(
            max_epochs=5, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=list(callbacks)
        )
        trainer.fit(model, train, [val for _, val in tasks])
    return monitor.matrix.compute()


if __name__ == "__main__":
    print(main())
