# SPDX-License-Identifier: Apache-2.0
"""Instrumented callbacks and short runs for the tests of LoRAInterpolator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_cl import weights
from lightning_cl.callbacks import LoRAInterpolator, ReplayMixer
from lightning_cl.replay import EpisodicMemory
from tests.helpers import models

Weights = dict[str, Tensor]


class Recorder(LoRAInterpolator):
    """Keeps what passes by: the fast weights after each optimizer step, and each step's slow and fast states."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.fast: list[Weights] = []
        self.steps: list[dict[str, Any]] = []

    def should_update(self, step_idx: int) -> bool:
        self.fast.append(copy_of(self._average.parameters))
        return super().should_update(step_idx)

    def _consistency(self, step: Any) -> Tensor | None:
        term = super()._consistency(step)
        if step.replay.count:
            for states in step.activations.values():
                states.retain_grad()
            ids = {k: v[-step.replay.count :].clone() for k, v in step.batch.items()}
            slow = {n: s.clone() for n, s in self._average.shards.items()}
            self.steps.append({"rows": ids, "slow": slow, "step": step, "term": term, "fast": self._fast_now()})
        return term

    def _fast_now(self) -> Weights:
        return copy_of(self._average.parameters)


def copy_of(parameters: dict[str, nn.Parameter]) -> Weights:
    return {name: weights.local(p).float().clone() for name, p in parameters.items()}


def make_module(seed: int = 0, **kwargs: Any) -> models.PlainLM:
    kwargs.setdefault("lr", 0.1)
    return models.PlainLM(models.lora(models.tiny_llama(seed)), **kwargs)


def make_mixer(rows: int = 2, capacity: int = 20) -> ReplayMixer:
    return ReplayMixer(EpisodicMemory(capacity), rows_per_batch=rows)


def fit(tmp_path: Path, module: pl.LightningModule, callbacks: list[Callback], data: Any = None, **kwargs: Any) -> Any:
    trainer = models.trainer(tmp_path, callbacks=callbacks, **kwargs)
    loaders = {"val_dataloaders": kwargs.pop("val", None)}
    trainer.fit(module, data if data is not None else models.loader(), **loaders)
    return trainer


def average_of(initial: Weights, fast: list[Weights], decays: list[float]) -> Weights:
    slow = {n: t.double() for n, t in initial.items()}
    for point, decay in zip(fast, decays, strict=True):
        slow = {n: decay * t + (1 - decay) * point[n].double() for n, t in slow.items()}
    return {n: t.float() for n, t in slow.items()}


def assert_same(got: Weights, wanted: Weights, **tolerance: float) -> None:
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], **(tolerance or {"rtol": 0, "atol": 0}), msg=name)


def loss_of(module: models.PlainLM) -> float:
    with torch.no_grad():
        return float(module.model(**next(iter(models.loader(rows=4, seed=9)))).loss)


class Watch(Callback):
    """What the weights are while validation runs, and what they are to a callback that saves afterwards."""

    def __init__(self, fail: bool = False) -> None:
        self.during: list[Weights] = []
        self.after: list[Weights] = []
        self.fail = fail

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.during.append(copy_of(weights.trainable(pl_module)))
        if self.fail and not trainer.sanity_checking:
            raise RuntimeError("broken metric")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.after.append(copy_of(weights.trainable(pl_module)))
