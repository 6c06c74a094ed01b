# SPDX-License-Identifier: Apache-2.0
"""The margin loss: packed states against float32 references, bit for bit, and every formula against a naive one."""

from __future__ import annotations

import math
import os
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_cl.functional import activation_margin_loss, activation_thresholds, encode_activation_states
from lightning_cl.functional.margin import (
    UNDEFINED,
    ActivationMoments,
    decode_activation_states,
    feature_imitation_loss,
)


def float32_margin(hidden: Tensor, reference: Tensor, lower: Tensor, upper: Tensor, mask: Tensor | None) -> Tensor:
    """The paper's loss as it is written, from the float32 reference activations themselves."""
    h, h0 = hidden.float(), reference.float()
    negative = h0 <= lower
    positive = (h0 >= upper) & ~negative
    neutral = (h0 > lower) & (h0 < upper)
    margins = torch.zeros_like(h)
    margins = torch.where(negative, torch.relu(h - lower), margins)
    margins = torch.where(neutral, torch.relu(h - upper) + torch.relu(lower - h), margins)
    margins = torch.where(positive, torch.relu(upper - h), margins)
    if mask is not None:
        margins = margins.masked_fill(~mask.unsqueeze(-1), 0.0)
    return margins.sum() / ((margins != 0).sum() + 1e-8)


def scalar_margin(h: float, h0: float, lower: float, upper: float) -> float:
    """One entry, in Python's float64."""
    if h0 <= lower:
        return max(h - lower, 0.0)
    if h0 >= upper:
        return max(upper - h, 0.0)
    return max(h - upper, lower - h, 0.0) if lower < h0 < upper else 0.0


@st.composite
def problems(draw, special: bool = True):
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    shape = (*draw(st.lists(st.integers(1, 4), min_size=0, max_size=3)), draw(st.integers(1, 13)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    reference = torch.randn(shape, generator=generator).mul_(2).to(dtype)
    hidden = torch.randn(shape, generator=generator).mul_(2).to(dtype)
    spread = torch.rand(shape[-1], generator=generator)
    spread[torch.rand(shape[-1], generator=generator) < 0.2] = 0.0  # dimensions without spread: lower == upper
    centre = torch.randn(shape[-1], generator=generator).to(dtype).float()
    lower, upper = centre - spread, centre + spread
    for tensor in (reference, hidden):  # ties: exactly on a threshold, as far as the dtype can say it
        pick = torch.rand(shape, generator=generator)
        tensor[pick < 0.1] = lower.expand(shape)[pick < 0.1].to(dtype)
        tensor[pick > 0.9] = upper.expand(shape)[pick > 0.9].to(dtype)
    if special:
        pick = torch.rand(shape, generator=generator)
        for i, value in enumerate([math.nan, math.inf, -math.inf]):
            reference[(pick > 0.05 * i) & (pick < 0.05 * (i + 1))] = value
    mask = torch.rand(shape[:-1], generator=generator) < 0.8 if draw(st.booleans()) else None
    return hidden, reference, lower, upper, mask


def test_states_by_hand() -> None:
    lower, upper = torch.tensor([-1.0, 0.0, 5.0, -1.0, -1.0]), torch.tensor([1.0, 0.5, 5.0, 1.0, 1.0])
    values = torch.tensor([[-1.0, 0.25, 5.0, math.nan, math.inf], [1.0, 0.5, 6.0, -math.inf, 0.0]])
    states = encode_activation_states(values, lower, upper)
    assert states.dtype == torch.uint8
    assert states.shape == (2, 2)
    # a tie with both thresholds (dimension 2, no spread) is negative; NaN is undefined
    assert decode_activation_states(states, 5).tolist() == [[0, 1, 0, 3, 2], [2, 2, 2, 0, 1]]


@settings(max_examples=200, deadline=None)
@given(problems())
def test_packed_equals_float32_bit_for_bit(problem) -> None:
    hidden, reference, lower, upper, mask = problem
    a, b = (hidden.clone().requires_grad_() for _ in range(2))
    packed = encode_activation_states(reference, lower, upper)
    assert packed.shape == (*hidden.shape[:-1], -(-hidden.shape[-1] // 4))
    ours = activation_margin_loss(a, packed, lower, upper, mask)
    naive = float32_margin(b, reference, lower, upper, mask)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, naive)
    ours.backward()
    naive.backward()
    assert a.grad.dtype == hidden.dtype
    assert torch.equal(a.grad, b.grad)


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from(["violations", "mean", "sum"]))
def test_against_float64_entry_by_entry(problem, reduction) -> None:
    hidden, reference, lower, upper, mask = problem
    states = encode_activation_states(reference, lower, upper)
    ours = activation_margin_loss(hidden, states, lower, upper, mask, reduction)
    dim = hidden.shape[-1]
    keep = torch.ones(hidden.shape[:-1], dtype=torch.bool) if mask is None else mask
    entries = [
        scalar_margin(float(h), float(r), float(lower[i % dim]), float(upper[i % dim]))
        for i, (h, r) in enumerate(zip(hidden.flatten(), reference.flatten(), strict=True))
        if keep.flatten()[i // dim]
    ]
    # a violation is counted in float32, where the loss is: a difference that vanishes there is none
    violations = sum(abs(e) > 0 for e in entries)
    divisor = {"violations": violations + 1e-8, "mean": max(len(entries), 1), "sum": 1}[reduction]
    assert float(ours) == pytest.approx(math.fsum(entries) / divisor, rel=1e-4, abs=1e-6)
    exact = activation_margin_loss(hidden.double(), states, lower, upper, mask, reduction)
    assert exact.dtype == torch.float64
    assert float(exact) == pytest.approx(math.fsum(entries) / divisor, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_masked_has_no_say(bad: float) -> None:
    reference = torch.randn(2, 3, 6)
    lower, upper = activation_thresholds(reference)
    hidden = torch.randn(2, 3, 6)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    clean = activation_margin_loss(hidden, encode_activation_states(reference, lower, upper), lower, upper, mask)
    for loss in (
        lambda h, r: activation_margin_loss(h, encode_activation_states(r, lower, upper), lower, upper, mask),
        lambda h, r: feature_imitation_loss(h, r, mask, "l1"),
        lambda h, r: feature_imitation_loss(h, r, mask, "l2"),
    ):
        spoiled = hidden.clone()
        spoiled[mask == 0] = bad
        spoiled.requires_grad_()
        reference_spoiled = reference.clone()
        reference_spoiled[mask == 0] = bad
        value = loss(spoiled, reference_spoiled)
        value.backward()
        assert torch.equal(value.detach(), loss(hidden, reference))
        assert torch.isfinite(spoiled.grad).all()
        assert (spoiled.grad[mask == 0] == 0).all()
    assert torch.isfinite(clean)


def test_one_bad_reference_dimension_spoils_no_other() -> None:
    reference = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    whole = activation_thresholds(reference)
    reference[:, 2] = math.nan
    lower, upper = activation_thresholds(reference)
    keep = torch.tensor([0, 1, 3])
    assert torch.equal(lower[keep], whole[0][keep])
    assert torch.isnan(lower[2])
    states = encode_activation_states(reference, lower, upper)
    assert (decode_activation_states(states, 4)[:, 2] == UNDEFINED).all()
    hidden = torch.randn(50, 4, requires_grad=True)
    activation_margin_loss(hidden, states, lower, upper).backward()
    assert torch.isfinite(hidden.grad).all()
    assert (hidden.grad[:, 2] == 0).all()


def test_a_current_activation_that_is_not_finite_is_not_hidden() -> None:
    reference = torch.randn(5, 4)
    lower, upper = activation_thresholds(reference)
    states = encode_activation_states(reference, lower, upper)
    hidden = reference.clone()
    hidden[3, 1] = math.nan
    assert torch.isnan(activation_margin_loss(hidden, states, lower, upper))


def test_nothing_to_hold_is_zero_with_a_graph() -> None:
    lower, upper = torch.full((3,), -1.0), torch.full((3,), 1.0)
    hidden = torch.zeros(2, 3, requires_grad=True)
    states = encode_activation_states(torch.zeros(2, 3), lower, upper)
    for mask in (None, torch.zeros(2, dtype=torch.bool)):
        for reduction in ("violations", "mean", "sum"):
            loss = activation_margin_loss(hidden, states, lower, upper, mask, reduction)
            assert loss.item() == 0.0
            loss.backward()
            assert (hidden.grad == 0).all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    dim=st.integers(1, 9),
    offset=st.sampled_from([0.0, 1.0, 1e4, -3e5]),
    num_std=st.floats(0.1, 3.0),
    masked=st.booleans(),
)
def test_thresholds_against_float64_in_one_piece(seed, sizes, dim, offset, num_std, masked) -> None:
    generator = torch.Generator().manual_seed(seed)
    chunks = [torch.randn(n, dim, generator=generator) + offset for n in sizes]
    masks = [torch.rand(n, generator=generator) < 0.7 for n in sizes]
    masks[0][0] = True
    rows = torch.cat([c[m] for c, m in zip(chunks, masks, strict=True)] if masked else chunks).double()
    mean, sd = rows.mean(0), rows.std(0, correction=0)
    lower, upper = activation_thresholds(iter(chunks), num_std, iter(masks) if masked else None)
    for got, want in ((lower, mean - num_std * sd), (upper, mean + num_std * sd)):
        assert got.dtype == torch.float32
        # exact up to the rounding of the result to float32
        assert torch.allclose(got.double(), want, rtol=1.2e-7, atol=1e-9)
    if not masked:
        joined = activation_thresholds(torch.cat(chunks), num_std)
        assert torch.allclose(joined[0], lower, rtol=2.4e-7, atol=1e-9)


def test_a_large_offset_keeps_its_small_spread() -> None:
    """``E[x^2] - E[x]^2`` in float32 gives 0 or NaN here."""
    values = torch.tensor([[10000.0], [10000.5], [10001.0]])
    lower, upper = activation_thresholds([values[:1], values[1:]])
    sd = math.sqrt(1 / 6)
    assert float(lower) == pytest.approx(10000.5 - sd, abs=1e-3)
    assert float(upper) == pytest.approx(10000.5 + sd, abs=1e-3)


def test_moments_merge_and_continue() -> None:
    rows = torch.randn(30, 5, generator=torch.Generator().manual_seed(1))
    whole = ActivationMoments(5)
    whole.update(rows)
    left, right = ActivationMoments(5), ActivationMoments(5)
    left.update(rows[:7])
    right.update(rows[7:])
    left.merge(right)
    loaded = ActivationMoments(5)
    loaded.load_state_dict(left.state_dict())
    for a, b in zip(whole.thresholds(), loaded.thresholds(), strict=True):
        assert torch.allclose(a, b, rtol=2.4e-7, atol=1e-9)
    assert torch.equal(loaded.state_dict(), left.state_dict())


@settings(max_examples=40, deadline=None)
@given(problems(special=False), st.sampled_from(["l1", "l2"]), st.sampled_from(["mean", "sum"]))
def test_feature_imitation(problem, kind, reduction) -> None:
    hidden, reference, _, _, mask = problem
    got = feature_imitation_loss(hidden, reference, mask, kind, reduction)
    difference = (hidden.double() - reference.double())[mask if mask is not None else ...]
    distance = difference.abs() if kind == "l1" else difference.square()
    want = distance.sum() / (max(distance.numel(), 1) if reduction == "mean" else 1)
    assert float(got) == pytest.approx(float(want), rel=1e-4, abs=1e-6)


def test_a_mask_that_broadcasts_to_the_entries() -> None:
    reference, hidden = torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    lower, upper = activation_thresholds(reference)
    states = encode_activation_states(reference, lower, upper)
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    for reduction in ("violations", "mean"):
        a = activation_margin_loss(hidden, states, lower, upper, mask, reduction)
        assert torch.equal(a, activation_margin_loss(hidden, states, lower, upper, mask.unsqueeze(-1), reduction))
        full = mask.unsqueeze(-1).expand(2, 3, 6).bool()
        assert torch.equal(a, activation_margin_loss(hidden, states, lower, upper, full, reduction))


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["violations", "mean"])
def test_compiled_equals_float64(reduction: str) -> None:
    # the compiler leaves variables of its own in the environment
    with patch.dict(os.environ):
        _compare_compiled(reduction)


def _compare_compiled(reduction: Any) -> None:
    compiled = torch.compile(activation_margin_loss, dynamic=True)
    generator = torch.Generator().manual_seed(0)
    for tokens in (7, 12):
        reference, hidden = (torch.randn(2, tokens, 10, generator=generator) for _ in range(2))
        lower, upper = activation_thresholds(reference)
        states = encode_activation_states(reference, lower, upper)
        mask = torch.rand(2, tokens, generator=generator) < 0.7
        a, b = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
        fused = compiled(a, states, lower, upper, mask, reduction)
        exact = activation_margin_loss(b, states, lower, upper, mask, reduction)
        fused.backward()
        exact.backward()
        assert float(fused.detach()) == pytest.approx(float(exact.detach()), rel=1e-5)
        assert torch.allclose(a.grad.double(), b.grad, rtol=1e-5, atol=1e-9)


H, L = torch.zeros(2, 3, 6), torch.zeros(6)
S = torch.zeros(2, 3, 2, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: activation_thresholds(H, 0.0), r"`num_std=0.0`: the thresholds .* finite number > 0"),
        (lambda: activation_thresholds(H, -1.0), r"`num_std=-1.0`"),
        (lambda: activation_thresholds(H, math.nan), r"`num_std=nan`"),
        (lambda: activation_thresholds([]), r"holds no chunk"),
        (lambda: activation_thresholds([H, torch.zeros(2, 5)]), r"shape \(2, 5\), but the chunks before it .* of 6"),
        (lambda: activation_thresholds([H, H], mask=[torch.ones(2, 3)]), r"`mask` has fewer chunks"),
        (lambda: activation_thresholds(H, mask=torch.ones(2)), r"`mask` has shape \(2,\), but `hidden` \(2, 3, 6\)"),
        (lambda: encode_activation_states(H, torch.zeros(5), L), r"`lower` \(5,\) and `upper` \(6,\) must both be"),
        (lambda: activation_margin_loss(H, S, L, torch.zeros(5)), r"must both be \(6,\)"),
        (lambda: activation_margin_loss(H, S.int(), L, L), r"`states` is torch.int32 \(2, 3, 2\)"),
        (lambda: activation_margin_loss(H, S[:, :2], L, L), r"needs torch.uint8 \(2, 3, 2\)"),
        (lambda: activation_margin_loss(H, S, L, L, torch.ones(2)), r"`mask` has shape \(2,\)"),
        (lambda: activation_margin_loss(H, S, L, L, None, "max"), r"`reduction='max'` is none of"),
        (lambda: feature_imitation_loss(H, H[:1]), r"`reference` has shape \(1, 3, 6\)"),
        (lambda: feature_imitation_loss(H, H, kind="l3"), r"`kind='l3'`"),
    ],
)
def test_refusals(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
