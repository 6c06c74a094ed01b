# SPDX-License-Identifier: Apache-2.0
"""Evaluations of 101 rows, by ordinary modules on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, SumMetric

from tests.helpers import models
from tests.strategies import workers


class Scored(models.PlainLM):
    """Scores rows by loss, by likelihood of two options and by what it generates; keeps its metrics as users do."""

    def __init__(self) -> None:
        super().__init__(models.tiny_llama())
        self.rows = SumMetric()
        self.generated = MeanMetric()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        size = len(batch["input_ids"])
        logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        scores = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        self.log("loss", -scores.mean(1).mean(), batch_size=size, sync_dist=True)
        right = (logits[:, -2, 7] > logits[:, -2, 9]).float().mean()
        self.log("likelihood", right, batch_size=size, sync_dist=True)
        self.log("total", scores.sum(), reduce_fx="sum", sync_dist=True)
        self.log("best", scores.max(), reduce_fx="max", sync_dist=True)
        self.rows.update(torch.ones(size))
        self.log("rows", self.rows)
        # Rows end at different lengths, so the ranks would stop generating at different times.
        made = self.model.generate(
            input_ids=batch["input_ids"][:, :6], max_new_tokens=6, do_sample=False, eos_token_id=list(range(0, 128, 3))
        )
        self.generated.update((made[:, 6:] != 0).float().sum(1))
        self.log("generated", self.generated)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validation_step(batch, batch_idx, dataloader_idx)


def score(folder: Path, devices: int, rows: int, batch: int, loaders: int = 1) -> dict[str, float]:
    module = Scored()
    trainer = workers.trainer(folder, devices=devices)
    data = [models.loader(rows, batch, seed=s) for s in range(loaders)]
    found: dict[str, float] = {}
    for part in trainer.validate(module, data, verbose=False):
        found.update(part)
    for part in trainer.test(module, data, verbose=False):
        found.update({f"test/{k}": v for k, v in part.items()})
    return found


CASES = [(101, 10, 1), (101, 8, 1), (21, 1, 1), (1, 4, 1), (21, 5, 2)]


def scores(rank: int, folder: Path) -> Any:
    return [score(folder, 2, *case) for case in CASES]
