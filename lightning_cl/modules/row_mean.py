# SPDX-License-Identifier: Apache-2.0
"""The mean of row scores, in float32 whatever the precision of the run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class RowMean(Metric):
    """Mean of the scores of all rows seen, over all ranks.

    :class:`torchmetrics.MeanMetric` casts what it is given to torch's default dtype, which is bfloat16 inside a step of
    a ``precision="bf16-true"`` run: the mean of a loss would have three digits.

    Example:
        >>> mean = RowMean()
        >>> mean.update(torch.tensor([1.0, 2.0]))
        >>> mean.compute()
        tensor(1.5000)
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, scores: Tensor) -> None:
        """Add the scores ``[rows]``."""
        # Not in place: a state made under inference mode may be updated outside of it.
        self.total = self.total + scores.float().sum()
        self.count = self.count + scores.numel()

    def compute(self) -> Tensor:
        """The mean; NaN before the first row."""
        return self.total / self.count
