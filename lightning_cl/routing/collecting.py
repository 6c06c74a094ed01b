# SPDX-License-Identifier: Apache-2.0
"""What the router learns from while a task trains: features of the batch's own rows, and of replayed general samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cl.replay.rows import layout_of
from lightning_cl.routing.features import pool, prompt_mask, shallow_modules, text_fields
from lightning_cl.routing.statistics import RouterStatistics
from lightning_cl.step import Step

__all__ = ["FeatureCollector", "new_general_rows", "task_rows"]


class FeatureCollector:
    """Takes the features of one task's rows from the forward passes that training runs anyway.

    Args:
        statistics: Where the features go.
        name: The task's name.
        adapter: Its adapter.
        joined_rows: Gives how many rows at the end of the batch are replayed ones.
    """

    def __init__(self, statistics: RouterStatistics, name: str, adapter: str, joined_rows: Callable[[], int]) -> None:
        self.statistics = statistics
        self.name = name
        self.adapter = adapter
        self._joined_rows = joined_rows
        self._batch: Any = None  # whose features are still to come
        self._frozen: list[nn.Module] = []

    def freeze(self, module: nn.Module, feature_layer: str) -> None:
        """Name the layers that run without dropout from here on, so that the features are those of serving."""
        below = shallow_modules(module, feature_layer)
        # A checkpointed block must stay in training mode, or it would store what it is meant to recompute.
        self._frozen = [
            part
            for name, part in module.named_modules()
            if name in below and part.training and not getattr(part, "gradient_checkpointing", False)
        ]

    def expect(self, batch: Any) -> None:
        """The next pass is of this batch; None for one whose rows have counted already."""
        for part in self._frozen:
            part.training = False
        self._batch = batch

    def collect(self, hidden: Tensor, arguments: Mapping[str, Any]) -> None:
        """Take the feature layer's output, if it is the pass that is waited for."""
        # Reference passes run without gradients; checkpointed blocks run again in backward, when the batch is taken.
        if self._batch is None or not torch.is_grad_enabled():
            return
        rows = task_rows(hidden, self._batch, arguments, self._joined_rows())
        if rows is not None:
            self._batch = None
            # Looked up now: a checkpoint that was loaded after the task's start has brought its own columns.
            self.statistics.observe(rows, self.statistics.label(self.name, self.adapter))

    def release(self) -> None:
        """Give the layers their dropout back."""
        for part in self._frozen:
            part.training = True
        self._batch, self._frozen = None, []


def task_rows(hidden: Tensor, batch: Any, arguments: Mapping[str, Any], replay: int) -> Tensor | None:
    """Pooled hidden states of the batch's task rows, ``[N, D]``; None if the call was not on the whole batch."""
    fields = {**{k: v for k, v in arguments.items() if isinstance(v, Tensor) and v.ndim == 2}, **text_fields(batch)}
    layout = layout_of(batch)
    mask = prompt_mask(fields.get("attention_mask"), fields.get("labels"))
    if mask is not None and (hidden.ndim != 3 or mask.shape != hidden.shape[:2]):
        mask = None
    if layout.lengths is not None and hidden.shape[0] == 1:
        pieces, start = [], 0
        labels = fields.get("labels")
        for length in layout.lengths[: len(layout.lengths) - replay]:
            segment = slice(start, start + length)
            own = None if labels is None else prompt_mask(None, labels[:, segment])
            pieces.append(pool(hidden[:, segment], own))
            start += length
        return torch.cat(pieces)
    if hidden.shape[0] != layout.rows:
        return None
    count = layout.rows - replay
    return pool(hidden[:count], None if mask is None else mask[:count])


def new_general_rows(step: Step, layer: str, seen: set[str]) -> Tensor | None:
    """Pooled hidden states of the replayed general samples that were not seen yet, ``[N, D]``; ``seen`` grows by them.

    Args:
        step: The training step.
        layer: The feature layer, which is watched.
        seen: Identities of the samples that were seen.
    """
    replay = step.replay
    if layer not in step.activations:
        return None
    new = []
    for row, (identity, source) in enumerate(zip(replay.ids, replay.sources, strict=True)):
        if source == "GeneralSamples" and identity not in seen:
            seen.add(identity)
            new.append(row)
    if not new:
        return None
    hidden = step.activations[layer][new]
    return pool(hidden, replay.token_mask[new] if replay.token_mask is not None and hidden.ndim == 3 else None)
