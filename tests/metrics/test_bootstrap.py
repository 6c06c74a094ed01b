# SPDX-License-Identifier: Apache-2.0
"""The bootstrap against the normal approximation and against itself."""

from __future__ import annotations

import pytest
import torch

from lightning_cl.metrics import bootstrap_interval
from lightning_cl.metrics.bootstrap import bootstrap_means


def test_means_are_means_of_drawn_rows() -> None:
    scores = torch.tensor([[0.0, 10.0], [1.0, 11.0], [2.0, 12.0]])
    means = bootstrap_means(scores, resamples=50, seed=3)
    # The second column is the first plus ten: one draw of rows serves both.
    assert torch.allclose(means[:, 1] - means[:, 0], torch.full((50,), 10.0, dtype=torch.float64))
    assert set((means[:, 0] * 3).round().int().tolist()) <= set(range(7))
    assert not torch.equal(means, bootstrap_means(scores, resamples=50, seed=4))


def test_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for trial in range(300):
        rows = (torch.rand(100, generator=generator) < 0.7).double()
        low, high = bootstrap_interval(rows, resamples=300, seed=trial)
        inside += low <= 0.7 <= high
    # Binomial(300, 0.95): below 270 has probability 1e-4 (the percentile interval covers a little less than 95 %).
    assert 270 <= inside <= 299


def test_level_widens_the_interval() -> None:
    rows = torch.arange(50, dtype=torch.float64)
    inner, outer = bootstrap_interval(rows, level=0.5), bootstrap_interval(rows, level=0.99)
    assert outer[0] < inner[0] < 24.5 < inner[1] < outer[1]


def test_bad_scores() -> None:
    with pytest.raises(ValueError, match="got no scores"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="1 scores that are not finite among 2"):
        bootstrap_interval([1.0, float("inf")])
    with pytest.raises(ValueError, match=r"level=95"):
        bootstrap_interval([1.0], level=95)
