# SPDX-License-Identifier: Apache-2.0
"""Distillation and label losses from hidden states, chunk by chunk, so that no tensor of all logits ever exists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_cl.functional.fused_divergence import divergence_and_gradient_, is_supported

# Logits of one chunk: 2^25 float32 values are 128 MiB, enough to fill a GPU and small beside the activations.
_CHUNK_ELEMENTS = 2**25
# At least this many chunks, so that a small vocabulary does not bring the whole back in one piece; but a chunk of fewer
# tokens than this takes as long as if it had them, since its products wait for the head's weight.
_MIN_CHUNKS, _FULL_CHUNK = 8, 256
# Products run in tiles of so many rows.
_TILE = 128
# Chunks whose gradients wait for one product with the states, in 16 bits: each product reads and writes a trained head's
# gradient once, which takes longer than what it multiplies. Never more than a quarter of the tokens.
_GROUPED, _MIN_GROUPS = 4, 4


def distillation_loss(
    hidden: Tensor,
    teacher_hidden: Tensor,
    head_weight: Tensor,
    teacher_head_weight: Tensor | None = None,
    bias: Tensor | None = None,
    logit_transform: Callable[[Tensor], Tensor] | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    teacher_bias: Tensor | None = None,
) -> Tensor:
    """Forward KL(teacher || student) over the full vocabulary, mean over unmasked tokens.

    The soft objective of self-generated replay (arXiv 2605.26097, section 3), from hidden states instead of logits:
    each chunk of tokens goes through the head in the compute dtype and through a float32 log-softmax, and its gradients
    are taken on the spot, since the loss is a plain sum over tokens. So neither pass holds logits of more than one
    chunk, and no product is computed twice. On a GPU a Triton kernel does what comes between a chunk's products, unless
    there is a ``logit_transform`` or a trained bias. Second derivatives are not available.

    Args:
        hidden: ``[..., D]``, the student's states at the head's input.
        teacher_hidden: The teacher's, same shape; never receives a gradient.
        head_weight: ``[V, D]``, the student's head; receives a gradient if it requires one.
        teacher_head_weight: ``[V, D]``; without it the teacher uses ``head_weight`` detached, which is right only
            while the head is the teacher's own: pass it for a trained or tied head.
        bias: ``[V]``, the head's bias.
        logit_transform: Elementwise function of the logits, e.g. a soft cap; applied to both sides, in float32.
        mask: ``[...]``, true or nonzero for the tokens that count. Masked tokens may hold anything, also NaN.
        temperature: Both logits are divided by it; > 0. The loss is the KL of the softened distributions, in nats a
            token, not multiplied by the temperature's square.
        chunk_size: Tokens a chunk; by default at most 2^25 logits and at most an eighth of the tokens (or 256).
        teacher_bias: ``[V]``; by default ``bias`` detached.

    Returns:
        A float32 scalar (float64 for float64 inputs), >= 0 up to rounding; 0 if no token is unmasked.

    Raises:
        ValueError: If shapes do not fit, or a number is out of range.

    Example:
        >>> student, teacher, head = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.randn(32, 8)
        >>> bool(distillation_loss(student, teacher, head) > 0)
        True
        >>> float(distillation_loss(student, student, head))
        0.0
    """
    if teacher_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"`hidden` {tuple(hidden.shape)} and `teacher_hidden` {tuple(teacher_hidden.shape)} must hold the same"
            " tokens. Take both from the same rows."
        )
    if not temperature > 0:
        raise ValueError(f"`temperature={temperature}`: logits are divided by it, so it must be > 0. Use 1.0 for none.")
    _check_head(hidden, head_weight, bias)
    shift = bias if teacher_bias is None else teacher_bias
    head = head_weight if teacher_head_weight is None else teacher_head_weight
    _check_head(teacher_hidden, head, shift, "teacher_")
    if head.shape[0] != head_weight.shape[0]:
        raise ValueError(
            f"`teacher_head_weight` has {head.shape[0]} rows and `head_weight` {head_weight.shape[0]}: a divergence"
            " needs one vocabulary. Use a teacher with the student's tokenizer."
        )
    teacher = _Teacher(teacher_hidden.detach().flatten(0, -2), teacher_head_weight, shift)
    return _chunked(hidden, head_weight, bias, teacher, None, logit_transform, mask, temperature, chunk_size)


def chunked_cross_entropy(
    hidden: Tensor,
    targets: Tensor,
    head_weight: Tensor,
    bias: Tensor | None = None,
    logit_transform: Callable[[Tensor], Tensor] | None = None,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Cross entropy of the head's predictions with given tokens, mean over unmasked ones, in chunks.

    The hard objective of self-generated replay (arXiv 2605.26097, section 3), with the memory of
    :func:`distillation_loss`. Nothing is shifted here: ``targets[i]`` is the token that ``hidden[i]`` predicts.

    Args:
        hidden: ``[..., D]``, states at the head's input.
        targets: ``[...]``, token ids; negative ones (-100) are masked.
        head_weight: ``[V, D]``.
        bias: ``[V]``.
        logit_transform: As in :func:`distillation_loss`.
        mask: As in :func:`distillation_loss`.
        chunk_size: As in :func:`distillation_loss`.

    Returns:
        A float32 scalar (float64 for float64 inputs); 0 if no token is unmasked.

    Raises:
        ValueError: If shapes do not fit.

    Example:
        >>> hidden, head, tokens = torch.randn(2, 5, 8), torch.randn(32, 8), torch.randint(32, (2, 5))
        >>> expected = torch.nn.functional.cross_entropy((hidden @ head.T).flatten(0, 1), tokens.flatten())
        >>> bool(torch.allclose(chunked_cross_entropy(hidden, tokens, head), expected))
        True
    """
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"`targets` {tuple(targets.shape)} must hold one token for each state of `hidden` {tuple(hidden.shape)}."
            " Shift both before the call."
        )
    _check_head(hidden, head_weight, bias)
    counted = targets >= 0
    if mask is not None:
        counted = counted & mask.bool()
    return _chunked(hidden, head_weight, bias, None, targets, logit_transform, counted, 1.0, chunk_size)


class _Teacher(NamedTuple):
    """The side without a gradient: states ``[N, D]``, its own head (None: the student's), and bias."""

    hidden: Tensor
    weight: Tensor | None
    bias: Tensor | None


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = "") -> None:
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"`{prefix}head_weight` has shape {tuple(weight.shape)}, `{prefix}hidden` {tuple(hidden.shape)}: the head"
            " must be [vocabulary, hidden size]. Pass the weight of the language-model head; a quantized head must be"
            " dequantized first."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"`{prefix}bias` has shape {tuple(bias.shape)}, the head {tuple(weight.shape)}: it must be [V]."
        )


def _chunked(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: _Teacher | None,
    targets: Tensor | None,
    transform: Callable[[Tensor], Tensor] | None,
    mask: Tensor | None,
    temperature: float,
    chunk_size: int | None,
) -> Tensor:
    if mask is not None and mask.shape != hidden.shape[:-1]:
        raise ValueError(f"`mask` {tuple(mask.shape)} must have the shape of `hidden` {tuple(hidden.shape)} without D.")
    tokens = hidden.shape[:-1].numel()
    if chunk_size is None:
        chunk_size = min(_CHUNK_ELEMENTS // max(1, weight.shape[0]), max(_FULL_CHUNK, -(-tokens // _MIN_CHUNKS)))
        chunk_size = max(1, chunk_size - (chunk_size % _TILE if chunk_size > _TILE else 0))
    if chunk_size < 1:
        raise ValueError(f"`chunk_size={chunk_size}`: a chunk holds at least one token. Use None for the default.")
    device = hidden.device.type
    # What the model's own head would compute in: inside autocast the autocast dtype, else the weights' dtype.
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    settings = (teacher, targets, transform, temperature, chunk_size, compute, torch.is_grad_enabled())
    with torch.autocast(device, enabled=False):
        return _ChunkedLoss.apply(hidden, weight, bias, mask, settings)


class _ChunkedLoss(torch.autograd.Function):
    """Sum the loss over chunks and keep its gradients, which the backward pass only has to scale."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, settings: Any
    ) -> Any:
        teacher, targets, transform, temperature, chunk_size, compute, grad_enabled = settings
        states = hidden.reshape(-1, hidden.shape[-1])
        keep = None if mask is None else mask.reshape(-1).bool()
        labels = None if targets is None else targets.reshape(-1)
        work = torch.promote_types(compute, torch.float32)
        needs = [grad_enabled and needed for needed in ctx.needs_input_grad[:3]]
        grad_hidden = torch.empty_like(states) if needs[0] else None
        grad_weight = _HeadGradient(weight, compute, work, chunk_size, states.shape[0]) if needs[1] else None
        grad_bias = torch.zeros_like(bias, dtype=work) if needs[2] and bias is not None else None
        # What the kernel leaves is rounded to the logits' dtype, which is too little for a sum over all tokens.
        plain_kl = labels is None and transform is None and grad_bias is None and work == torch.float32
        fused = plain_kl and is_supported(compute, states.device)
        kind = compute if fused else work
        head = weight.to(compute)
        teacher_head = head if teacher is None or teacher.weight is None else teacher.weight.to(compute)
        total = torch.zeros((), dtype=work, device=states.device)
        for start in range(0, states.shape[0], chunk_size):
            piece = slice(start, start + chunk_size)
            kept = None if keep is None else keep[piece]
            inputs = _clean(states[piece], kept, compute)
            target: Tensor
            if labels is not None:
                target = labels[piece].clamp_min(0)
            else:
                target = _logits(_clean(teacher.hidden[piece], kept, compute), teacher_head, teacher.bias, kind)
                if not fused:
                    target = _log_softmax(target if transform is None else transform(target), temperature)
            # Without a name of its own here, the tensor of the logits is gone as soon as it has been used.
            if fused:
                values, grad = divergence_and_gradient_(
                    _logits(inputs, head, bias, kind), target, temperature, any(needs)
                )
            else:
                values, grad = _values_and_gradient(
                    _logits(inputs, head, bias, kind), target, transform, temperature, any(needs)
                )
            del target
            total += (values if kept is None else values.masked_fill(~kept, 0.0)).sum()
            if grad is None:
                continue
            if grad_bias is not None:
                grad_bias += (grad if kept is None else grad.masked_fill_(~kept[:, None], 0.0)).sum(0)
            grad = grad.to(compute)
            if grad_hidden is not None:
                rows = torch.mm(grad, head)
                # Here, where they are D wide, and not V: in the head's gradient the zeroed inputs leave them out.
                grad_hidden[piece] = rows if kept is None else rows.masked_fill_(~kept[:, None], 0.0)
            if grad_weight is not None:
                grad_weight.add(grad, inputs)
        count = torch.full((), states.shape[0], device=states.device) if keep is None else keep.sum()
        count = count.clamp_min(1).to(work)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.result(), grad_bias, count)
        ctx.likes = (
            (hidden.shape, hidden.dtype),
            (weight.shape, weight.dtype),
            None if bias is None else (bias.shape, bias.dtype),
        )
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        *found, count = ctx.saved_tensors
        # The mean's 1/count meets the loss scale here, in float32: applied to float16 gradients it would underflow. With
        # an axis, since a factor without one would be rounded to their dtype first.
        scale = (grads[0] / count).reshape(1)
        scaled = [
            None if grad is None else torch.mul(grad, scale, out=torch.empty_like(grad, dtype=like[1])).reshape(like[0])
            for grad, like in zip(found, ctx.likes, strict=True)
        ]
        return *scaled, None, None


class _HeadGradient:
    """The gradient of a trained head, summed over chunks: nearly as exact as in float32, and with little traffic.

    The head is the largest matrix there is, and a float32 sum of its size takes longer to read and write at each chunk
    than all products. So, in 16 bits, a few chunks share one product; a few products add up in their own dtype, inside
    the product; and only those sums, as many as there are, in float32.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, work: torch.dtype, chunk_size: int, tokens: int) -> None:
        self._weight, self._dtype, self._work = weight, dtype, work
        # A sum of 16 roundings is off by no more than three. Float16 would overflow before the mean's 1/count.
        self._few = {torch.bfloat16: 16, torch.float16: 1}.get(dtype, 0)
        grouped = min(_GROUPED, tokens // (_MIN_GROUPS * chunk_size)) if dtype.itemsize == 2 else 1
        self._room = chunk_size * grouped if grouped > 1 else 0
        self._filled = self._added = 0
        self._waiting: tuple[Tensor, Tensor] | None = None
        self._partial: Tensor | None = None
        self._total: Tensor | None = None

    def add(self, grad: Tensor, inputs: Tensor) -> None:
        """Add a chunk's ``grad.T @ inputs``, from ``[n, V]`` and ``[n, D]``."""
        if not self._room:
            self._multiply(grad, inputs)
            return
        if self._waiting is None:
            self._waiting = (
                grad.new_empty(self._room, grad.shape[1]),
                inputs.new_empty(self._room, inputs.shape[1]),
            )
        stop = self._filled + len(grad)
        self._waiting[0][self._filled : stop] = grad
        self._waiting[1][self._filled : stop] = inputs
        self._filled = stop
        if stop == self._room:
            self._multiply_waiting()

    def result(self) -> Tensor:
        """The sum."""
        if self._filled:
            self._multiply_waiting()
        self._waiting = None
        if self._total is not None:
            self._flush()
            return self._total
        return torch.zeros_like(self._weight, dtype=self._dtype) if self._partial is None else self._partial

    def _multiply_waiting(self) -> None:
        assert self._waiting is not None
        self._multiply(*(part[: self._filled] for part in self._waiting))
        self._filled = 0

    def _multiply(self, grad: Tensor, inputs: Tensor) -> None:
        if self._partial is None:
            self._partial = torch.mm(grad.T, inputs)
        elif self._added == self._few > 0:
            self._flush()
            torch.mm(grad.T, inputs, out=self._partial)
        else:
            self._partial.addmm_(grad.T, inputs)
        self._added += 1

    def _flush(self) -> None:
        assert self._partial is not None
        self._total = self._partial.to(self._work) if self._total is None else self._total.add_(self._partial)
        self._added = 0


def _clean(states: Tensor, kept: Tensor | None, dtype: torch.dtype) -> Tensor:
    # Zeroed, not only left out of the sum: 0 * NaN in a product with the gradient would still be NaN.
    return (states if kept is None else states.masked_fill(~kept[:, None], 0.0)).to(dtype)


def _logits(inputs: Tensor, head: Tensor, bias: Tensor | None, work: torch.dtype) -> Tensor:
    if bias is None:
        return (inputs @ head.T).to(work)
    return torch.addmm(bias.to(head.dtype), inputs, head.T).to(work)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def _values_and_gradient(
    logits: Tensor,
    target: Tensor,
    transform: Callable[[Tensor], Tensor] | None,
    temperature: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """The loss of each token of a chunk, and its gradient with respect to the head's output.

    ``target`` is either the teacher's log-probabilities ``[n, V]`` or token ids ``[n]``. What is made here is written
    over: a chunk's tensors are large, and bound by memory.
    """
    leaf, through = logits, logits
    if transform is not None:
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_(with_gradient)
            through = transform(leaf)
    log_q = _log_softmax(through.detach(), temperature)
    del logits
    if transform is None:
        del leaf, through
    if target.ndim == 1:
        index = target[:, None]
        values = -log_q.gather(-1, index)[:, 0]
        grad = log_q.exp_().scatter_add_(-1, index, -torch.ones_like(index, dtype=log_q.dtype))
    else:
        p = target.exp()
        # A token that the teacher never chooses adds nothing, also where its logit is minus infinity.
        values = target.sub_(log_q).mul_(p).masked_fill_(p == 0, 0.0).sum(-1)
        grad = log_q.exp_().sub_(p)
    if not with_gradient:
        return values, None
    if temperature != 1.0:
        grad /= temperature
    if transform is not None:
        (grad,) = torch.autograd.grad(through, leaf, grad)
    return values, grad
