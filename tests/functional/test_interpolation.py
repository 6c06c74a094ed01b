# SPDX-License-Identifier: Apache-2.0
"""The mathematics of I-LoRA against naive references."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_cl.functional import interpolate_adapters, interpolation
from lightning_cl.functional.interpolation import (
    consistency_loss,
    half_life_to_decay,
    remaining_share,
    update_average_,
    warmup_decay,
)

_decays = st.floats(0.0, 1.0)


@given(
    decay=_decays,
    shapes=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3)), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_update_is_the_formula(decay: float, shapes: list[tuple[int, int]], dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    slow = [torch.randn(shape, generator=generator) for shape in shapes]  # a shard may be empty
    fast = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    expected = [decay * s.double() + (1 - decay) * f.double() for s, f in zip(slow, fast, strict=True)]
    before = [f.clone() for f in fast]
    update_average_(slow, fast, decay)
    for got, wanted, f, b in zip(slow, expected, fast, before, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-6)
        assert torch.equal(f, b)


def test_update_in_low_precision_is_bounded_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpolation, "_CHUNK_ELEMENTS", 5)
    slow = [torch.zeros(n) for n in (3, 2, 7, 0, 5)]
    fast = [torch.full((n,), 2.0, dtype=torch.bfloat16) for n in (3, 2, 7, 0, 5)]
    update_average_(slow, fast, 0.5)
    assert all(torch.equal(s, torch.ones_like(s)) for s in slow)


def test_update_keeps_steps_that_low_precision_would_lose() -> None:
    # bfloat16 has 8 bits: an average held in it would stand still at decay 0.999.
    slow, fast = [torch.ones(1)], [torch.full((1,), 1.5, dtype=torch.bfloat16)]
    for _ in range(100):
        update_average_(slow, fast, 0.999)
    assert slow[0].item() == pytest.approx(1.5 - 0.5 * 0.999**100, abs=1e-5)


def test_update_names_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"`decay` must be in \[0, 1\]; found 1.5"):
        update_average_([torch.zeros(1)], [torch.zeros(1)], 1.5)
    with pytest.raises(ValueError, match=r"must pair up; found 1 and 0 tensors"):
        update_average_([torch.zeros(1)], [], 0.5)


@given(st.floats(0.01, 2.0), st.integers(1, 10_000))
def test_half_life_halves(half_life: float, updates: int) -> None:
    decay = half_life_to_decay(half_life, updates)
    assert 0.0 <= decay < 1.0
    assert decay ** (half_life * updates) == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize(("half_life", "updates"), [(0.0, 10), (-1.0, 10), (0.1, 0), (math.nan, 10)])
def test_half_life_names_bad_arguments(half_life: float, updates: int) -> None:
    with pytest.raises(ValueError, match=r"`half_life` and `updates` must be above 0; found"):
        half_life_to_decay(half_life, updates)


def test_warm_up_is_the_plain_mean() -> None:
    points = [3.0, 5.0, -1.0, 4.0, 9.0]
    slow = [torch.tensor([points[0]])]
    for k, point in enumerate(points[1:], start=1):
        update_average_(slow, [torch.tensor([point])], warmup_decay(0.999, k))
        assert slow[0].item() == pytest.approx(sum(points[: k + 1]) / (k + 1), abs=1e-5)


@given(st.floats(0.0, 0.9999), st.integers(0, 300), st.integers(0, 300))
def test_remaining_share_is_the_product_of_the_decays(decay: float, updates: int, done: int) -> None:
    assert remaining_share(decay, updates) == pytest.approx(decay**updates)
    product = math.prod(warmup_decay(decay, k) for k in range(done + 1, done + updates + 1))
    assert remaining_share(decay, updates, done=done) == pytest.approx(product, rel=1e-6, abs=1e-12)


def _naive_consistency(fast: Tensor, slow: Tensor, mask: Tensor, kind: str) -> float:
    total, count = 0.0, 0
    for row in range(fast.shape[0]):
        for t in range(fast.shape[1]):
            if not mask[row, t]:
                continue
            for d in range(fast.shape[2]):
                gap = float(slow[row, t, d]) - float(fast[row, t, d])
                total += max(gap, 0.0) ** 2 if kind == "one_sided" else gap**2
                count += 1
    return total / count if count else 0.0


@pytest.mark.parametrize("kind", ["mse", "one_sided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_consistency_is_the_naive_loop(kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    fast, slow = torch.randn(2, 2, 5, 3, generator=generator).to(dtype)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]])
    assert float(consistency_loss(fast, slow, mask, kind)) == pytest.approx(  # type: ignore[arg-type]
        _naive_consistency(fast, slow, mask, kind), rel=1e-5
    )


@pytest.mark.parametrize("kind", ["mse", "one_sided"])
def test_consistency_does_not_see_padding(kind: str) -> None:
    fast, slow = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.ones(2, 3, dtype=torch.bool)
    padded_fast = torch.cat([fast, torch.full((2, 2, 4), torch.inf)], dim=1).requires_grad_()
    padded_slow = torch.cat([slow, torch.full((2, 2, 4), torch.nan)], dim=1)
    padded_mask = torch.cat([mask, torch.zeros(2, 2, dtype=torch.bool)], dim=1)
    loss = consistency_loss(padded_fast, padded_slow, padded_mask, kind)  # type: ignore[arg-type]
    loss.backward()
    assert loss.item() == pytest.approx(consistency_loss(fast, slow, mask, kind).item())  # type: ignore[arg-type]
    assert torch.equal(padded_fast.grad[:, 3:], torch.zeros(2, 2, 4))
    assert torch.isfinite(padded_fast.grad).all()


@pytest.mark.parametrize("kind", ["mse", "one_sided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_consistency_has_the_gradient_of_the_plain_formula(kind: str, dtype: torch.dtype) -> None:
    fast, slow = torch.randn(2, 2, 5, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]], dtype=torch.bool)
    fast.requires_grad_()
    gap = slow.float() - fast.float()
    gap = gap.relu() if kind == "one_sided" else gap
    (wanted,) = torch.autograd.grad(3.0 * gap[mask].square().mean(), fast)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = consistency_loss(fast, slow, mask, kind)  # type: ignore[arg-type]
    (found,) = torch.autograd.grad(3.0 * loss, fast)
    assert found.dtype == dtype
    torch.testing.assert_close(found, wanted)
    # Of the states' size, it holds on to the states alone.
    assert {t.data_ptr() for t in kept if t.numel() == fast.numel()} == {fast.data_ptr(), slow.data_ptr()}


def test_consistency_moves_the_fast_side_alone() -> None:
    fast = torch.randn(2, 3, requires_grad=True)
    slow = torch.randn(2, 3, requires_grad=True)
    consistency_loss(fast, slow).backward()
    torch.testing.assert_close(fast.grad, 2 * (fast - slow).detach() / 6)
    assert slow.grad is None
    one_sided = consistency_loss(fast, fast.detach() - 1.0, kind="one_sided")
    assert float(one_sided) == 0.0  # above the slow states costs nothing


def test_consistency_of_nothing_is_zero() -> None:
    fast = torch.randn(2, 3, 4, requires_grad=True)
    loss = consistency_loss(fast, torch.randn(2, 3, 4), torch.zeros(2, 3))
    loss.backward()
    assert float(loss) == 0.0
    assert float(fast.grad.abs().sum()) == 0.0


def test_consistency_names_bad_arguments() -> None:
    x = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"must have one shape; found \(2, 3, 4\) and \(2, 3\)"):
        consistency_loss(x, x[..., 0])
    with pytest.raises(ValueError, match=r"`mask` must have shape \(2, 3\); found \(2,\)"):
        consistency_loss(x, x, torch.ones(2))
    with pytest.raises(ValueError, match=r"`kind` must be 'mse' or 'one_sided'; found 'l1'"):
        consistency_loss(x, x, kind="l1")  # type: ignore[arg-type]


def _adapter(seed: int, rank: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "m.0.q.lora_A.weight": torch.randn(rank, 6, generator=generator),
        "m.0.q.lora_B.weight": torch.randn(5, rank, generator=generator),
        "m.0.q.lora_B.bias": torch.randn(5, generator=generator),
        "m.embed.lora_embedding_A": torch.randn(rank, 9, generator=generator),
        "m.embed.lora_embedding_B": torch.randn(4, rank, generator=generator),
        "m.head.modules_to_save.weight": torch.randn(3, 3, generator=generator),
    }


@given(st.floats(-0.5, 1.5))
@settings(max_examples=20, deadline=None)
def test_factors_lie_on_the_line(alpha: float) -> None:
    a, b = _adapter(0), _adapter(1)
    for name, tensor in interpolate_adapters(a, b, alpha).items():
        torch.testing.assert_close(tensor, (1 - alpha) * a[name] + alpha * b[name], rtol=1e-5, atol=1e-5)


@given(st.floats(-0.5, 1.5))
@settings(max_examples=20, deadline=None)
def test_product_interpolates_the_update(alpha: float) -> None:
    a, b = _adapter(0, rank=2), _adapter(1, rank=3)
    joined = interpolate_adapters(a, b, alpha, "product", scaling_a={"m.0.q": 2.0, "m.embed": 0.5}, scaling_b=4.0)
    for left, right, s in (("lora_A.weight", "lora_B.weight", 2.0), ("lora_embedding_A", "lora_embedding_B", 0.5)):
        module = "m.0.q" if "weight" in left else "m.embed"
        update = (1 - alpha) * s * a[f"{module}.{right}"] @ a[f"{module}.{left}"]
        update += alpha * 4.0 * b[f"{module}.{right}"] @ b[f"{module}.{left}"]
        torch.testing.assert_close(
            joined[f"{module}.{right}"] @ joined[f"{module}.{left}"], update, rtol=1e-4, atol=1e-4
        )
        assert joined[f"{module}.{left}"].shape[0] == 5
    bias = (1 - alpha) * 2.0 * a["m.0.q.lora_B.bias"] + alpha * 4.0 * b["m.0.q.lora_B.bias"]
    torch.testing.assert_close(joined["m.0.q.lora_B.bias"], bias, rtol=1e-4, atol=1e-4)
    head = "m.head.modules_to_save.weight"
    torch.testing.assert_close(joined[head], (1 - alpha) * a[head] + alpha * b[head], rtol=1e-4, atol=1e-4)


def test_the_two_modes_differ_between_the_ends_and_agree_at_them() -> None:
    a, b = _adapter(0), _adapter(1)

    def update(alpha: float, mode: str) -> Tensor:
        point = interpolate_adapters(a, b, alpha, mode)  # type: ignore[arg-type]
        return point["m.0.q.lora_B.weight"] @ point["m.0.q.lora_A.weight"]

    for end in (0.0, 1.0):
        torch.testing.assert_close(update(end, "factors"), update(end, "product"), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(update(0.5, "factors"), update(0.5, "product"), atol=1e-2)


def test_interpolation_keeps_the_dtype_and_whole_numbers() -> None:
    a = {"x": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor([1, 2])}
    b = {"x": torch.zeros(2, dtype=torch.bfloat16), "n": torch.tensor([1, 2])}
    result = interpolate_adapters(a, b, 0.5)
    assert result["x"].dtype == torch.bfloat16
    assert result["n"].tolist() == [1, 2]


def test_interpolation_names_what_cannot_be_joined(tmp_path: Path) -> None:
    a, b = _adapter(0), _adapter(1)
    with pytest.raises(TypeError, match=r"takes tensors by name; found the path"):
        interpolate_adapters(tmp_path, b, 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`mode` must be 'factors' or 'product'; found 'sum'"):
        interpolate_adapters(a, b, 0.5, "sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"do not have the same tensors; 'm.0.q.lora_A.weight' and 5 more"):
        interpolate_adapters(a, {}, 0.5)
    with pytest.raises(ValueError, match=r"has shape \(2, 6\) in `a` and \(3, 6\) in `b`.*mode='product'"):
        interpolate_adapters(a, _adapter(1, rank=3), 0.5)
    dora = {"q.lora_magnitude_vector.weight": torch.ones(2)}
    with pytest.raises(ValueError, match=r"belongs to a DoRA adapter.*mode='factors'"):
        interpolate_adapters(dora, dora, 0.5, "product")
