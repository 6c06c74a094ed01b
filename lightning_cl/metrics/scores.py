# SPDX-License-Identifier: Apache-2.0
"""One cell of the task matrix, and how the parts of it that several ranks hold become one."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_cl.metrics.bootstrap import bootstrap_interval

Range = tuple[float, float]


@dataclass(frozen=True)
class Score:
    """One cell of the matrix.

    Attributes:
        value: the score, as the metric gave it.
        rows: number of test rows behind it, if known.
        interval: the ends of its 95 % bootstrap interval, if the scores of the rows are known.
        scores: the score of each row, ``[rows]``.
    """

    value: float
    rows: int | None = None
    interval: tuple[float, float] | None = None
    scores: Tensor | None = None


def interval_of(value: float, scores: Tensor) -> Range:
    """The bootstrap interval of the rows' mean, centred on the value where that is not their plain mean.

    Example:
        >>> interval_of(0.5, torch.ones(4))
        (0.5, 0.5)
    """
    low, high = bootstrap_interval(scores)
    shift = value - float(scores.mean())
    return low + shift, high + shift


def join(parts: list[Score]) -> Score:
    """One cell from what the ranks hold of it: equal parts once, unequal ones averaged by their rows.

    Example:
        >>> join([Score(0.5, rows=10), Score(0.8, rows=20)])
        Score(value=0.7, rows=30, interval=None, scores=None)
        >>> join([Score(0.5), Score(0.5)])
        Score(value=0.5, rows=None, interval=None, scores=None)
    """
    first = parts[0]
    if all(_same(first, other) for other in parts[1:]):
        return first
    known = [float(part.rows) for part in parts if part.rows is not None]
    complete = len(known) == len(parts) and sum(known) > 0
    weights = known if complete else [1.0] * len(parts)
    value = sum(w * part.value for w, part in zip(weights, parts, strict=True)) / sum(weights)
    rows = int(sum(known)) if complete else None
    pieces = [part.scores for part in parts if part.scores is not None]
    if len(pieces) < len(parts):
        return Score(value, rows)
    scores = torch.cat(pieces)
    return Score(value, rows, interval_of(value, scores), scores)


def _same(a: Score, b: Score) -> bool:
    equal = a.value == b.value or (math.isnan(a.value) and math.isnan(b.value))
    if not equal or a.rows != b.rows or (a.scores is None) != (b.scores is None):
        return False
    return a.scores is None or b.scores is None or torch.equal(a.scores, b.scores)


def check_ranges(normalise: Any) -> dict[str, Range] | Range | None:
    """The scales that ``TaskMatrix(normalise=...)`` was given, as pairs of floats.

    Raises:
        ValueError: if one is not two different finite numbers.
    """
    if normalise is None:
        return None
    given = normalise if isinstance(normalise, Mapping) else {"": normalise}
    ranges: dict[str, Range] = {}
    for task, span in given.items():
        pair = isinstance(span, (list, tuple)) and len(span) == 2 and all(isinstance(x, (int, float)) for x in span)
        if not pair or span[0] == span[1] or not all(math.isfinite(x) for x in span):
            where = f"task {task!r}" if task else "all tasks"
            raise ValueError(
                f"`TaskMatrix(normalise=...)` got {span!r} for {where}. Give the worst and the best score of the scale,"
                " two different finite numbers, such as `[0, 1]` for an accuracy or `[4.0, 0.0]` for a loss."
            )
        ranges[task] = (float(span[0]), float(span[1]))
    return ranges if isinstance(normalise, Mapping) else ranges[""]


def name_key(name: str) -> int:
    """A number for a name that is the same on every rank and in every run, whatever order names arrive in."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def decode_names(encoded: Tensor) -> list[str]:
    """The names in a tensor of UTF-8 bytes, each ended by a zero.

    Example:
        >>> decode_names(torch.tensor([97, 98, 0, 99, 0], dtype=torch.uint8))
        ['ab', 'c']
    """
    return [name.decode() for name in bytes(encoded.tolist()).split(b"\0")[:-1]]


def flat(state: Any) -> Tensor:
    """A list state, or what a synchronisation made of it, as one flat tensor."""
    return torch.cat([t.flatten() for t in state]) if isinstance(state, list) else state.flatten()
