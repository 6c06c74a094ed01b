# SPDX-License-Identifier: Apache-2.0
"""LoRA layers on a batch whose samples use different adapters, in as many matrix products as one adapter takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_cl.routing.router import BASE

__all__ = ["MixedAdapters"]


class MixedAdapters:
    """What the adapters of one batch's samples add to the output of a LoRA layer.

    PEFT cuts the batch into one piece an adapter, in every layer: two index operations and three products for each
    piece, which take longer than the layer itself. Here the adapters in use lie side by side as one of larger rank,
    ``A = [A_1; A_2; ...]``, ``B = [B_1, B_2, ...]``, and each sample keeps its own adapter's part of ``x A^T``.
    So a batch of many adapters takes the two products of one, and one adapter for all samples is PEFT's plain path.

    Args:
        names: One adapter a sample; ``"__base__"`` for none.

    Attributes:
        names: As given.
        base_names: What makes PEFT's layer give the base layer's output, to which `add` then adds.

    Example:
        >>> MixedAdapters(["task_0", "__base__", "task_0"]).used
        ['task_0']
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.used = [name for name in dict.fromkeys(self.names) if name != BASE]
        self.base_names = [BASE] * len(self.names)
        self._kept: dict[Any, Tensor] = {}

    def can_add(self, layer: Any) -> bool:
        """Whether the layer's adapters are plain low-rank products; PEFT runs all others (embeddings, convolutions)."""
        variants = getattr(layer, "lora_variant", {})
        return all(
            isinstance(getattr(layer, "lora_A", {})[name], nn.Linear)
            and layer.lora_B[name].bias is None
            and name not in variants
            for name in self._within(layer)
        ) and not getattr(layer, "lora_embedding_A", None)

    def add(self, layer: Any, x: Tensor, result: Tensor) -> Tensor:
        """What each sample's own adapter makes of ``x`` ``[B, ..., in]``, added to the base layer's ``[B, ..., out]``."""
        names = self._within(layer)
        if not names:
            return result
        downs, ups = [layer.lora_A[n].weight for n in names], [layer.lora_B[n].weight for n in names]
        scalings = [float(layer.scaling[n]) for n in names]
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(downs[0].dtype)
        if len(names) == 1 and self.names.count(names[0]) == len(self.names):
            added = functional.linear(functional.linear(x, downs[0]), ups[0]) * scalings[0]
        else:
            inner = functional.linear(x, torch.cat(downs))
            kept = self._share(names, [len(down) for down in downs], scalings, inner)
            added = functional.linear(inner * kept, torch.cat(ups, dim=1))
        return result + added.to(result.dtype)

    def _within(self, layer: Any) -> list[str]:
        return [name for name in self.used if name in getattr(layer, "lora_A", {})]

    def _share(self, names: list[str], ranks: list[int], scalings: list[float], inner: Tensor) -> Tensor:
        """``[B, 1, ..., sum of ranks]``: a sample's own adapter's scaling at that adapter's columns, 0 elsewhere.

        The same in all layers of a kind, so it goes to the device once a pass.
        """
        key = (tuple(names), tuple(ranks), tuple(scalings), inner.dtype, inner.device, inner.ndim)
        if key not in self._kept:
            columns = [(n, s) for n, rank, s in zip(names, ranks, scalings, strict=True) for _ in range(rank)]
            rows = [[scaling if name == own else 0.0 for name, scaling in columns] for own in self.names]
            share = torch.tensor(rows, dtype=inner.dtype).to(inner.device, non_blocking=True)
            self._kept[key] = share.reshape(len(rows), *[1] * (inner.ndim - 2), share.shape[1])
        return self._kept[key]
