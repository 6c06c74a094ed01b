# SPDX-License-Identifier: Apache-2.0
"""Losses of single tokens in chunks equal those from all logits, gradients and all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_cl.functional.token_cross_entropy import token_cross_entropy


def _capped(logits: Tensor) -> Tensor:
    return 3 * (logits / 3).tanh()


@pytest.mark.parametrize("transform", [None, _capped])
@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 1, 4, 7])
def test_losses_and_gradients_equal_the_plain_ones(transform: Any, trained_head: bool, chunk_size: int | None) -> None:
    hidden = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    head = torch.randn(11, 6, dtype=torch.float64, requires_grad=trained_head)
    bias = torch.randn(11, dtype=torch.float64, requires_grad=trained_head)
    targets, factors = torch.randint(11, (9,)), torch.rand(9, dtype=torch.float64)
    logits = F.linear(hidden, head, bias)
    expected = F.cross_entropy(logits if transform is None else transform(logits), targets, reduction="none")
    found = token_cross_entropy(hidden, targets, head, bias, transform, chunk_size)
    torch.testing.assert_close(found, expected)
    leaves = [hidden, head, bias] if trained_head else [hidden]
    for a, b in zip(
        torch.autograd.grad((found * factors).sum(), leaves),
        torch.autograd.grad((expected * factors).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_a_bfloat16_head_gives_float32_losses_and_no_gradient_where_none_is_asked() -> None:
    hidden, head = torch.randn(40, 16).bfloat16().requires_grad_(), torch.randn(32, 16).bfloat16()
    targets = torch.randint(32, (40,))
    expected = F.cross_entropy((hidden @ head.T).float(), targets, reduction="none")
    found = token_cross_entropy(hidden, targets, head, chunk_size=16)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    with torch.no_grad():
        assert token_cross_entropy(hidden, targets, head).grad_fn is None


def test_autocast_decides_the_dtype_of_the_products() -> None:
    hidden, head, targets = torch.randn(5, 16), torch.randn(32, 16), torch.randint(32, (5,))
    with torch.autocast("cpu", torch.bfloat16):
        found = token_cross_entropy(hidden, targets, head)
        expected = F.cross_entropy(F.linear(hidden, head).float(), targets, reduction="none")
    assert torch.equal(found, expected)
    assert not torch.equal(found, token_cross_entropy(hidden, targets, head))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": torch.ones(2, 3, 4)}, r"`hidden` \(2, 3, 4\) must be \[N, D\]"),
        ({"targets": torch.ones(5, dtype=torch.long)}, r"`targets` \(5,\) its N tokens"),
        ({"head_weight": torch.ones(7, 5)}, r"`head_weight` has shape \(7, 5\)"),
        ({"chunk_size": 0}, r"`chunk_size=0`: a chunk holds at least one token"),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "hidden": torch.ones(3, 4),
        "targets": torch.zeros(3, dtype=torch.long),
        "head_weight": torch.ones(7, 4),
    }
    with pytest.raises(ValueError, match=message):
        token_cross_entropy(**{**good, **arguments})
