# SPDX-License-Identifier: Apache-2.0
"""Which callbacks go together, and under what: the cells of the tables in ``callbacks/README.md``, and how to run one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_cl import callbacks, weights
from lightning_cl.replay import EpisodicMemory, GeneralSamples, SelfGenerated
from tests.helpers import models

NAMES = [
    "ReplayMixer",
    "ReplayDistillation",
    "ActivationMarginRegularizer",
    "LoRAInterpolator",
    "RLSRouterFitter",
    "ForgettingMonitor",
]
STRATEGIES = [
    "auto",
    "ddp",
    "fsdp",
    "deepspeed",
    "cl_single_device",
    "cl_single_device_4bit",
    "cl_fsdp",
    "cl_fsdp_4bit",
    "manual optimization",
    "torch.compile",
]
NEVER_UNTESTED = {"auto", "ddp", "cl_fsdp", "cl_fsdp_4bit"}
#: Callbacks that work on replay rows: beside them stands a ReplayMixer, also where a pair does not name it.
_NEED_ROWS = {"ReplayDistillation", "ActivationMarginRegularizer", "LoRAInterpolator"}


def general(rows: int = 6) -> GeneralSamples:
    """Encoded general texts."""
    return GeneralSamples([models.TokenRows(rows, seed=77)[i] for i in range(rows)], num_samples=rows)


def make(name: str, beside: tuple[str, ...] = (), second: bool = False) -> Any:
    """A callback with small settings; ``beside``: the others; ``second``: its second object in one Trainer."""
    if name == "ReplayMixer":
        if second:
            return callbacks.ReplayMixer(EpisodicMemory(8), rows_per_batch=1)
        # The router refuses a memory, which has a case of its own.
        memory = [] if "RLSRouterFitter" in beside or beside == ("ReplayMixer",) else [EpisodicMemory(8)]
        return callbacks.ReplayMixer([general(), *memory], rows_per_batch=2)
    if name == "RLSRouterFitter":
        return callbacks.RLSRouterFitter(expansion_dim=16, max_tasks=2)
    if name == "ForgettingMonitor":
        metric = "other_loss" if second else "val_loss"
        return callbacks.ForgettingMonitor(metric, mode="min", print_table=False, plots=False)
    return getattr(callbacks, name)()


@dataclass(frozen=True)
class Case:
    """One way to compose two callbacks, listed in this order.

    Attributes:
        first: the one that is listed first.
        second: the one that is listed after it.
        outcome: ``"works"``, ``"refused"``, or ``"fails"``: it should work, and does not yet.
        note: letter of the README's footnote that says more; empty for none.
        match: what the refusal says.
        build: makes the callbacks where :func:`make` does not.
        name: what tells the case from the cell's own one; empty for that.
    """

    first: str
    second: str
    outcome: Literal["works", "refused", "fails"] = "works"
    note: str = ""
    match: str = ""
    build: Callable[[], list[Any]] | None = None
    name: str = ""

    def __str__(self) -> str:
        return "-".join(part for part in (self.first, self.second, self.name) if part)

    def callbacks(self) -> list[Any]:
        """New objects, in order."""
        if self.build is not None:
            return self.build()
        pair = (self.first, self.second)
        made = [make(self.first, (self.second,)), make(self.second, (self.first,), second=self.first == self.second)]
        if "ReplayMixer" not in pair and _NEED_ROWS & {*pair}:
            made.insert(0, make("ReplayMixer", pair))
        return made


_TWICE = r"Found more than one stateful callback of type `{}`"
_ORDERED = {("RLSRouterFitter", "LoRAInterpolator"): ("c", r"Put `LoRAInterpolator` first")}


def _cell(first: str, second: str) -> Case:
    if first == second:
        if first in ("ReplayMixer", "ForgettingMonitor"):
            return Case(first, second, note="a")
        return Case(first, second, "refused", "a", _TWICE.format(first))
    if (first, second) in _ORDERED:
        note, match = _ORDERED[first, second]
        return Case(first, second, "refused", note, match)
    note = {
        frozenset(("LoRAInterpolator", "RLSRouterFitter")): "c",
        frozenset(("ReplayMixer", "RLSRouterFitter")): "b",
        frozenset(("LoRAInterpolator", "ForgettingMonitor")): "d",
        frozenset(("RLSRouterFitter", "ForgettingMonitor")): "d",
    }.get(frozenset((first, second)), "")
    return Case(first, second, note=note)


#: The table of all callbacks against each other: the row's callback is listed before the column's.
PAIRS = [_cell(first, second) for first in NAMES for second in NAMES]


def _self_generated() -> list[Any]:
    source = SelfGenerated(pool_size=8, length=12)
    return [make("RLSRouterFitter"), callbacks.ReplayMixer(source, rows_per_batch=2)]


#: What the footnotes say beyond the cells.
VARIANTS = [
    Case(
        "ReplayMixer",
        "ReplayMixer",
        "refused",
        "a",
        _TWICE.format("ReplayMixer"),
        lambda: [callbacks.ReplayMixer(general(), rows_per_batch=1) for _ in range(2)],
        "same sources",
    ),
    Case(
        "ForgettingMonitor",
        "ForgettingMonitor",
        "refused",
        "a",
        _TWICE.format("ForgettingMonitor"),
        lambda: [make("ForgettingMonitor") for _ in range(2)],
        "same metric",
    ),
    Case("ReplayMixer", "RLSRouterFitter", note="b", build=lambda: _self_generated()[::-1], name="own samples"),
    Case("RLSRouterFitter", "ReplayMixer", note="b", build=lambda: _self_generated(), name="own samples"),
    *(
        Case(
            *order,
            "refused",
            "b",
            r"`EpisodicMemory` would train each task's adapter on the rows of other tasks",
            lambda order=order: [
                callbacks.ReplayMixer(EpisodicMemory(8)) if name == "ReplayMixer" else make(name) for name in order
            ],
            "memory",
        )
        for order in (("ReplayMixer", "RLSRouterFitter"), ("RLSRouterFitter", "ReplayMixer"))
    ),
]


class TwoMetrics(models.PlainLM):
    """Logs two metrics, for two monitors; optimizes by hand if asked to."""

    def __init__(self, model: Any, manual: bool = False) -> None:
        super().__init__(model, lr=0.3)
        self.automatic_optimization = not manual

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor | None:
        loss = self.model(**batch).loss
        if self.automatic_optimization:
            return loss
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        loss = self.model(**batch).loss
        self.log_dict({"val_loss": loss, "other_loss": loss}, batch_size=len(batch["input_ids"]), sync_dist=True)


def module(manual: bool = False, compiled: bool = False) -> TwoMetrics:
    """A tiny LLaMA with LoRA layers."""
    model = models.lora(models.tiny_llama())
    return TwoMetrics(torch.compile(model, backend="eager") if compiled else model, manual)


def run(folder: Path, made: list[Any], lm: Any = None, tasks: int = 2, strategy: Any = "auto", devices: int = 1) -> Any:
    """Two tasks of two steps, each with a Trainer of its own, validated on both; gives the module and the Trainer."""
    lm = module() if lm is None else lm
    for task in range(tasks):
        trainer = models.trainer(
            folder,
            max_steps=-1,
            max_epochs=1,
            callbacks=made,
            strategy=strategy() if callable(strategy) else strategy,
            devices=devices,
        )
        validation = [models.loader(rows=4, seed=10 + i) for i in range(2)]
        trainer.fit(lm, models.loader(rows=8 * devices, seed=task), validation)
    return lm, trainer


def whole(lm: pl.LightningModule) -> dict[str, Tensor]:
    """Values of the adapters' parameters, gathered where they are sharded."""
    weights.reshard(lm)
    return {
        weights.clean_name(name): (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in lm.named_parameters()
        if "lora_" in name
    }


def check(callback: Any, lm: pl.LightningModule, trainer: pl.Trainer, tasks: int = 2) -> None:
    """Assert that the callback has done its work in :func:`run`. Collective where the module is sharded."""
    logged = trainer.callback_metrics
    assert callback.task_index == tasks
    name = type(callback).__name__
    if name == "ReplayMixer":
        assert callback._next_source >= 2  # rows drawn (a memory has none in the first task)
    elif name == "ReplayDistillation":
        assert logged["cl/distillation"] > 0
    elif name == "ActivationMarginRegularizer":
        assert logged["cl/activation_margin"] > 0
    elif name == "LoRAInterpolator":
        # The slow weights were held near the fast ones, and the module is left with the slow ones.
        if any(getattr(c, "adds_replay_rows", False) for c in trainer.callbacks):  # type: ignore[attr-defined]
            assert logged["cl/consistency"] > 0
        average = callback._average
        assert average.parameters
        assert min(average.updates[n] for n in average.parameters) >= 2
        weights.reshard(lm)
        for key, parameter in average.parameters.items():
            torch.testing.assert_close(weights.local(parameter).float(), average.shards[key], rtol=1e-2, atol=1e-3)
    elif name == "RLSRouterFitter":
        assert callback.router is not None
        assert [c.adapter for c in callback.router.classes] == [f"task_{i}" for i in range(tasks)]
        assert list(callback._stored) == [f"task_{i}" for i in range(tasks)]
        values = whole(lm)
        for key, stored in callback._stored[f"task_{tasks - 1}"].items():
            (found,) = (value for n, value in values.items() if n.endswith(key))
            torch.testing.assert_close(found.cpu(), stored.cpu())
    else:
        cells = callback.matrix.scores()
        assert {stage for stage, _ in cells} == set(range(tasks))
        for i in range(2):
            value = logged[f"{callback.metric}/dataloader_idx_{i}"]
            assert cells[tasks - 1, f"task_{i}"].value == float(value)
