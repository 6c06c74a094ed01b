# SPDX-License-Identifier: Apache-2.0
"""The kernel against the definition in float64, and the loss with it against the loss without it."""

from __future__ import annotations

import pytest
import torch

from lightning_cl.functional import distillation, fused_divergence
from lightning_cl.functional.distillation import distillation_loss
from lightning_cl.functional.fused_divergence import divergence_and_gradient_, is_supported


def definition(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = student.double().requires_grad_()
    p = (teacher.double() / temperature).softmax(-1)
    values = (p * (p.log() - (leaf / temperature).softmax(-1).log())).sum(-1)
    (grad,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), grad


def logits(rows: int, vocabulary: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return (3 * torch.randn(rows, vocabulary, device="cuda")).to(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("dtype", "digits"), [(torch.float32, 24), (torch.bfloat16, 8), (torch.float16, 11)])
@pytest.mark.parametrize("vocabulary", [2, 4095, 4096, 49153])  # around the kernel's own block, and a model's
def test_values_and_gradient_equal_the_definition(
    vocabulary: int, dtype: torch.dtype, digits: int, temperature: float
) -> None:
    student, teacher = (logits(7, vocabulary, dtype, seed) for seed in (1, 2))
    want, want_grad = definition(student, teacher, temperature)
    untouched = student.clone()
    values, none = divergence_and_gradient_(student, teacher, temperature, with_gradient=False)
    assert none is None
    assert torch.equal(student, untouched)
    again, grad = divergence_and_gradient_(student, teacher, temperature)
    assert grad is not None
    assert grad.data_ptr() == student.data_ptr()
    assert torch.equal(values, again)
    torch.testing.assert_close(values.double(), want, rtol=1e-5, atol=1e-6)
    # What is stored is rounded once.
    torch.testing.assert_close(grad.double(), want_grad, rtol=2.0**-digits + 1e-5, atol=1e-6)


@pytest.mark.gpu
def test_equal_sides_have_no_divergence_and_a_small_one_is_not_lost() -> None:
    teacher = logits(4, 50_000, torch.float32, 1)
    values, grad = divergence_and_gradient_(teacher.clone(), teacher)
    assert grad is not None
    assert not values.any()
    assert not grad.any()
    student = teacher + 1e-3 * logits(4, 50_000, torch.float32, 2)
    want, _ = definition(student, teacher, 1.0)
    values, _ = divergence_and_gradient_(student, teacher)
    torch.testing.assert_close(values.double(), want, rtol=0.05, atol=0)
    assert 0 < float(want.max()) < 1e-5


@pytest.mark.gpu
def test_minus_infinity_is_a_probability_of_zero_and_nan_stays_visible() -> None:
    teacher, student = (logits(3, 100, torch.float32, seed) for seed in (1, 2))
    teacher[0, 5] = teacher[0, 6] = student[0, 6] = float("-inf")
    student[1, 7] = float("nan")
    values, grad = divergence_and_gradient_(student.clone(), teacher)
    assert grad is not None
    torch.testing.assert_close(grad[0, 5], student[0].softmax(-1)[5])
    assert grad[0, 6] == 0
    q, p = student[0].log_softmax(-1), teacher[0].log_softmax(-1)
    real = p.isfinite()
    torch.testing.assert_close(values[0], (p.exp() * (p - q))[real].sum())
    assert values[1].isnan()
    assert grad[1].isnan().all()
    assert values[2].isfinite()


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_the_same_and_takes_less_memory(
    dtype: torch.dtype, trained_head: bool, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 700, 64, device="cuda", dtype=dtype)
    teacher = hidden + 0.3 * torch.randn_like(hidden)
    weight = (0.3 * torch.randn(20_000, 64, device="cuda")).to(dtype)
    mask = torch.rand(2, 700, device="cuda") > 0.3 if masked else None
    if mask is not None:
        hidden[~mask], teacher[~mask] = float("nan"), float("nan")
    found = []
    for fused in (False, True):
        with monkeypatch.context() as patch:
            if not fused:
                patch.setattr(distillation, "is_supported", lambda *_: False)
            leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained_head)]
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            loss = distillation_loss(leaves[0], teacher, leaves[1], mask=mask, temperature=2.0)
            peak = torch.cuda.max_memory_allocated() - before
            loss.backward()
            found.append((loss, [leaf.grad for leaf in leaves if leaf.requires_grad], peak))
    (plain, plain_grads, plain_peak), (fast, fast_grads, fast_peak) = found
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-7)
    for a, b in zip(fast_grads, plain_grads, strict=True):
        assert a is not None
        assert b is not None
        assert a.isfinite().all()
        assert (a - b).float().norm() <= (1e-5 if dtype == torch.float32 else 5e-3) * b.float().norm()
    assert fast_peak < plain_peak


@pytest.mark.gpu
def test_a_trained_bias_and_a_soft_cap_take_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        distillation, "divergence_and_gradient_", lambda *a: calls.append(1) or divergence_and_gradient_(*a)
    )
    hidden, teacher = (torch.randn(3, 8, device="cuda", requires_grad=True) for _ in range(2))
    weight, bias = torch.randn(30, 8, device="cuda"), torch.randn(30, device="cuda")
    distillation_loss(hidden, teacher, weight, bias=bias.clone().requires_grad_())
    distillation_loss(hidden, teacher, weight, logit_transform=lambda x: 3 * torch.tanh(x / 3))
    assert not calls
    fast = distillation_loss(hidden, teacher, weight, bias=bias)
    assert len(calls) == 1
    want = distillation_loss(hidden.double(), teacher.double(), weight.double(), bias=bias.double())  # not in float64
    assert len(calls) == 1
    torch.testing.assert_close(fast.double(), want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_kernel_without_a_gpu(dtype: torch.dtype) -> None:
    assert not is_supported(dtype, torch.device("cpu"))


def test_without_a_compiler_the_loss_goes_on_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: torch.Tensor) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(fused_divergence, "divergence_and_gradient_", fail)
    with pytest.warns(UserWarning, match=r"Triton cannot make .*Failed to find C compiler.*Install a C compiler"):
        assert not fused_divergence._runs.__wrapped__(torch.float32, torch.device("cpu"))


@pytest.mark.gpu
def test_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    assert is_supported(torch.bfloat16, device)
    assert not is_supported(torch.float64, device)
    monkeypatch.setattr(fused_divergence, "triton", None)
    assert not is_supported(torch.bfloat16, device)
