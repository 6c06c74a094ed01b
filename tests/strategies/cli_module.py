# SPDX-License-Identifier: Apache-2.0
"""A LightningModule with its own data, for runs that a launcher starts from configuration files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from tests.helpers import models
from tests.strategies import workers


class TinyRun(models.PlainLM):
    """Trains a tiny Llama with LoRA on 32 rows and writes its losses and weights into a folder.

    Args:
        folder: where to write.
        pause_after: epoch after which every process waits for a signal, -1 for none.
    """

    def __init__(self, folder: str, pause_after: int = -1) -> None:
        super().__init__(workers.plain(optimizer="sgd").model, lr=0.1)
        self.folder = Path(folder)
        self.pause_after = pause_after

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        mean = self.trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean")
        if self.trainer.is_global_zero:
            with open(self.folder / "losses.txt", "a") as file:
                file.write(f"{self.trainer.global_step} {mean.item():.6f}\n")
        return loss

    def on_train_epoch_start(self) -> None:
        if self.trainer.current_epoch == self.pause_after + 1 > 0:
            (self.folder / f"paused-{os.environ.get('RANK', 0)}").touch()
            import time

            # Only the killed node stays here; the others go on into a collective that it will never join.
            if int(os.environ.get("GROUP_RANK", 0)) == 1:
                time.sleep(600)

    def train_dataloader(self) -> Any:
        return models.loader(32, 4)

    def val_dataloader(self) -> Any:
        return []

    def on_train_end(self) -> None:
        weights = workers.whole(self)
        if self.trainer.is_global_zero:
            torch.save(weights, self.folder / "weights.pt")
