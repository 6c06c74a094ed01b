# SPDX-License-Identifier: Apache-2.0
"""A PEFT model with three adapters and a fitted router, and prompts of its three tasks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_cl.functional import RecursiveLeastSquares
from lightning_cl.routing import AdapterBank, AnalyticRouter, Expansion, RoutedForward
from lightning_cl.routing.features import find_feature_layer
from lightning_cl.routing.router import BASE, RouteClass
from tests.helpers import models

TASKS = 3
PROMPTS = [torch.arange(4 + 40 * k, 34 + 40 * k) for k in range(TASKS)]  # each task has its own tokens


def prompts(rows: int = 8, length: int = 9, seed: int = 0, pad: int = 0, left: bool = False) -> dict[str, Tensor]:
    """Prompts of mixed tasks and lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(rows, length + pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row in range(rows):
        n = int(torch.randint(4, length + 1, (1,), generator=generator))
        tokens = PROMPTS[row % TASKS][torch.randint(30, (n,), generator=generator)]
        where = slice(ids.shape[1] - n, None) if left else slice(0, n)
        ids[row, where], mask[row, where] = tokens, 1
    return {"input_ids": ids, "attention_mask": mask}


class Setup:
    """A PEFT model with three adapters that differ, and a router fitted on its features."""

    def __init__(self, min_margin: float | None = None, general: bool = False, **config: Any) -> None:
        self.model = models.lora(models.tiny_llama(num_hidden_layers=4, **config))
        self.module = models.PlainLM(self.model)
        self.layer = find_feature_layer(self.module)
        self.bank = AdapterBank(self.module, self.layer)
        generator = torch.Generator().manual_seed(5)
        for k in range(TASKS):
            self.bank.add(f"task_{k}")
            for name, parameter in self.bank.parameters(f"task_{k}").items():
                if "lora_B" in name:
                    parameter.data.normal_(std=0.3, generator=generator)
        self.bank.activate("task_0")
        self.module.eval()
        self.routed = RoutedForward(self.module, self.layer, self.bank).attach()
        expansion = Expansion(32, 128)
        solver = RecursiveLeastSquares(128, ridge=1e-2)
        rows = prompts(rows=60, seed=1)
        features = expansion(self.routed.features(rows["attention_mask"].bool(), **rows))
        labels = torch.arange(60) % TASKS
        solver.update(features, labels)
        classes = [RouteClass(f"t{k}", f"task_{k}") for k in range(TASKS)]
        if general:
            classes[1] = RouteClass("general", BASE)
        self.routed.router = AnalyticRouter(self.layer, expansion, classes, solver.weight, min_margin=min_margin)
