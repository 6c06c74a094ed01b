# SPDX-License-Identifier: Apache-2.0
"""What :class:`~lightning_cl.callbacks.ReplayDistillation` refuses, each with the way out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_cl import anatomy, weights


def check_arguments(
    weight: float,
    target_kl: float | None,
    objective: str,
    temperature: float,
    anchor: str,
    sources: list[str] | None,
    reference: nn.Module | None,
    precompute: bool,
    chunk_size: int | None,
) -> None:
    """Refuse numbers out of range, and options that contradict each other.

    Raises:
        ValueError: naming the first.
    """
    if not (weight >= 0 and math.isfinite(weight)):
        raise ValueError(
            f"`ReplayDistillation(weight={weight})`: must be finite and >= 0. Use 1.0 to 10.0, the paper's, or"
            " `target_kl`, which finds it."
        )
    if objective not in ("distillation", "labels"):
        raise ValueError(f'`ReplayDistillation(objective={objective!r})`: use "distillation" or "labels".')
    if anchor not in ("auto", "initial", "previous_task"):
        raise ValueError(f'`ReplayDistillation(anchor={anchor!r})`: use "auto", "initial" or "previous_task".')
    if not temperature > 0:
        raise ValueError(f"`ReplayDistillation(temperature={temperature})`: logits are divided by it: must be > 0.")
    if target_kl is not None and objective == "labels":
        raise ValueError(
            f'`ReplayDistillation(objective="labels", target_kl={target_kl})`: with labels no divergence is measured that'
            ' could be held. Use `objective="distillation"`, or a fixed `weight`.'
        )
    if precompute and objective == "labels":
        raise ValueError(
            '`ReplayDistillation(objective="labels", precompute=True)`: with labels there is no reference that could be'
            ' taken ahead. Leave `precompute` out, or use `objective="distillation"`.'
        )
    if sources is not None and not sources:
        raise ValueError(
            "`ReplayDistillation(sources=[])` would distil nothing. Leave `sources` out to distil all rows."
        )
    if reference is not None and anchor == "previous_task":
        raise ValueError(
            '`ReplayDistillation(reference=..., anchor="previous_task")`: a given reference does not move from task to'
            " task. Leave one of them out."
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"`ReplayDistillation(chunk_size={chunk_size})`: must be at least 1, or None for automatic.")


def check_sources(names: Sequence[str] | None, sources: Sequence[Any]) -> None:
    """Refuse names that no replay source of the run has.

    Raises:
        MisconfigurationException: with the names that there are.
    """
    known = {source.name for source in sources}
    unknown = [name for name in names or [] if name not in known]
    if unknown:
        raise MisconfigurationException(
            f"`ReplayDistillation(sources={names})`: the run has no replay source called {unknown[0]!r}, only"
            f" {sorted(known)}. Name one of these, or leave `sources` out to distil all."
        )


def check_known_ahead(sources: Sequence[Any]) -> None:
    """Refuse to take the reference ahead for a source that cannot tell its rows.

    Raises:
        MisconfigurationException: naming the source.
    """
    unforeseen = [source.name for source in sources if source.version is None]
    if unforeseen:
        raise MisconfigurationException(
            f"`ReplayDistillation(precompute=True)`: the rows of {unforeseen[0]} are not known ahead, so their reference"
            " cannot be taken before they are drawn. Leave it out of `sources`, or leave `precompute` out."
        )


def check_precompute(trainer: pl.Trainer, pl_module: pl.LightningModule, head_is_trained: bool) -> None:
    """Refuse to take the reference ahead where the network cannot be run, or where its states are not all of it.

    Raises:
        MisconfigurationException: under FSDP1, and for a trained head.
    """
    if weights.sharding_root(pl_module) is not pl_module:
        raise MisconfigurationException(
            "`ReplayDistillation(precompute=True)` runs the network between two steps, and under"
            f" `{type(trainer.strategy).__name__}` (FSDP1) the weights exist only inside a step. Use FSDP2:"
            ' `strategy="cl_fsdp"` or `ModelParallelStrategy`; or leave `precompute` out.'
        )
    if head_is_trained:
        raise MisconfigurationException(
            "`ReplayDistillation(precompute=True)` keeps hidden states, from which the reference's predictions follow by"
            " the head alone, and this head is trained. Freeze it, or leave `precompute` out."
        )


def check_reference(reference: nn.Module, pl_module: pl.LightningModule) -> None:
    """Refuse a frozen copy beside adapters, and one that is the model itself.

    Raises:
        MisconfigurationException: for either.
    """
    if anatomy.has_lora(pl_module):
        raise MisconfigurationException(
            "`ReplayDistillation(reference=...)` with a model that has adapters: its reference is the same model with the"
            ' adapters off, at no memory. Leave `reference` out, or use `anchor="previous_task"`.'
        )
    trained = {p.data_ptr() for p in pl_module.parameters() if p.requires_grad and p.numel()}
    if any(p.data_ptr() in trained for p in reference.parameters()):
        raise MisconfigurationException(
            f"`ReplayDistillation(reference={type(reference).__name__})` is the model being trained (they share weights),"
            " so its divergence from itself would always be 0. Pass `copy.deepcopy(model)`, made before"
            ' training, or leave `reference` out: `anchor="initial"` keeps its own copy.'
        )
