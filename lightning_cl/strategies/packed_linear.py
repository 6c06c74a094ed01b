# SPDX-License-Identifier: Apache-2.0
"""The product with a packed 4-bit weight, written out so that a compiled block can unpack its weights by itself."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def packed_linear(x: Tensor, packed: Tensor, state: Any, recomputed: bool = False) -> Tensor:
    """``x @ W.T`` for a packed ``W`` in PyTorch's own operations; differentiable in ``x``.

    In eager mode bitsandbytes' kernels are faster. In a compiled block each of their calls passes through Python, which
    takes longer on the host than a small layer on the device; of the operations here the compiler makes one kernel a
    weight. The unpacked weight is not kept for the backward pass, which unpacks it once more: without the mark that
    ``checkpoint`` puts on it, the compiler would keep it. The product itself bears no mark there, since it would be
    computed once more too; eager code has no other way to free the weight.

    Args:
        x: ``[..., in_features]`` in the compute dtype.
        packed: the packed weight, ``[N, 1]``.
        state: bitsandbytes' ``QuantState`` of the weight, with or without double quantization.
        recomputed: a ``checkpoint`` around the caller marks it already; with torch 2.11 one inside of another would keep
            products.

    Returns:
        ``[..., out_features]`` in the dtype of ``x``.
    """

    def weight(packed: Tensor) -> Tensor:
        return unpacked(packed, state).to(x.dtype)

    def product(x: Tensor, packed: Tensor) -> Tensor:
        return F.linear(x, weight(packed))

    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if recomputed:
        return product(x, packed)
    if torch.compiler.is_compiling():
        return F.linear(x, again(weight, packed))
    return again(product, x, packed)


def unpacked(packed: Tensor, state: Any) -> Tensor:
    """The full weight, as bitsandbytes' CUDA kernel gives it.

    Dettmers et al. 2023 (arXiv 2305.14314), section 3: ``code[index] * absmax`` by blocks of the flat weight; under double
    quantization the absmax are such products themselves, less their mean. bitsandbytes' CPU kernel (0.50) gives other
    weights where blocks do not end with a row.

    Args:
        packed: ``[N, 1]`` in any dtype; each byte holds two indices, the first in its high half.
        state: the ``QuantState``.

    Returns:
        ``state.shape`` in ``state.dtype``.
    """
    absmax = state.absmax
    if state.nested:
        inner = state.state2
        absmax = _scaled(inner.code[absmax.int()], inner.absmax, inner.blocksize) + state.offset
    # As bytes, so that no kernel takes the bits for numbers.
    pairs = packed.view(torch.uint8).view(-1, 1)
    halves = 4 - 4 * torch.arange(2, dtype=torch.uint8, device=packed.device)
    indices = ((pairs >> halves) & 15).view(-1)[: state.shape.numel()]
    return _scaled(state.code[indices.int()], absmax, state.blocksize).to(state.dtype).view(state.shape)


def _scaled(values: Tensor, scales: Tensor, blocksize: int) -> Tensor:
    missing = scales.numel() * blocksize - values.numel()
    whole = F.pad(values, (0, missing)) if missing else values
    return (whole.view(-1, blocksize) * scales[:, None]).view(-1)[: values.numel()]
