# SPDX-License-Identifier: Apache-2.0
"""The mathematics of I-LoRA: slow weights, their consistency with the fast ones, points between two adapters."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# A float32 copy of lower-precision weights is made for the update; this bounds it, in elements.
_CHUNK_ELEMENTS = 1 << 24


def half_life_to_decay(half_life: float, updates: float) -> float:
    """The decay with which a weight's share in the average halves every ``half_life * updates`` updates.

    Args:
        half_life: fraction of the task's updates, above 0.
        updates: number of updates in the task.

    Returns:
        The decay of one update, in (0, 1).

    Raises:
        ValueError: if an argument is not above 0.

    Example:
        >>> decay = half_life_to_decay(0.1, 100)
        >>> round(decay ** 10, 6)
        0.5
    """
    if not half_life > 0 or not updates > 0:
        raise ValueError(f"`half_life` and `updates` must be above 0; found {half_life} and {updates}.")
    return 0.5 ** (1.0 / (half_life * updates))


def warmup_decay(decay: float, update: int) -> float:
    """The decay of update number ``update`` (the first is 1): ``min(1 - 1 / (update + 1), decay)``.

    While the first term is the smaller, the average is the plain mean of the initial weights and all weights since.

    Example:
        >>> [round(warmup_decay(0.7, k), 3) for k in (1, 2, 3)]
        [0.5, 0.667, 0.7]
    """
    return min(1.0 - 1.0 / (update + 1), decay)


def remaining_share(decay: float, updates: int, done: int | None = None) -> float:
    """The share that the weights of before have in the average after ``updates`` more updates.

    Args:
        decay: the decay of one update.
        updates: how many updates follow.
        done: updates made before with warm-up; None for no warm-up.

    Example:
        >>> round(remaining_share(0.999, 100), 3)
        0.905
        >>> round(remaining_share(0.999, 100, done=0), 4)  # warm-up: the mean of 101 points
        0.0099
    """
    if done is None:
        return decay**updates
    # Warm-up holds while k / (k + 1) < decay, and the product of k / (k + 1) telescopes.
    last_warm = done + updates if decay >= 1.0 else min(done + updates, max(done, int(decay / (1.0 - decay))))
    return (done + 1) / (last_warm + 1) * decay ** (done + updates - last_warm)


@torch.no_grad()
def update_average_(slow: Sequence[Tensor], fast: Sequence[Tensor], decay: float) -> None:
    """One step of the exponential moving average, in place: ``slow <- decay * slow + (1 - decay) * fast``.

    I-LoRA (Ren et al., arXiv 2402.18865), the update of its long-term weights. One fused multi-tensor operation where
    both are float32; lower precisions are first copied to float32, a bounded piece at a time.

    Args:
        slow: float32 tensors, changed in place.
        fast: tensors of the same shapes, in any floating-point dtype; only read.
        decay: in [0, 1].

    Raises:
        ValueError: if ``decay`` is outside [0, 1] or the lists differ in length.

    Example:
        >>> slow = [torch.zeros(2)]
        >>> update_average_(slow, [torch.ones(2)], decay=0.75)
        >>> slow[0]
        tensor([0.2500, 0.2500])
    """
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"`decay` must be in [0, 1]; found {decay}.")
    if len(slow) != len(fast):
        raise ValueError(f"`slow` and `fast` must pair up; found {len(slow)} and {len(fast)} tensors.")
    slow, fast = list(slow), list(fast)
    if all(s.dtype == f.dtype for s, f in zip(slow, fast, strict=True)):
        if slow:
            torch._foreach_lerp_(slow, fast, 1.0 - decay)
        return
    start = 0
    while start < len(slow):
        stop, elements = start + 1, slow[start].numel()
        while stop < len(slow) and elements + slow[stop].numel() <= _CHUNK_ELEMENTS:
            elements += slow[stop].numel()
            stop += 1
        copies = [torch.empty_like(s) for s in slow[start:stop]]
        torch._foreach_copy_(copies, fast[start:stop])
        torch._foreach_lerp_(slow[start:stop], copies, 1.0 - decay)
        start = stop


def consistency_loss(
    fast: Tensor, slow: Tensor, mask: Tensor | None = None, kind: Literal["mse", "one_sided"] = "mse"
) -> Tensor:
    """How far the fast weights' hidden states are from the slow weights' on the same tokens.

    I-LoRA (Ren et al., arXiv 2402.18865): ``"mse"`` is the paper's mean squared difference, ``"one_sided"`` what its
    released code computes, ``mean(relu(slow - fast) ** 2)``. The mean is over the unmasked tokens and all dimensions,
    in float32.

    Args:
        fast: ``[..., D]``, with graph.
        slow: ``[..., D]``; no gradient flows into it.
        mask: ``[...]``, true where a token is real; None for all.
        kind: ``"mse"`` or ``"one_sided"``.

    Returns:
        A float32 scalar; 0 where every token is masked.

    Raises:
        ValueError: if shapes do not match or ``kind`` is unknown.

    Example:
        >>> fast, slow = torch.tensor([[1.0, 2.0], [9.0, 9.0]]), torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> mask = torch.tensor([True, False])
        >>> consistency_loss(fast, slow, mask), consistency_loss(fast, slow, mask, kind="one_sided")
        (tensor(2.5000), tensor(0.5000))
    """
    if fast.shape != slow.shape:
        raise ValueError(f"`fast` and `slow` must have one shape; found {tuple(fast.shape)} and {tuple(slow.shape)}.")
    if mask is not None and mask.shape != fast.shape[:-1]:
        raise ValueError(f"`mask` must have shape {tuple(fast.shape[:-1])}; found {tuple(mask.shape)}.")
    if kind not in ("mse", "one_sided"):
        raise ValueError(f"`kind` must be 'mse' or 'one_sided'; found {kind!r}.")
    return _MeanSquare.apply(fast, slow.detach(), None if mask is None else mask.to(torch.bool), kind == "one_sided")


class _MeanSquare(torch.autograd.Function):
    """The mean squared difference, with no more than two float32 tensors of the states' size at a time.

    Nothing is kept for the backward pass but the states themselves: it takes their difference once more, which costs
    less than writing and reading float32 copies of every compared layer.
    """

    @staticmethod
    def forward(ctx: Any, fast: Tensor, slow: Tensor, mask: Tensor | None, one_sided: bool) -> Tensor:
        difference = _difference(fast, slow, mask, one_sided)
        if mask is None:
            count = torch.full((), float(max(1, difference.numel())), device=fast.device)
        else:
            count = (mask.sum() * float(fast.shape[-1])).clamp_min(1.0)
        ctx.save_for_backward(fast, slow, mask, count)
        ctx.one_sided = one_sided
        return torch.linalg.vector_norm(difference).square() / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        fast, slow, mask, count = ctx.saved_tensors
        difference = _difference(fast, slow, mask, ctx.one_sided)
        return difference.mul_(2 * grads[0] / count).to(fast.dtype), None, None, None


def _difference(fast: Tensor, slow: Tensor, mask: Tensor | None, one_sided: bool) -> Tensor:
    """``fast - slow`` in float32 where the mask is true and 0 elsewhere; one-sided, only where it is negative."""
    # Cast first: operations on two dtypes at once run at a third of a GPU's bandwidth.
    difference = fast.to(torch.float32, copy=True).sub_(slow.float())
    if mask is not None:
        # Filled, not multiplied: what padding holds may be infinite, and 0 * inf would reach the loss.
        difference.masked_fill_(~mask.unsqueeze(-1), 0.0)
    return difference.clamp_max_(0.0) if one_sided else difference


def interpolate_adapters(
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    alpha: float,
    mode: Literal["factors", "product"] = "factors",
    scaling_a: float | Mapping[str, float] = 1.0,
    scaling_b: float | Mapping[str, float] = 1.0,
) -> dict[str, Tensor]:
    """The LoRA adapter at ``alpha`` on the line from ``a`` (0) to ``b`` (1).

    ``"factors"`` interpolates every tensor, ``(1 - alpha) * a + alpha * b``, as the paper does (mode connectivity of
    I-LoRA, arXiv 2402.18865, section 3). ``"product"`` interpolates the weight update that the factors make,
    ``(1 - alpha) * s_a * B_a A_a + alpha * s_b * B_b A_b``, exactly: the result is an adapter of rank
    ``r_a + r_b`` and scaling 1. The two differ, since the update is quadratic in the factors.

    Args:
        a: tensors of one adapter by name, as in ``adapter_model.safetensors`` or a state dict.
        b: tensors of the other.
        alpha: place on the line; outside [0, 1] extrapolates.
        mode: ``"factors"`` or ``"product"``.
        scaling_a: what PEFT multiplies the product BA of ``a`` with (``lora_alpha / r``), one number or a mapping from
            the module's name (the part before ``.lora_A``); only ``"product"`` needs it.
        scaling_b: the same of ``b``.

    Returns:
        Tensors by name, in the dtype of ``a``.

    Raises:
        TypeError: if ``a`` or ``b`` is a path; :func:`lightning_cl.connectivity.interpolate_adapters` takes folders.
        ValueError: if the adapters do not have the same tensors, or shapes that the mode can join.

    Example:
        >>> a = {"q.lora_A.weight": torch.zeros(1, 2), "q.lora_B.weight": torch.zeros(2, 1)}
        >>> b = {"q.lora_A.weight": torch.ones(1, 2), "q.lora_B.weight": torch.ones(2, 1)}
        >>> interpolate_adapters(a, b, 0.25)["q.lora_A.weight"]
        tensor([[0.2500, 0.2500]])
        >>> joined = interpolate_adapters(a, b, 0.25, mode="product")
        >>> joined["q.lora_B.weight"] @ joined["q.lora_A.weight"]
        tensor([[0.2500, 0.2500],
                [0.2500, 0.2500]])
    """
    for adapter in (a, b):
        if isinstance(adapter, (str, os.PathLike)):
            raise TypeError(
                f"`interpolate_adapters` of `lightning_cl.functional` takes tensors by name; found the path {adapter}."
                " Use `lightning_cl.connectivity.interpolate_adapters`, which reads and writes adapter folders."
            )
    if mode not in ("factors", "product"):
        raise ValueError(f"`mode` must be 'factors' or 'product'; found {mode!r}.")
    missing = sorted(a.keys() ^ b.keys())
    if missing:
        raise ValueError(
            f"The adapters do not have the same tensors; {missing[0]!r} and {len(missing) - 1} more are in one alone."
            " Interpolate adapters of one model with the same target modules."
        )
    result = {}
    for name, tensor in a.items():
        other = b[name].to(tensor.device)
        module, kind = lora_factor(name)
        if mode == "product" and kind is not None:
            if kind == "magnitude":
                raise ValueError(
                    f"{name!r} belongs to a DoRA adapter, whose update is not the product BA alone. Use"
                    " `mode='factors'`."
                )
            result[name] = _join(
                tensor,
                other,
                kind,
                (1.0 - alpha) * _scaling(scaling_a, module),
                alpha * _scaling(scaling_b, module),
            )
            continue
        if tensor.shape != other.shape:
            raise ValueError(
                f"{name!r} has shape {tuple(tensor.shape)} in `a` and {tuple(other.shape)} in `b`: factors of different"
                " ranks have no line between them. Use `mode='product'`, which joins the ranks."
            )
        if not tensor.is_floating_point():
            result[name] = tensor.clone()
            continue
        result[name] = torch.lerp(tensor.float(), other.float(), alpha).to(tensor.dtype)
    return result


def lora_factor(name: str) -> tuple[str, Literal["A", "B", "bias", "magnitude"] | None]:
    """The module that a tensor of a LoRA adapter belongs to, and its part in the update (None: it is no factor).

    Example:
        >>> lora_factor("model.q_proj.lora_A.weight"), lora_factor("model.norm.weight")
        (('model.q_proj', 'A'), ('model.norm.weight', None))
    """
    for part, kind in (("lora_A", "A"), ("lora_B", "B"), ("lora_embedding_A", "A"), ("lora_embedding_B", "B")):
        module, found, rest = name.partition(f".{part}")
        if found and not rest.startswith("_"):
            return module, "bias" if rest.endswith(".bias") else kind  # type: ignore[return-value]
    module, found, _ = name.partition(".lora_magnitude_vector")
    return (module, "magnitude") if found else (name, None)


def _scaling(scaling: float | Mapping[str, float], module: str) -> float:
    return scaling[module] if isinstance(scaling, Mapping) else scaling


def _join(a: Tensor, b: Tensor, kind: str, weight_a: float, weight_b: float) -> Tensor:
    if kind == "A":
        # [r_a, in] over [r_b, in]; the weights go into B, so that A stays what was trained.
        return torch.cat([a, b.to(a.dtype)])
    scaled = (a.float() * weight_a, b.float() * weight_b)
    joined = scaled[0] + scaled[1] if kind == "bias" else torch.cat(scaled, dim=1)
    return joined.to(a.dtype)
