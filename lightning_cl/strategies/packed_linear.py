# SPDX-License-Identifier: Apache-2.0
"""The product with a packed 4-bit weight as an operator that compiled blocks can compute twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# bitsandbytes' product is an ``autograd.Function``. Up to torch 2.11 what a compiled block traces inside of one loses the
# mark that activation checkpointing puts on its operators, so every such product was kept for the backward pass. An
# operator with a derivative of its own carries the mark. It is defined by hand: ``torch.library.custom_op`` looks for
# aliases in each call, which takes longer on the host than a small layer on the device.
_LIBRARY = torch.library.Library("lightning_cl", "FRAGMENT")
_NAME = "lightning_cl::packed_linear"
_LIBRARY.define(
    "packed_linear(Tensor x, Tensor packed, Tensor[] scales, int[] shape, int blocksize, int inner_blocksize,"
    " str quant_type, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def packed_linear(x: Tensor, packed: Tensor, state: Any) -> Tensor:
    """``x @ W.T`` for a packed ``W``, differentiable in ``x``.

    Args:
        x: ``[..., in_features]`` in the compute dtype.
        packed: the packed weight, ``[N, 1]``.
        state: bitsandbytes' ``QuantState`` of the weight, with or without double quantization.

    Returns:
        ``[..., out_features]`` in the dtype of ``x``.
    """
    scales, inner = [state.absmax], 0
    if state.nested:
        scales, inner = [state.absmax, state.offset, state.state2.absmax, state.state2.code], state.state2.blocksize
    return torch.ops.lightning_cl.packed_linear.default(
        x, packed, scales, list(state.shape), state.blocksize, inner, state.quant_type, state.dtype
    )


@torch.library.impl(_LIBRARY, "packed_linear", "CompositeExplicitAutograd")
def _forward(x: Tensor, packed: Tensor, scales: list[Tensor], *rest: Any) -> Tensor:
    import bitsandbytes as bnb

    with torch.no_grad():
        return bnb.matmul_4bit(x, packed, quant_state=_state(scales, *rest))


@torch.library.register_fake(_NAME, lib=_LIBRARY)
def _(x: Tensor, packed: Tensor, scales: list[Tensor], shape: list[int], *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], shape[0])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, scales, *ctx.rest = inputs
    ctx.save_for_backward(packed, *scales)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    import bitsandbytes.functional as bnb

    packed, *scales = ctx.saved_tensors
    weight = bnb.dequantize_4bit(packed.view(-1, 1), _state(scales, *ctx.rest))
    return gradient @ weight.to(gradient.dtype), None, [None] * len(scales), *[None] * len(ctx.rest)


torch.library.register_autograd(_NAME, _backward, setup_context=_keep, lib=_LIBRARY)


def _state(
    scales: list[Tensor], shape: list[int], blocksize: int, inner_blocksize: int, quant_type: str, dtype: torch.dtype
) -> Any:
    from bitsandbytes.functional import QuantState

    nested: dict[str, Any] = {}
    if inner_blocksize:
        _, offset, absmax, code = scales
        inner = QuantState(absmax, code=code, blocksize=inner_blocksize, dtype=torch.float32)
        nested = {"offset": offset, "state2": inner}
    return QuantState(scales[0], torch.Size(shape), None, blocksize, quant_type, dtype, **nested)
