# SPDX-License-Identifier: Apache-2.0
"""The factor of a loss term: fixed, the ratio of two losses, or whatever holds the term at a target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_cl.distributed import world_size
from lightning_cl.functional.dual_weight import DualWeight


class TermWeight:
    """What a term is multiplied with, the same on every rank.

    Args:
        weight: a number; or ``"dynamic"``: the module's own loss over the term; with ``target`` the first weight.
        target: hold the term at this value instead (:class:`~lightning_cl.functional.DualWeight`).
        maximum: largest weight of the two that adapt.

    Example:
        >>> weight = TermWeight("dynamic", None, maximum=100.0)
        >>> factor, measured = weight.factor(torch.tensor(0.5), torch.tensor(2.0), global_step=0)
        >>> round(float(factor), 4), float(measured)
        (4.0, 0.5)
    """

    def __init__(self, weight: float | Literal["dynamic"], target: float | None, maximum: float) -> None:
        self.weight = weight
        self.maximum = maximum
        self.dual = None if target is None else DualWeight(target, initial=float(weight), maximum=maximum)
        self._updated_at = -1

    @property
    def adapts(self) -> bool:
        """Whether the weight depends on the losses."""
        return self.dual is not None or self.weight == "dynamic"

    def factor(self, loss: Tensor | None, task_loss: Tensor, global_step: int) -> tuple[Tensor | float, Tensor | None]:
        """The weight of this step, and the term's mean over the ranks where the weight adapts. Collective if it does.

        Args:
            loss: the term on this rank; None where it has none in this step.
            task_loss: the module's own loss.
            global_step: number of the optimizer step: a target adapts its weight once in each.
        """
        if not self.adapts:
            return float(self.weight), None
        measured = torch.zeros(3, dtype=torch.float32, device=task_loss.device)
        if loss is not None:
            measured = torch.stack([loss.detach().float(), task_loss.float(), torch.ones_like(measured[0])])
        if world_size() > 1:
            # Every rank must use the same weight, also one whose rows of this step have no part in the term.
            dist.all_reduce(measured)
        mean = measured[0] / measured[2].clamp_min(1)
        if self.dual is None:
            return (measured[1] / measured[2].clamp_min(1) / (mean + 1e-8)).clamp_max(self.maximum), mean
        if self._updated_at == global_step:
            return self.dual.weight.to(mean.device), mean
        self._updated_at = global_step
        return self.dual.update(torch.where(measured[2] > 0, mean, torch.nan)), mean

    def restart(self) -> None:
        """Forget the number of the last step: a new Trainer counts from 0 again."""
        self._updated_at = -1

    def state_dict(self) -> dict[str, Tensor] | None:
        """The state of the control; None if there is none."""
        return None if self.dual is None else self.dual.state_dict()

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Take :meth:`state_dict` back."""
        if self.dual is not None and state is not None:
            self.dual.load_state_dict(dict(state))
