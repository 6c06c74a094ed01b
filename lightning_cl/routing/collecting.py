# SPDX-License-Identifier: Apache-2.0
"""Which rows of a training step the router learns from: the batch's own, and general samples that are replayed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_cl.replay.rows import layout_of
from lightning_cl.routing.features import pool, prompt_mask, text_fields
from lightning_cl.step import Step

__all__ = ["new_general_rows", "task_rows"]


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
