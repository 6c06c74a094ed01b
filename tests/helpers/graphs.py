# SPDX-License-Identifier: Apache-2.0
"""``torch.cuda.make_graphed_callables`` by its rules for memory and gradients, where there is no device to capture on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def make_graphed_callables(
    calls: Sequence[nn.Module], samples: Sequence[tuple[Tensor, ...]], num_warmup_iters: int, pool: Any
) -> tuple[Callable[..., Tensor], ...]:
    """The samples are where inputs are read; what gets a gradient, and the parameters' places, are those of this moment."""
    return tuple(_Recorded(call, sample) for call, sample in zip(calls, samples, strict=True))


class _Recorded:
    def __init__(self, call: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.call, self.inputs = call, inputs
        self.parameters = tuple(call.parameters())
        self.places = [value.data_ptr() for value in self.parameters]
        self.needed = [value.requires_grad for value in (*inputs, *self.parameters)]
        sample = call(*inputs)
        self.result, self.trains = torch.empty_like(sample.detach()), sample.requires_grad
        self.gradients = [
            torch.zeros_like(value) if needed and self.trains else None
            for value, needed in zip((*inputs, *self.parameters), self.needed, strict=True)
        ]
        self.computed: Any = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        return _Replay.apply(self, *inputs, *self.parameters)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: _Recorded, *values: Tensor) -> Tensor:
        assert [value.data_ptr() for value in own.parameters] == own.places
        ctx.own = own
        for place, value in zip(own.inputs, values, strict=False):
            assert (place.shape, place.dtype) == (value.shape, value.dtype)
            if place.data_ptr() != value.data_ptr():
                place.detach().copy_(value)
        needed = [value.requires_grad for value in own.parameters]
        for value, need in zip(own.parameters, own.needed[len(own.inputs) :], strict=True):
            value.requires_grad_(need)
        with torch.enable_grad():
            own.computed = own.call(*own.inputs)
        for value, need in zip(own.parameters, needed, strict=True):
            value.requires_grad_(need)
        own.result.copy_(own.computed.detach())
        return own.result.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        own = ctx.own
        surface = (*own.inputs, *own.parameters)
        wanted = [value for value, needed in zip(surface, own.needed, strict=True) if needed]
        found = iter(torch.autograd.grad(own.computed, wanted, gradient))
        for place in own.gradients:
            if place is not None:
                place.copy_(next(found))
        return None, *(None if place is None else place.detach() for place in own.gradients)
