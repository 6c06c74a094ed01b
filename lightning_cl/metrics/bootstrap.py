# SPDX-License-Identifier: Apache-2.0
"""Percentile bootstrap over test rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def bootstrap_means(scores: Tensor, resamples: int = 1000, seed: int = 0) -> Tensor:
    """Means of rows drawn with replacement.

    The columns of ``scores`` are measurements of the *same* rows (one task after several stages), so one draw of rows
    serves them all: differences between columns keep their pairing.

    Args:
        scores: ``[N]`` or ``[N, S]``, the score of each of N test rows in each of S measurements.
        resamples: number of draws B.
        seed: of the draws; the same seed gives the same draws for the same N.

    Returns:
        ``[B]`` or ``[B, S]``, float64, on the CPU.

    Example:
        >>> bootstrap_means(torch.ones(20, 3), resamples=4).shape
        torch.Size([4, 3])
    """
    scores = torch.as_tensor(scores).detach().to("cpu", torch.float64)
    count = scores.shape[0]
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(count, (resamples, count), generator=generator)
    # How often each row was drawn: one small matrix product then serves every column.
    weights = torch.zeros(resamples, count, dtype=torch.float64)
    weights.scatter_add_(1, picks, torch.ones_like(picks, dtype=torch.float64))
    return weights @ scores / count


def bootstrap_interval(
    scores: Tensor | Sequence[float], level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of per-row scores (Efron and Tibshirani, 1993, chapter 13).

    Rows that all score the same give an interval of width 0: the bootstrap cannot see what no row shows. Read the
    number of rows beside it.

    Args:
        scores: one score a test row.
        level: the share of resampled means inside the interval.
        resamples: number of draws.
        seed: of the draws.

    Returns:
        The lower and the upper end.

    Raises:
        ValueError: without rows, with a score that is not finite, or with a level outside (0, 1).

    Example:
        >>> low, high = bootstrap_interval([1.0] * 80 + [0.0] * 20)
        >>> round(low, 2), round(high, 2)
        (0.72, 0.88)
    """
    rows = torch.as_tensor(scores, dtype=torch.float64).flatten()
    if rows.numel() == 0:
        raise ValueError("`bootstrap_interval` got no scores. Pass one score for each test row.")
    if not bool(torch.isfinite(rows).all()):
        raise ValueError(
            f"`bootstrap_interval` got {int((~torch.isfinite(rows)).sum())} scores that are not finite among"
            f" {rows.numel()}. Leave those rows out and say so, or repair the metric."
        )
    if not 0.0 < level < 1.0:
        raise ValueError(f"`bootstrap_interval(level={level})`: the level is a share between 0 and 1, such as 0.95.")
    means = bootstrap_means(rows, resamples, seed)
    return ends(means, level)


def ends(samples: Tensor, level: float = 0.95) -> tuple[float, float]:
    """The quantiles that leave the same share of the samples outside on both sides."""
    tail = (1.0 - level) / 2.0
    at = torch.tensor([tail, 1.0 - tail], dtype=torch.float64)
    low, high = torch.quantile(samples.to(torch.float64), at).tolist()
    return low, high
