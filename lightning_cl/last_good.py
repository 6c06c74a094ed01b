# SPDX-License-Identifier: Apache-2.0
"""A copy of what trains, to go back to: the last weights known to be good."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cl import weights


class LastGood:
    """Holds one copy of the trainable weights and the persistent buffers on the CPU, as local shards.

    The frozen base is not copied: with LoRA the copy is as large as the adapter.
    """

    def __init__(self) -> None:
        self._shards: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}
        self._whole: dict[str, Tensor] | None = None

    def __bool__(self) -> bool:
        return bool(self._shards) or self._whole is not None

    def keep(self, module: nn.Module) -> None:
        """Copy what the module holds now."""
        weights.reshard(module)
        self._whole = None
        self._shards = {n: weights.local(p).to("cpu", copy=True) for n, p in weights.trainable(module).items()}
        self._buffers = {n: b.detach().to("cpu", copy=True) for n, b in _buffers(module).items()}

    def put_back(self, module: nn.Module) -> None:
        """Write the copy into the module, in place; weights that started to train since then stay as they are."""
        weights.reshard(module)
        parameters = weights.trainable(module)
        shards: Mapping[str, Tensor] = self._shards
        if self._whole is not None:
            shards = weights.scatter(module, {n: t for n, t in self._whole.items() if n in parameters}, parameters)
        buffers = _buffers(module)
        with torch.no_grad():
            for name, shard in shards.items():
                if name in parameters:
                    weights.local(parameters[name]).copy_(shard)
            for name, value in self._buffers.items():
                if name in buffers:
                    buffers[name].copy_(value)

    def state(self, module: nn.Module) -> dict[str, Any]:
        """The whole tensors, for a checkpoint; under sharding every rank calls it."""
        if self._whole is not None:
            return {"weights": self._whole, "buffers": self._buffers}
        parameters = weights.trainable(module)
        known = {name: shard for name, shard in self._shards.items() if name in parameters}
        return {"weights": weights.gather(module, known, parameters, copy=False), "buffers": self._buffers}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` gave; it is spread over the ranks when it is put back."""
        self._whole, self._buffers, self._shards = dict(state["weights"]), dict(state["buffers"]), {}


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    found = {}
    for prefix, part in module.named_modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found
