# SPDX-License-Identifier: Apache-2.0
"""Trainable weights as local shards, and exact, reversible swaps of them (also under FSDP2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_cl.anatomy import adapter_layers


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name, each shared parameter once."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def local(tensor: Tensor) -> Tensor:
    """The plain tensor that this rank holds: the local shard of a DTensor, or the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def reshard(module: nn.Module) -> None:
    """Free the gathered parameters of every FSDP2 group, so that the next forward gathers the shards anew.

    After a forward pass the root group stays gathered; a swap of its shards would then go unnoticed.
    """
    for part in module.modules():
        if hasattr(part, "reshard") and hasattr(part, "unshard"):
            part.reshard()


@contextmanager
def swapped(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Hold other values in the named parameters while the context lasts.

    Args:
        module: the module whose parameters change.
        tensors: local shards by parameter name, in any dtype.
    """
    parameters = dict(module.named_parameters())
    targets = {name: local(parameters[name].detach()) for name in tensors}
    reshard(module)
    with torch.no_grad():
        saved = {name: target.clone() for name, target in targets.items()}
        for name, target in targets.items():
            target.copy_(tensors[name])
    try:
        yield
    finally:
        reshard(module)
        with torch.no_grad():
            for name, target in targets.items():
                target.copy_(saved[name])


@contextmanager
def adapters_disabled(module: nn.Module) -> Iterator[None]:
    """Every PEFT adapter layer inside ``module`` is off while the context lasts, and then as it was."""
    layers = adapter_layers(module)
    before = [layer._disable_adapters for layer in layers]
    # PEFT's own `enable_adapters(False)` also clears `requires_grad` of the adapters, which would detach them from the
    # optimizer's view of the model in the middle of a step; only the flag that forward reads is touched here.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, flag in zip(layers, before, strict=True):
            layer._disable_adapters = flag
