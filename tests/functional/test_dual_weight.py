# SPDX-License-Identifier: Apache-2.0
"""DualWeight: closed forms, control of a real optimisation, state, and every refusal."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_cl.functional.dual_weight import DualWeight


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(0.0, 100.0, allow_nan=False), min_size=1, max_size=20),
    target=st.floats(1e-3, 10.0),
    rate=st.floats(0.01, 0.5),
    gain=st.floats(0.0, 2.0),
    smoothing=st.floats(0.0, 0.95),
)
def test_equals_the_scalar_recursion(values, target, rate, gain, smoothing) -> None:
    dual = DualWeight(target, rate=rate, gain=gain, smoothing=smoothing, minimum=0.1, maximum=10.0)
    low, high = math.log(0.1), math.log(10.0)
    weights = [smoothing ** (len(values) - 1 - i) for i in range(len(values))]
    integral = 0.0
    for count, value in enumerate(values, start=1):
        got = dual.update(torch.tensor(value, dtype=torch.float64))
        weights = [smoothing ** (count - 1 - i) for i in range(count)]
        average = sum(w * v for w, v in zip(weights, values, strict=False)) / sum(weights)
        violation = max(-1.0, min(1.0, math.log(max(average / target, 1e-12))))
        integral = max(low, min(high, integral + rate * (violation if violation > 0 else violation / 4)))
        want = math.exp(max(low, min(high, integral + gain * violation)))
        assert float(got) == pytest.approx(want, rel=1e-5)
        assert float(dual.average) == pytest.approx(average, rel=1e-6, abs=1e-12)


def _train(dual: DualWeight, floor: float = 0.0, steps: int = 600) -> list[float]:
    """Minimise (x - 2)^2 under the penalty floor + x^2 / 2, which costs 2 where the task is solved."""
    x = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([x], lr=0.01)
    seen = []
    for _ in range(steps):
        penalty = (floor + x.square() / 2).sum()
        loss = (x - 2).square().sum() + dual.update(penalty) * penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(float(penalty.detach()))
    return seen


@pytest.mark.parametrize("target", [0.005, 0.1, 1.0])
def test_holds_an_optimisation_at_the_target(target: float) -> None:
    dual = DualWeight(target)
    tail = _train(dual)[-100:]
    assert sum(tail) / len(tail) == pytest.approx(target, rel=0.1)
    met, average, weight = dual.status()
    assert met
    assert average == pytest.approx(target, rel=0.2)
    # at the optimum the multiplier is the ratio of the gradients: 2 (2 - x) / x with x = sqrt(2 target)
    x = math.sqrt(2 * target)
    assert weight == pytest.approx(2 * (2 - x) / x, rel=0.3)


def test_a_slack_constraint_costs_nothing() -> None:
    dual = DualWeight(5.0)  # the task alone ends at a penalty of 2
    _train(dual)
    met, average, weight = dual.status()
    assert met
    assert weight == pytest.approx(1e-3, rel=1e-3)
    assert average == pytest.approx(2.0, rel=0.02)


def test_a_target_out_of_reach_ends_at_the_maximum_and_says_so() -> None:
    dual = DualWeight(0.1, maximum=50.0)
    _train(dual, floor=0.5)
    met, average, weight = dual.status()
    assert not met
    assert weight == pytest.approx(50.0)
    assert average >= 0.5
    # no wind-up: a constraint that becomes reachable is answered within a few steps
    for _ in range(10):
        dual.update(torch.tensor(0.0))
    assert float(dual.weight) < 10.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_changes_nothing(bad: float) -> None:
    dual = DualWeight(1.0)
    before = float(dual.update(torch.tensor(3.0)))
    assert float(dual.update(torch.tensor(bad))) == before


def test_state_continues_bit_for_bit() -> None:
    values = torch.rand(20, generator=torch.Generator().manual_seed(0))
    whole, first = DualWeight(0.3), DualWeight(0.3)
    for value in values:
        expected = whole.update(value)
    for value in values[:7]:
        first.update(value)
    second = DualWeight(0.3)
    second.load_state_dict(first.state_dict())
    first.update(torch.tensor(9.0))  # the saved state is a copy
    for value in values[7:]:
        got = second.update(value)
    assert torch.equal(got, expected)
    assert set(second.state_dict()) == {"integral", "average", "correction"}


def test_returns_a_float32_scalar_without_graph() -> None:
    value = torch.tensor([2.0], dtype=torch.bfloat16, requires_grad=True)
    got = DualWeight(1.0).update(value)
    assert (got.dtype, got.shape, got.requires_grad) == (torch.float32, (), False)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"target": 0.0}, "`target=0.0`: a penalty"),
        ({"target": float("nan")}, "`target=nan`: a penalty"),
        ({"target": 1.0, "minimum": 0.0}, "`minimum=0.0`"),
        ({"target": 1.0, "initial": 1e6}, "`initial=1000000.0`"),
        ({"target": 1.0, "rate": -1.0}, "`rate=-1.0`"),
        ({"target": 1.0, "rate": 0.0, "gain": 0.0}, "could never move"),
        ({"target": 1.0, "smoothing": 1.0}, "`smoothing=1.0`"),
    ],
)
def test_refusals(kwargs, message) -> None:
    with pytest.raises(ValueError, match=message):
        DualWeight(**kwargs)


def test_a_vector_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(3,\): the constraint is on one number"):
        DualWeight(1.0).update(torch.ones(3))
