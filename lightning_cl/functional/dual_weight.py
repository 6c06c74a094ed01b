# SPDX-License-Identifier: Apache-2.0
"""A penalty's weight that adapts until the penalty's measured value meets a target: dual ascent on a constraint."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# How much slower the weight falls than it grows.
_RELAX = 0.25


class DualWeight:
    """Turn ``minimise task subject to penalty <= target`` into a weight for the penalty, one update a step.

    The weight is the Lagrange multiplier of the constraint, kept as its logarithm so that it stays positive and moves
    by factors. Each update adds ``rate`` times the constraint's violation to the logarithm (the integral, dual ascent)
    and shows the weight with ``gain`` times the same violation on top (proportional: without it a multiplier
    oscillates, because the penalty answers to it some steps later; Stooke et al., arXiv 2007.03964). The violation is
    ``log(average / target)`` clipped to ``[-1, 1]``, where ``average`` is the bias-corrected moving average of the
    measured values: it has no unit, so one pair of rates serves a divergence of 0.005 nats and a margin of 3.0.
    Adaptive-KL controllers (Ziegler et al., arXiv 1909.08593, eq. 4) are this with ``gain=0``.

    At a bound the integral stops, so that it does not wind up: a weight at ``maximum`` with the average still above the
    target is a constraint that this run cannot meet, see :meth:`status`.

    Everything is tensor arithmetic without a synchronisation: no value leaves the device in :meth:`update`. In a
    distributed run give every rank the same value (the mean over ranks), or the ranks' weights part.

    Args:
        target: The penalty's allowed value, > 0, in the penalty's unit (nats a token for a divergence).
        initial: The first weight, > 0, inside the bounds.
        rate: Integral step an update, >= 0: at the clipped violation the weight grows by ``exp(rate)`` a step. It falls
            four times slower: a penalty that starts at zero (a model compared with itself) would else give its weight
            away before it begins to grow, and overshoot.
        gain: Proportional part, >= 0: the weight shown is up to ``exp(gain)`` away from the integral.
        smoothing: Decay of the moving average of the values, in [0, 1).
        minimum: Smallest weight, > 0. Not 0: a penalty without weight has no gradient to come back by.
        maximum: Largest weight.

    Raises:
        ValueError: For values outside these ranges.

    Example:
        >>> dual = DualWeight(target=0.5)
        >>> float(dual.weight)
        1.0
        >>> above = dual.update(torch.tensor(0.8))
        >>> bool(above > 1.0)  # the penalty is over its target: more weight
        True
    """

    def __init__(
        self,
        target: float,
        *,
        initial: float = 1.0,
        rate: float = 0.1,
        gain: float = 2.0,
        smoothing: float = 0.5,
        minimum: float = 1e-3,
        maximum: float = 1e3,
    ) -> None:
        if not (math.isfinite(target) and target > 0):
            raise ValueError(
                f"`target={target}`: a penalty that is zero or positive can only be held at a finite target > 0."
                " Use a small number such as 0.005, or a fixed `weight`."
            )
        if not 0 < minimum <= initial <= maximum < math.inf:
            raise ValueError(
                f"`minimum={minimum}`, `initial={initial}`, `maximum={maximum}`: the weight moves by factors, so they"
                " must obey 0 < minimum <= initial <= maximum < inf. Move `initial` into the bounds or widen them."
            )
        if not (0 <= rate < math.inf and 0 <= gain < math.inf and rate + gain > 0):
            raise ValueError(
                f"`rate={rate}`, `gain={gain}`: both must be finite and >= 0 and one > 0, or the weight could never"
                " move. Use the defaults, or a fixed `weight`."
            )
        if not 0 <= smoothing < 1:
            raise ValueError(
                f"`smoothing={smoothing}`: the moving average of the measured values decays by this, so it must lie in"
                " [0, 1). Use 0 for no smoothing."
            )
        self.target = float(target)
        self.rate = float(rate)
        self.gain = float(gain)
        self.smoothing = float(smoothing)
        self._bounds = (math.log(minimum), math.log(maximum))
        # one tensor each, float64 so that a state saved and loaded continues bit for bit whatever the default dtype
        self._integral = torch.tensor(math.log(initial), dtype=torch.float64)
        self._average = torch.zeros((), dtype=torch.float64)
        self._correction = torch.zeros((), dtype=torch.float64)

    @property
    def weight(self) -> Tensor:
        """The present weight: a float32 scalar on the device of the last value (the CPU before the first)."""
        return torch.exp((self._integral + self.gain * self._violation()).clamp(*self._bounds)).float()

    @property
    def average(self) -> Tensor:
        """Bias-corrected moving average of the values: a float64 scalar, 0 before the first update."""
        return torch.where(self._correction > 0, self._average / self._correction.clamp_min(1e-12), self._average)

    def update(self, value: Tensor) -> Tensor:
        """Take one measured value and return the weight to use with it.

        Args:
            value: The penalty without its weight: a scalar of any floating dtype, on any device; its graph is not used.
                A value that is not finite changes nothing, so that one bad step cannot spoil the weight for good.

        Returns:
            The new weight, a float32 scalar on ``value``'s device, without a graph.

        Raises:
            ValueError: If ``value`` is not a scalar.
        """
        if value.numel() != 1:
            raise ValueError(
                f"`value` has shape {tuple(value.shape)}: the constraint is on one number."
                " Reduce it, e.g. `value.mean()`."
            )
        measured = value.detach().reshape(()).to(torch.float64)
        self._move(measured.device)
        usable = torch.isfinite(measured)
        decay = self.smoothing
        average = decay * self._average + (1 - decay) * torch.where(usable, measured, 0.0)
        self._average = torch.where(usable, average, self._average)
        self._correction = torch.where(usable, decay * self._correction + (1 - decay), self._correction)
        violation = self._violation()
        step = self.rate * torch.where(violation > 0, violation, _RELAX * violation)
        integral = (self._integral + step).clamp(*self._bounds)
        self._integral = torch.where(usable, integral, self._integral)
        return self.weight

    def status(self) -> tuple[bool, float, float]:
        """Whether the target is met, the average, and the weight; reads the device, so call it outside the step.

        The target counts as met up to 10 % above it: the average of a controlled value hovers around its target.
        """
        average = float(self.average)
        return average <= 1.1 * self.target, average, float(self.weight)

    def state_dict(self) -> dict[str, Tensor]:
        """The whole state, as CPU tensors; the constructor's arguments are configuration and not in it."""
        return {
            "integral": self._integral.detach().cpu().clone(),
            "average": self._average.detach().cpu().clone(),
            "correction": self._correction.detach().cpu().clone(),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a state of :meth:`state_dict`."""
        device = self._integral.device
        self._integral = state["integral"].to(device, torch.float64)
        self._average = state["average"].to(device, torch.float64)
        self._correction = state["correction"].to(device, torch.float64)

    def _violation(self) -> Tensor:
        ratio = self.average.clamp_min(0.0) / self.target
        violation = torch.log(ratio.clamp_min(1e-12)).clamp(-1.0, 1.0)
        return torch.where(self._correction > 0, violation, torch.zeros_like(violation))

    def _move(self, device: torch.device) -> None:
        if self._integral.device != device:
            self._integral = self._integral.to(device)
            self._average = self._average.to(device)
            self._correction = self._correction.to(device)
