# SPDX-License-Identifier: Apache-2.0
"""The six figures of a task matrix as pure functions of tensors.

``scores`` is ``[..., T + 1, T]``: row 0 holds the scores before the first task (stage -1), row i + 1 those after stage
i, and column j belongs to the task learnt in stage j. Higher is better. Leading dimensions are resamples.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: (stage, task) pairs that a figure of T tasks is made of.
Cells = list[tuple[int, int]]


def average(scores: Tensor) -> Tensor:
    """Mean over the tasks of the score after the last stage: mean_j R[T-1, j]."""
    return scores[..., -1, :].mean(-1)


def learning_accuracy(scores: Tensor) -> Tensor:
    """Mean over the tasks of the score right after learning each: mean_j R[j, j]."""
    return _diagonal(scores).mean(-1)


def backward_transfer(scores: Tensor) -> Tensor:
    """What later tasks did to earlier ones: mean_{j<T-1} (R[T-1, j] - R[j, j]) (Lopez-Paz and Ranzato, 2017, eq. 2)."""
    return (scores[..., -1, :-1] - _diagonal(scores)[..., :-1]).mean(-1)


def forward_transfer(scores: Tensor) -> Tensor:
    """What earlier tasks did for later ones: mean_{j>=1} (R[j-1, j] - R[-1, j]) (ibid., eq. 3)."""
    before = torch.diagonal(scores[..., 1:-1, 1:], dim1=-2, dim2=-1)
    return (before - scores[..., 0, 1:]).mean(-1)


def forgetting(scores: Tensor) -> Tensor:
    """Loss since the best: mean_{j<T-1} (max_{j<=i<T-1} R[i, j] - R[T-1, j]) (Chaudhry et al., 2018, eq. 3).

    Only stages from j on count: a task cannot be forgotten before it was learnt.
    """
    tasks = scores.shape[-1]
    best = torch.stack([scores[..., j + 1 : tasks, j].amax(-1) for j in range(tasks - 1)], -1)
    return (best - scores[..., -1, :-1]).mean(-1)


def intransigence(scores: Tensor, reference: Tensor) -> Tensor:
    """Inability to learn: mean_j (reference_j - R[j, j]), tasks with a reference only (Chaudhry et al., 2018, eq. 7).

    Args:
        scores: the matrix.
        reference: ``[T]``, NaN where a task has none.
    """
    given = ~torch.isnan(reference)
    return (reference[given] - _diagonal(scores)[..., given]).mean(-1)


def _diagonal(scores: Tensor) -> Tensor:
    return torch.diagonal(scores[..., 1:, :], dim1=-2, dim2=-1)


#: For each figure without further inputs: its function and the cells it reads, given the number of tasks.
FIGURES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[int], Cells]]] = {
    "average": (average, lambda n: [(n - 1, j) for j in range(n)]),
    "backward_transfer": (
        backward_transfer,
        lambda n: [(i, j) for j in range(n - 1) for i in (j, n - 1)],
    ),
    "forward_transfer": (forward_transfer, lambda n: [(i, j) for j in range(1, n) for i in (-1, j - 1)]),
    "forgetting": (forgetting, lambda n: [(i, j) for j in range(n - 1) for i in range(j, n)]),
    "learning_accuracy": (learning_accuracy, lambda n: [(j, j) for j in range(n)]),
}

#: The names of all six, in the order in which they are shown.
NAMES = (
    "average",
    "backward_transfer",
    "forward_transfer",
    "forgetting",
    "intransigence",
    "learning_accuracy",
)
