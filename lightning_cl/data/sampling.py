# SPDX-License-Identifier: Apache-2.0
"""The order of evaluation: rows of like length together, each counted once on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch.utils.data import DistributedSampler


class EvalSampler(DistributedSampler[int]):
    """Sorts rows by length, longest first, and deals them to the ranks.

    Batches of like lengths carry little padding, and the first batch shows whether memory is enough. Every rank gets
    the same number of rows, so the same number of batches; what is missing is filled with the shortest row under its
    negative index ``-1 - index``, which :class:`~lightning_cl.data.EncodedDataset` marks as not to be counted. It is a
    ``DistributedSampler``, so Lightning leaves it alone.

    Args:
        lengths: the length of each row, in any unit; :meth:`EncodedDataset.lengths` gives characters.
        rank: this process.
        world_size: number of processes.

    Example:
        >>> list(EvalSampler([3, 9, 5]))
        [1, 2, 0]
        >>> list(EvalSampler([3, 9, 5], rank=1, world_size=2))
        [2, -1]
    """

    def __init__(self, lengths: Sequence[int], rank: int = 0, world_size: int = 1) -> None:
        super().__init__(range(len(lengths)), num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]
        order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
        if order:
            order += [-1 - order[-1]] * (-len(order) % world_size)
        self._indices = order[rank::world_size]

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)
