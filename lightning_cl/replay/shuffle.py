# SPDX-License-Identifier: Apache-2.0
"""An endless shuffled walk over ``n`` items whose position is one integer."""

from __future__ import annotations

from typing import Any

from lightning_cl.distributed import gather_objects, rank, world_size

_MASK = (1 << 64) - 1


def _mix(x: int) -> int:
    # The finaliser of SplitMix64: a few integer operations that spread every input bit over the output.
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def permuted(index: int, n: int, keys: tuple[int, int, int]) -> int:
    """Where a pseudo-random permutation of ``range(n)`` sends ``index``.

    A Feistel network over the smallest even number of bits that holds ``n``, walked until it lands inside: a bijection
    in constant time and no memory, so that drawing from a million rows costs what drawing from ten does.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for key in keys:
            # One multiplication spreads the right half and the key over the upper bits, which are the ones taken.
            spread = ((right ^ key) * 0x9E3779B97F4A7C15) & _MASK
            left, right = right, left ^ (((spread ^ (spread >> 29)) * 0xBF58476D1CE4E5B9 & _MASK) >> 40) & mask
        index = (left << half) | right
        if index < n:
            return index


def round_keys(seed: int) -> tuple[int, int, int]:
    """The keys of one permutation."""
    return _mix(seed), _mix(seed + 1), _mix(seed + 2)


class ShuffledWalk:
    """Draws every one of ``n`` items once before any a second time, in an order that depends on the seed alone.

    The ranks of a run share one walk: rank ``r`` of ``w`` takes every ``w``-th step of it, so that together they see
    each item equally often, whatever their number, and none needs to know what the others have drawn.

    Example:
        >>> walk = ShuffledWalk(seed=0)
        >>> sorted(walk.take(5, n=5))
        [0, 1, 2, 3, 4]
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._steps = 0
        # Where the walk of this number of ranks began.
        self._start = 0
        self._n = 0
        self._passes_before = 0

    def take(self, count: int, n: int, rank: int = 0, world_size: int = 1) -> list[int]:
        """This rank's next ``count`` indices below ``n``.

        Args:
            count: how many this rank takes.
            n: number of items; when it changes, a new order begins.
            rank: this rank.
            world_size: how many ranks draw.
        """
        if n != self._n:
            # Only `n` may decide this, which all ranks share: how far each has walked may differ by a few steps.
            self._passes_before = _mix(self._passes_before + self._n)
            self._n, self._start, self._steps = n, 0, 0
        first, self._steps = self._steps, self._steps + count
        drawn, turn_of_keys, keys = [], -1, (0, 0, 0)
        for step in range(first, self._steps):
            turn, offset = divmod(self._start + step * world_size + rank, n)
            if turn != turn_of_keys:
                turn_of_keys, keys = turn, round_keys(self._seed ^ _mix(self._passes_before + turn))
            drawn.append(permuted(offset, n, keys))
        return drawn

    def state_dict(self) -> dict[str, Any]:
        """The positions of all ranks, as plain integers; called on every rank."""
        return {
            "steps": gather_objects(self._steps),
            "start": self._start,
            "n": self._n,
            "passes_before": self._passes_before,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the ranks of the saved run stood, also with another number of ranks."""
        steps = state["steps"]
        self._start, self._steps = state["start"], 0
        if len(steps) == world_size():
            self._steps = steps[rank()]
        else:
            # What those ranks have drawn together lies before the start of the new ones.
            self._start += sum(steps)
        self._n, self._passes_before = state["n"], state["passes_before"]
