# SPDX-License-Identifier: Apache-2.0
"""Which rows form which batch: the same plan on every process, for any number of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def batch_sizes(rows: int, batch_size: int, world_size: int) -> list[int]:
    """Sizes of the global batches (all processes together) that use each of ``rows`` rows once.

    Every global batch but the last two is full. The last one may be too small to give each process a row; then it is
    evened out with the one before, so that no process waits for another in a collective call and no row is used twice.

    Args:
        rows: how many rows there are.
        batch_size: rows of one process's batch.
        world_size: number of processes.

    Returns:
        The sizes, which sum to ``rows``.

    Example:
        >>> batch_sizes(10, batch_size=4, world_size=1)
        [4, 4, 2]
        >>> batch_sizes(17, batch_size=4, world_size=2)
        [8, 5, 4]
    """
    full = batch_size * world_size
    sizes = [full] * (rows // full)
    rest = rows % full
    if rest:
        sizes.append(rest)
    return [*sizes[:-2], *even_out(sizes[-2:], world_size)]


def even_out(tail: list[int], world_size: int) -> list[int]:
    """The last two sizes, changed so that each gives every process a row."""
    if len(tail) < 2 or tail[-1] >= world_size:
        return tail
    both = sum(tail)
    # With one row a process, two batches cannot both be filled: one batch a row larger takes them all.
    return [both - both // 2, both // 2] if both // 2 >= world_size else [both]


def part_of(start: int, size: int, rank: int, world_size: int) -> range:
    """The positions of one process's share of a global batch of ``size`` rows that begins at ``start``.

    Example:
        >>> part_of(8, 5, rank=0, world_size=2), part_of(8, 5, rank=1, world_size=2)
        (range(8, 11), range(11, 13))
    """
    share, larger = divmod(size, world_size)
    first = start + rank * share + min(rank, larger)
    return range(first, first + share + (rank < larger))


def batches_of_stream(
    rows: Iterable[T], batch_size: int, rank: int, world_size: int, start: int = 0
) -> Iterator[tuple[int, int, list[T]]]:
    """The same plan for rows whose number is not known before they end.

    Args:
        rows: the remaining rows, the same in the same order on every process.
        batch_size: rows of one process's batch.
        rank: this process.
        world_size: number of processes.
        start: how many rows came before.

    Yields:
        The number of rows used after this batch (by all processes), the number of this process's first row in the
        stream, and its rows.
    """
    full = batch_size * world_size
    held: list[T] = []  # at most two global batches: what comes next decides how the last two are cut

    def batch(first: int, size: int) -> tuple[int, int, list[T]]:
        part = part_of(first, size, rank, world_size)
        return start + first + size, start + part.start, [held[i] for i in part]

    for row in rows:
        held.append(row)
        if len(held) == 2 * full:
            yield batch(0, full)
            start += full
            del held[:full]
    first = 0
    for size in batch_sizes(len(held), batch_size, world_size):
        yield batch(first, size)
        first += size
