# SPDX-License-Identifier: Apache-2.0
"""What the processes of the strategy tests do: real Trainers, tiny models, results through files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

import lightning_cl  # noqa: F401  (registers the strategies)
from tests.helpers import models, spawn


def plain(**kwargs: Any) -> pl.LightningModule:
    """A module whose head, final norm and embedding train as well as its LoRA layers."""
    lora = kwargs.pop("lora", True)
    extra = kwargs.pop("also", ["lm_head", "norm", "embed_tokens"])
    optimizer = kwargs.pop("optimizer", "adamw")
    model = models.tiny_llama(**kwargs)
    if lora:
        model = models.lora(model)
        for name, p in model.named_parameters():
            if any(e in name for e in extra) and "layers" not in name:
                p.requires_grad_(True)
    return models.PlainLM(model, optimizer=optimizer)


def whole(module: nn.Module, trainable: bool = True) -> dict[str, Tensor]:
    """Unsharded values of a module's (trainable) parameters."""
    for part in module.modules():
        if hasattr(part, "reshard"):
            part.reshard()
    return {
        n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for n, p in module.named_parameters()
        if p.requires_grad or not trainable
    }


def trainer(folder: Path, **kwargs: Any) -> pl.Trainer:
    """A quiet Trainer on CPUs."""
    return models.trainer(folder, **{"strategy": "cl_fsdp", "devices": 2, "max_epochs": 1, "max_steps": -1, **kwargs})


def reset(t: pl.Trainer) -> None:
    """What a task stream does between two fits of one Trainer."""
    t.fit_loop.epoch_progress.reset()
    t.fit_loop.epoch_loop.automatic_optimization.optim_progress.reset()
    t.fit_loop.epoch_loop.reset()


def fit_twice(rank: int, folder: Path, options: dict[str, Any]) -> None:
    """Two fits of one module, then its weights, its gradients' memory, and a validation."""
    module = plain()
    t = trainer(folder, **options)
    t.fit(module, models.loader(16, 4))
    first = {n: type(p).__name__ for n, p in module.named_parameters()}
    t2 = trainer(folder, **options)
    t2.fit(module, models.loader(8, 4, seed=1))
    assert {n: type(p).__name__ for n, p in module.named_parameters()} == first
    val = t2.validate(module, models.loader(8, 4, seed=2), verbose=False)
    spawn.save(folder, rank, {"weights": whole(module), "val": val[0]["val_loss"], "types": first})
