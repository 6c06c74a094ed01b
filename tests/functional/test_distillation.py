# SPDX-License-Identifier: Apache-2.0
"""The chunked losses against a naive float64 form, their memory, and every refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_cl.functional.distillation import chunked_cross_entropy, distillation_loss


def soft_cap(logits: torch.Tensor) -> torch.Tensor:
    return 3.0 * torch.tanh(0.7 * logits / 3.0)


def naive(
    hidden, teacher, weight, teacher_weight=None, bias=None, transform=None, mask=None, tau=1.0, teacher_bias=None
):
    """All logits at once, probability by probability."""
    student = hidden @ weight.T + (0 if bias is None else bias)
    own_bias = bias if teacher_bias is None else teacher_bias
    source = teacher @ (weight if teacher_weight is None else teacher_weight).detach().T
    source = source + (0 if own_bias is None else own_bias.detach())
    if transform is not None:
        student, source = transform(student), transform(source)
    p = torch.softmax(source / tau, -1)
    kl = (p * (torch.log(p) - torch.log(torch.softmax(student / tau, -1)))).sum(-1)
    mask = torch.ones(kl.shape, dtype=torch.bool) if mask is None else mask.bool()
    return kl[mask].sum() / max(1, int(mask.sum()))


def random(*shape: int, seed: int, scale: float = 1.0, dtype=torch.float64) -> torch.Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 3),
    tokens=st.integers(1, 7),
    vocab=st.integers(2, 40),
    chunk=st.one_of(st.none(), st.integers(1, 30)),
    tau=st.sampled_from([1.0, 0.5, 2.0]),
    own_head=st.booleans(),
    with_bias=st.booleans(),
    with_mask=st.booleans(),
    transform=st.sampled_from([None, soft_cap]),
)
def test_values_and_gradients_equal_the_naive_form(
    rows, tokens, vocab, chunk, tau, own_head, with_bias, with_mask, transform
) -> None:
    size = 5
    student = random(rows, tokens, size, seed=1).requires_grad_()
    teacher = random(rows, tokens, size, seed=2)
    weight = random(vocab, size, seed=3).requires_grad_()
    own = random(vocab, size, seed=4) if own_head else None
    bias = random(vocab, seed=5).requires_grad_() if with_bias else None
    own_bias = random(vocab, seed=6) if with_bias and own_head else None
    mask = random(rows, tokens, seed=7) > 0 if with_mask else None
    leaves = [leaf for leaf in (student, weight, bias) if leaf is not None]
    got = distillation_loss(student, teacher, weight, own, bias, transform, mask, tau, chunk, own_bias)
    want = naive(student, teacher, weight, own, bias, transform, mask, tau, own_bias)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(3 * got, leaves), torch.autograd.grad(3 * want, leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("transform", [None, soft_cap])
def test_gradcheck(transform) -> None:
    weight, teacher = random(11, 4, seed=0).requires_grad_(), random(6, 4, seed=1)
    hidden = random(6, 4, seed=2).requires_grad_()
    bias = random(11, seed=3).requires_grad_()

    def loss(h, w, b):
        own_head, own_bias = random(11, 4, seed=4), random(11, seed=5)
        return distillation_loss(h, teacher, w, own_head, b, transform, chunk_size=4, teacher_bias=own_bias)

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(1, 20), vocab=st.integers(2, 30), chunk=st.one_of(st.none(), st.integers(1, 9)))
def test_labels_equal_cross_entropy(tokens: int, vocab: int, chunk: int | None) -> None:
    hidden, weight = random(2, tokens, 4, seed=0).requires_grad_(), random(vocab, 4, seed=1).requires_grad_()
    targets = torch.randint(vocab, (2, tokens), generator=torch.Generator().manual_seed(2))
    targets[0, 0] = -100
    mask = random(2, tokens, seed=3) > -1.0
    mask[1, 0] = True
    got = chunked_cross_entropy(hidden, targets, weight, None, soft_cap, mask, chunk)
    kept = targets.masked_fill(~mask, -100)
    want = torch.nn.functional.cross_entropy(soft_cap(hidden @ weight.T).flatten(0, 1), kept.flatten())
    torch.testing.assert_close(got, want)
    for a, b in zip(
        torch.autograd.grad(got, (hidden, weight)), torch.autograd.grad(want, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_masked_tokens_may_hold_nan() -> None:
    hidden, teacher, weight = random(4, 6, 5, seed=0), random(4, 6, 5, seed=1), random(9, 5, seed=2)
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[1:, 4:] = False
    want = naive(hidden, teacher, weight, mask=mask)
    hidden[2, 5], teacher[3, 4] = float("nan"), float("inf")
    hidden.requires_grad_(), weight.requires_grad_()
    got = distillation_loss(hidden, teacher, weight, mask=mask)
    got.backward()
    torch.testing.assert_close(got.detach(), want)
    assert torch.isfinite(hidden.grad).all()
    assert torch.isfinite(weight.grad).all()
    assert not hidden.grad[~mask].any()


def test_minus_infinity_is_a_token_that_is_never_chosen() -> None:
    student, teacher, weight = (random(*shape, seed=seed) for seed, shape in enumerate([(4, 5), (4, 5), (9, 5)]))
    padded = torch.zeros(9, dtype=torch.float64)
    padded[7:] = float("-inf")
    got = distillation_loss(student, teacher, weight, bias=padded)
    torch.testing.assert_close(got, distillation_loss(student, teacher, weight[:7]))
    # The student still chooses what the teacher never does.
    alone = distillation_loss(student, teacher, weight, bias=torch.zeros(9, dtype=torch.float64), teacher_bias=padded)
    assert got < alone < float("inf")
    never = distillation_loss(student, teacher, weight, bias=padded, teacher_bias=torch.zeros(9, dtype=torch.float64))
    assert never == float("inf")


def test_no_unmasked_token_is_zero_with_a_graph() -> None:
    hidden = random(2, 3, 4, seed=0).requires_grad_()
    loss = distillation_loss(hidden, hidden.detach(), random(7, 4, seed=1), mask=torch.zeros(2, 3))
    loss.backward()
    assert loss.item() == 0.0
    assert not hidden.grad.any()


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest[tensor.dtype] = max(self.largest.get(tensor.dtype, 0), tensor.numel())
        return out


@pytest.mark.parametrize("objective", ["distillation", "labels"])
def test_no_tensor_of_all_logits_exists(objective: str) -> None:
    rows, tokens, vocab, size = 4, 512, 128, 16
    hidden = random(rows, tokens, size, seed=0, dtype=torch.bfloat16).requires_grad_()
    weight = random(vocab, size, seed=1, dtype=torch.bfloat16).requires_grad_()
    with _Largest() as seen:
        if objective == "labels":
            loss = chunked_cross_entropy(hidden, torch.zeros(rows, tokens, dtype=torch.long), weight)
        else:
            loss = distillation_loss(hidden, hidden.detach() + 1, weight, logit_transform=soft_cap)
        loss.backward()
    # In bytes, an eighth of what all logits take in float32; in float32, an eighth of them.
    assert max(count * dtype.itemsize for dtype, count in seen.largest.items()) <= 4 * rows * tokens * vocab // 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_equals_the_model_s_own_head(dtype: torch.dtype) -> None:
    hidden = random(2, 9, 16, seed=0, dtype=dtype).requires_grad_()
    teacher = random(2, 9, 16, seed=1, dtype=dtype)
    weight = random(50, 16, seed=2, scale=0.3, dtype=dtype).requires_grad_()
    got = distillation_loss(hidden, teacher, weight)
    student, source = (hidden @ weight.T).float(), (teacher @ weight.detach().T).float()
    want = torch.nn.functional.kl_div(
        student.log_softmax(-1).flatten(0, 1),
        source.log_softmax(-1).flatten(0, 1),
        log_target=True,
        reduction="batchmean",
    )
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    for a, b in zip(
        torch.autograd.grad(got, (hidden, weight)), torch.autograd.grad(want, (hidden, weight)), strict=True
    ):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize(("chunk_size", "whole_in_float32"), [(8, False), (1, True)])
def test_a_trained_head_s_gradient_is_as_exact_in_chunks(chunk_size: int, whole_in_float32: bool) -> None:
    tokens, vocab, size = 96, 64, 128
    hidden = random(1, tokens, size, seed=0, dtype=torch.bfloat16)
    teacher = random(1, tokens, size, seed=1, dtype=torch.bfloat16)
    weight = random(vocab, size, seed=2, scale=0.3, dtype=torch.bfloat16).requires_grad_()

    def error(gradient: torch.Tensor) -> float:
        return ((gradient.double() - exact).norm() / exact.norm()).item()

    exact_weight = weight.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(naive(hidden.double(), teacher.double(), exact_weight), exact_weight)
    (at_once,) = torch.autograd.grad(distillation_loss(hidden, teacher, weight, chunk_size=tokens), weight)
    with _Largest() as seen:
        (found,) = torch.autograd.grad(distillation_loss(hidden, teacher, weight, chunk_size=chunk_size), weight)
    # Up to 16 chunks of the head's own dtype add up in it; more of them need a float32 sum as large as the head.
    assert (seen.largest[torch.float32] >= vocab * size) == whole_in_float32
    assert error(found) < 1.5 * error(at_once)


def test_float16_gradients_survive_a_mean_over_many_tokens() -> None:
    # (p_student - p_teacher) / N is below float16's smallest number here; the loss scale must come first
    hidden = random(1, 4096, 4, seed=0, scale=1e-2, dtype=torch.float16).requires_grad_()
    weight = random(64, 4, seed=1, scale=1e-2, dtype=torch.float16)
    loss = distillation_loss(hidden, -hidden.detach(), weight)
    (loss * 2.0**16).backward()
    assert (hidden.grad != 0).float().mean() > 0.9


def test_under_autocast_the_head_computes_in_the_autocast_dtype() -> None:
    hidden = random(2, 5, 8, seed=0, dtype=torch.float32).requires_grad_()
    weight = random(20, 8, seed=1, dtype=torch.float32).requires_grad_()
    teacher = random(2, 5, 8, seed=2, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = distillation_loss(hidden, teacher, weight)
    got.backward()
    low = distillation_loss(hidden.detach().bfloat16(), teacher.bfloat16(), weight.detach().bfloat16())
    assert torch.equal(got.detach(), low)
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


def test_without_gradients_nothing_is_kept() -> None:
    hidden = random(2, 5, 8, seed=0).requires_grad_()
    with torch.no_grad():
        loss = distillation_loss(hidden, hidden.detach(), random(20, 8, seed=1))
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(0.0, abs=1e-12)


def test_the_teacher_follows_its_own_head() -> None:
    """A trained head drifts away from the teacher's: with the shared head the drift would be invisible."""
    hidden = random(2, 5, 8, seed=0)
    old, new = random(20, 8, seed=1), random(20, 8, seed=2)
    assert distillation_loss(hidden, hidden, new).item() == pytest.approx(0.0, abs=1e-12)
    assert distillation_loss(hidden, hidden, new, old).item() > 0.1


H, W = torch.zeros(2, 3, 4), torch.zeros(7, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: distillation_loss(H, torch.zeros(2, 2, 4), W), "must hold the same tokens"),
        (lambda: distillation_loss(H, H, W, temperature=0.0), "`temperature=0.0`"),
        (lambda: distillation_loss(H, H, torch.zeros(7, 5)), r"`head_weight` has shape \(7, 5\)"),
        (lambda: distillation_loss(H, H, torch.zeros(14, 1), W), "quantized head must be"),
        (lambda: distillation_loss(H, H, W, torch.zeros(7, 5)), r"`teacher_head_weight` has shape \(7, 5\)"),
        (lambda: distillation_loss(H, H, W, torch.zeros(8, 4)), "needs one vocabulary"),
        (lambda: distillation_loss(H, H, W, bias=torch.zeros(6)), r"bias` has shape \(6,\)"),
        (lambda: distillation_loss(H, H, W, mask=torch.ones(2, 4)), r"`mask` \(2, 4\)"),
        (lambda: distillation_loss(H, H, W, chunk_size=0), "`chunk_size=0`"),
        (lambda: chunked_cross_entropy(H, torch.zeros(2, 2, dtype=torch.long), W), "Shift both before"),
    ],
)
def test_refusals(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
