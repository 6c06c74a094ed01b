# SPDX-License-Identifier: Apache-2.0
"""Cross entropy of single tokens from hidden states, chunk by chunk, so that no tensor of all logits ever exists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_cl.functional.distillation import _check_head, _logits, _values_and_gradient

#: Logits of one chunk: 2^27 are 1,046 tokens of a vocabulary of 128,256, enough for products at a GPU's full rate.
CHUNK_ELEMENTS = 2**27


def token_cross_entropy(
    hidden: Tensor,
    targets: Tensor,
    head_weight: Tensor,
    bias: Tensor | None = None,
    logit_transform: Callable[[Tensor], Tensor] | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Cross entropy of the head's predictions with given tokens, one value a token.

    A token's gradient is known up to the factor that arrives for it in the backward pass, so it is taken on the spot
    and a frozen head costs no second product. Only a trained head's logits are computed again.

    Args:
        hidden: ``[N, D]``, states at the head's input.
        targets: ``[N]``, token ids: ``targets[i]`` is the token that ``hidden[i]`` predicts.
        head_weight: ``[V, D]``; receives a gradient if it requires one.
        bias: ``[V]``, the head's bias.
        logit_transform: Elementwise function of the logits, e.g. a soft cap, in float32.
        chunk_size: Tokens a chunk; by default at most 2^27 logits.

    Returns:
        Float32 ``[N]`` (float64 for float64 inputs).

    Raises:
        ValueError: If shapes do not fit.

    Example:
        >>> hidden, head, tokens = torch.randn(5, 8), torch.randn(32, 8), torch.randint(32, (5,))
        >>> expected = torch.nn.functional.cross_entropy(hidden @ head.T, tokens, reduction="none")
        >>> bool(torch.allclose(token_cross_entropy(hidden, tokens, head, chunk_size=2), expected))
        True
    """
    if hidden.ndim != 2 or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"`hidden` {tuple(hidden.shape)} must be [N, D] and `targets` {tuple(targets.shape)} its N tokens. Select the"
            " labelled positions and shift before the call."
        )
    _check_head(hidden, head_weight, bias)
    if chunk_size is None:
        chunk_size = max(1, CHUNK_ELEMENTS // max(1, head_weight.shape[0]))
        # Products in whole tiles.
        chunk_size -= chunk_size % 128 if chunk_size > 128 else 0
    if chunk_size < 1:
        raise ValueError(f"`chunk_size={chunk_size}`: a chunk holds at least one token. Use None for the default.")
    device = hidden.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head_weight.dtype
    settings = (logit_transform, chunk_size, compute, torch.is_grad_enabled())
    with torch.autocast(device, enabled=False):
        return _TokenLosses.apply(hidden, head_weight, bias, targets, settings)


class _TokenLosses(torch.autograd.Function):
    """Losses of single tokens; the states' gradients are kept, those of a trained head computed when they are asked."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, settings: Any
    ) -> Tensor:
        transform, chunk_size, compute, grad_enabled = settings
        ctx.settings = settings
        work = torch.promote_types(compute, torch.float32)
        head = weight.to(compute)
        losses = torch.empty(len(hidden), dtype=work, device=hidden.device)
        trained = [grad_enabled and needed for needed in ctx.needs_input_grad[:3]]
        grad_hidden = torch.empty_like(hidden) if trained[0] else None
        for start in range(0, len(hidden), chunk_size):
            piece = slice(start, start + chunk_size)
            logits = _logits(hidden[piece].to(compute), head, bias, work)
            losses[piece], grad = _values_and_gradient(logits, targets[piece], transform, 1.0, trained[0])
            del logits
            if grad is not None and grad_hidden is not None:
                grad_hidden[piece] = grad.to(compute) @ head
        again = (hidden, weight, bias, targets) if any(trained[1:]) else (None,) * 4
        ctx.save_for_backward(grad_hidden, *again)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad_hidden, hidden, weight, bias, targets = ctx.saved_tensors
        transform, chunk_size, compute, _ = ctx.settings
        factors = grads[0][:, None]
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * factors).to(grad_hidden.dtype)
        if weight is None:
            return grad_hidden, None, None, None, None
        work = torch.promote_types(compute, torch.float32)
        head = weight.to(compute)
        # Chunks of a bf16 head add up in float32: a sum of many bf16 roundings would be the least exact step of all.
        grad_weight = torch.zeros_like(weight, dtype=work) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=work) if bias is not None and ctx.needs_input_grad[2] else None
        for start in range(0, len(hidden), chunk_size):
            piece = slice(start, start + chunk_size)
            inputs = hidden[piece].to(compute)
            logits = _logits(inputs, head, bias, work)
            _, grad = _values_and_gradient(logits, targets[piece], transform, 1.0, True)
            del logits
            grad = grad * factors[piece]  # type: ignore[operator]  # asked for
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            if grad_weight is not None:
                grad_weight += grad.to(compute).T @ inputs
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
        )
