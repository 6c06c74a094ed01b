# SPDX-License-Identifier: Apache-2.0
"""The learning rate over the steps of one task."""

from __future__ import annotations

import math
from typing import Literal

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Schedule = Literal["constant", "linear", "cosine"]


def learning_rate_factor(step: int, total: int, schedule: Schedule, warmup: float) -> float:
    """The factor on the learning rate at a step.

    Args:
        step: optimizer steps done in this task.
        total: optimizer steps of the task.
        schedule: ``"constant"``, or down to 0 at the task's end by a line or half a cosine.
        warmup: fraction of the steps over which the rate first rises from 0, linearly.

    Example:
        >>> [learning_rate_factor(step, 10, "linear", 0.2) for step in (0, 1, 2, 6, 10)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    rising = round(warmup * total)
    if step < rising:
        return (step + 1) / rising
    done = min(1.0, (step - rising) / max(1, total - rising))
    if schedule == "linear":
        return 1.0 - done
    return 0.5 * (1.0 + math.cos(math.pi * done)) if schedule == "cosine" else 1.0


def make_schedule(optimizer: Optimizer, total: float, schedule: Schedule, warmup: float) -> LambdaLR:
    """A scheduler that steps with the optimizer.

    Raises:
        MisconfigurationException: when the task's number of steps is unknown.
    """
    if not math.isfinite(total) or total < 1:
        raise MisconfigurationException(
            f"`schedule={schedule!r}` with `warmup={warmup}` needs the number of steps of a task, found {total}: the "
            "training data have no length. Set `max_steps` in the Trainer, or use `schedule='constant'` and `warmup=0`."
        )
    return LambdaLR(optimizer, lambda step: learning_rate_factor(step, int(total), schedule, warmup))
