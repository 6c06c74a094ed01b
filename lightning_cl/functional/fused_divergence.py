# SPDX-License-Identifier: Apache-2.0
"""The KL of two heads' predictions and its gradient, straight from their logits, in one Triton kernel."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

try:  # it comes with torch's builds for GPUs, on Linux
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# Logits that a program reads at once; each of its threads has eight of them.
_BLOCK, _WARPS = 4096, 16
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

if triton is not None:

    @triton.jit
    def _row(  # type: ignore[no-untyped-def]
        student, teacher, values, vocabulary, scale, BLOCK: tl.constexpr, WITH_GRADIENT: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        student += row * vocabulary
        teacher += row * vocabulary
        places = tl.arange(0, BLOCK)
        # Each lane has a maximum and a sum of its own; they meet once, after the loop. The first maximum is finite, so that
        # no lane without a logit subtracts one infinity from another.
        s_max = tl.full([BLOCK], -3.0e38, tl.float32)
        t_max = tl.full([BLOCK], -3.0e38, tl.float32)
        s_sum = tl.zeros([BLOCK], tl.float32)
        t_sum = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocabulary, BLOCK):
            inside = start + places < vocabulary
            s = tl.load(student + start + places, mask=inside, other=float("-inf")).to(tl.float32) * scale
            t = tl.load(teacher + start + places, mask=inside, other=float("-inf")).to(tl.float32) * scale
            s_new, t_new = tl.maximum(s_max, s), tl.maximum(t_max, t)
            s_sum = s_sum * tl.exp(s_max - s_new) + tl.exp(s - s_new)
            t_sum = t_sum * tl.exp(t_max - t_new) + tl.exp(t - t_new)
            s_max, t_max = s_new, t_new
        s_top, t_top = tl.max(s_max, 0), tl.max(t_max, 0)
        s_norm = s_top + tl.log(tl.sum(s_sum * tl.exp(s_max - s_top), 0))
        t_norm = t_top + tl.log(tl.sum(t_sum * tl.exp(t_max - t_top), 0))
        # q - p is added to each term; over a row it adds up to nothing. So, but for rounding, no term is negative, and an
        # error of the two norms, which can be as large as a small divergence, falls out.
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocabulary, BLOCK):
            inside = start + places < vocabulary
            s = tl.load(student + start + places, mask=inside, other=0.0).to(tl.float32) * scale - s_norm
            t = tl.load(teacher + start + places, mask=inside, other=0.0).to(tl.float32) * scale - t_norm
            p = tl.exp(t)
            difference = tl.exp(s) - p
            # Where the teacher's probability is zero, also for a logit of minus infinity, the student's is what is left.
            total += tl.where(inside, tl.where(p > 0, p * (t - s), 0.0) + difference, 0.0)
            if WITH_GRADIENT:
                tl.store(student + start + places, (difference * scale).to(student.dtype.element_ty), mask=inside)
        tl.store(values + row, tl.sum(total, 0))


def is_supported(logits_dtype: torch.dtype, device: torch.device) -> bool:
    """Whether :func:`divergence_and_gradient_` runs for logits of this dtype on this device, which is tried once.

    >>> is_supported(torch.bfloat16, torch.device("cpu"))
    False
    """
    return triton is not None and device.type == "cuda" and logits_dtype in _DTYPES and _runs(logits_dtype, device)


@functools.cache
def _runs(dtype: torch.dtype, device: torch.device) -> bool:
    # Triton needs a C compiler beside the GPU, and a GPU that it knows.
    try:
        divergence_and_gradient_(*torch.zeros(2, 1, 2, dtype=dtype, device=device))
    except Exception as error:
        warnings.warn(
            f"Triton cannot make the distillation loss's kernel here ({error}), so it is computed by separate operations,"
            " which take twice as long. Install a C compiler to have the kernel.",
            stacklevel=2,
        )
        return False
    return True


def divergence_and_gradient_(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, with_gradient: bool = True
) -> tuple[Tensor, Tensor | None]:
    """KL(teacher || student) of each row, and its gradient with respect to the student's logits, in their place.

    The formula of :func:`~lightning_cl.functional.distillation_loss` (arXiv 2605.26097, section 3) in float32, read from
    logits of 16 or 32 bits: both are read twice and the student's are written once, where separate operations read and
    write float32 copies ten times over.

    Args:
        student: ``[n, V]``, contiguous; holds the gradient afterwards, in its dtype.
        teacher: ``[n, V]``, contiguous, of the same dtype.
        temperature: Both logits are divided by it.
        with_gradient: Without, ``student`` stays as it is.

    Returns:
        Float32 ``[n]`` in nats, and ``student`` (None without gradient).

    Example:
        >>> student, teacher = torch.randn(2, 3, 50, device="cuda")  # doctest: +SKIP
        >>> values, grad = divergence_and_gradient_(student, teacher)  # doctest: +SKIP
    """
    rows, vocabulary = student.shape
    values = torch.empty(rows, dtype=torch.float32, device=student.device)
    if rows:
        arguments = (student, teacher, values, vocabulary, 1.0 / temperature, _BLOCK, with_gradient)
        with torch.cuda.device(student.device):
            _row[(rows,)](*arguments, num_warps=_WARPS)
    return values, student if with_gradient else None
