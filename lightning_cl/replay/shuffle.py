# SPDX-License-Identifier: Apache-2.0
"""An endless shuffled walk over ``n`` items whose position is one integer."""

from __future__ import annotations

from typing import Any

_MASK = (1 << 64) - 1


def _mix(x: int) -> int:
    # The finaliser of SplitMix64: a few integer operations that spread every input bit over the output.
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def permuted(index: int, n: int, key: int) -> int:
    """Where a pseudo-random permutation of ``range(n)`` sends ``index``.

    A Feistel network over the smallest even number of bits that holds ``n``, walked until it lands inside: a bijection
    in constant time and no memory, so that drawing from a million rows costs what drawing from ten does.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(3):
            left, right = right, left ^ (_mix(key + turn * 0x632BE59BD9B4E019 + right) & mask)
        index = (left << half) | right
        if index < n:
            return index


class ShuffledWalk:
    """Draws every one of ``n`` items once before any a second time, in an order that depends on the seed alone.

    The ranks of a run share one walk: rank ``r`` of ``w`` takes the ``r``-th part of each draw, so that together they
    see each item equally often, whatever their number, and a restart needs only :attr:`position`.

    Example:
        >>> walk = ShuffledWalk(seed=0)
        >>> sorted(walk.take(5, n=5))
        [0, 1, 2, 3, 4]
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self.position = 0
        self._n = 0
        self._passes_before = 0

    def take(self, count: int, n: int, rank: int = 0, world_size: int = 1) -> list[int]:
        """This rank's next ``count`` indices below ``n``.

        Args:
            count: how many this rank takes; all ranks take as many.
            n: number of items; when it changes, a new pass begins.
            rank: this rank.
            world_size: how many ranks draw.
        """
        if n != self._n:
            self._passes_before += -(-self.position // self._n) if self._n else 0
            self._n, self.position = n, 0
        first = self.position + rank * count
        self.position += count * world_size
        drawn = []
        for place in range(first, first + count):
            cycle, offset = divmod(place, n)
            drawn.append(permuted(offset, n, _mix(self._seed ^ _mix(self._passes_before + cycle))))
        return drawn

    def state_dict(self) -> dict[str, Any]:
        """The position, as plain integers."""
        return {"position": self.position, "n": self._n, "passes_before": self._passes_before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take :meth:`state_dict` back."""
        self.position, self._n, self._passes_before = state["position"], state["n"], state["passes_before"]
