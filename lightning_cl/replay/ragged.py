# SPDX-License-Identifier: Apache-2.0
"""Batches whose rows have no common length: packed ones are told apart here, all others are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

#: Keys that hold where each segment of a packed batch begins, and where the last one ends.
CUMULATIVE = ("cu_seqlens", "cu_seq_lens", "cu_seq_lens_q", "cu_seq_lens_k")
#: Keys that hold the longest segment.
LONGEST = ("max_seqlen", "max_length_q", "max_length_k")
#: Keys of the shape of ``input_ids`` that follow from the segments alone.
FOLLOWING = ("position_ids", "seq_idx")

_WAY_OUT = (
    " Replay rows are appended to batches `[rows, tokens]` (padded) and to packed ones, `[1, tokens]` with `position_ids` or"
    " `cu_seqlens`. Collate to one of these."
)


def segment_lengths(leaves: Mapping[str, Any]) -> list[int] | None:
    """Tokens of each segment of a packed batch; None for a batch with one row an entry.

    Args:
        leaves: the batch's leaves by path.

    Raises:
        MisconfigurationException: for any other layout without a common length, by name.
    """
    for path, leaf in leaves.items():
        if isinstance(leaf, Tensor) and leaf.is_nested:
            raise MisconfigurationException(f"The training batch holds a nested tensor at key {path!r}.{_WAY_OUT}")
    _refuse_lists(leaves)
    ids = leaves.get("input_ids")
    boundaries = {key: leaves[key] for key in CUMULATIVE if isinstance(leaves.get(key), Tensor)}
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[0] != 1:
        if boundaries and isinstance(ids, Tensor):
            raise MisconfigurationException(
                f"The training batch has `{next(iter(boundaries))}` beside `input_ids` of shape {list(ids.shape)}: only one"
                f" row of segments, `[1, tokens]`, can be extended.{_WAY_OUT}"
            )
        return None
    for key, boundary in boundaries.items():
        lengths = boundary.flatten().diff().tolist()
        if sum(lengths) != ids.shape[1]:
            raise MisconfigurationException(
                f"`{key}` of the packed batch covers {sum(lengths)} of its {ids.shape[1]} tokens: segments appended behind"
                " the padding could not be reached by it. Give the rest a segment of its own, or leave the padding out."
            )
        return lengths
    positions = leaves.get("position_ids")
    if not isinstance(positions, Tensor) or positions.shape != ids.shape:
        return None
    starts = (positions[0] == 0).nonzero().flatten().tolist()
    ends = [*starts[1:], ids.shape[1]]
    return [end - start for start, end in zip(starts, ends, strict=True)]


def _refuse_lists(leaves: Mapping[str, Any]) -> None:
    """A list with one tensor a row would be taken for columns, and each token (or channel) for a row."""
    columns: dict[str, list[Tensor]] = {}
    for path, leaf in leaves.items():
        parent, _, last = path.rpartition(".")
        if last.isdigit() and isinstance(leaf, Tensor) and leaf.ndim:
            columns.setdefault(parent, []).append(leaf)
    for parent, tensors in columns.items():
        alike = len({(t.dtype, t.ndim) for t in tensors}) == 1
        if alike and len({t.shape[0] for t in tensors}) > 1:
            where = f" at key {parent!r}" if parent else ""
            raise MisconfigurationException(
                f"The training batch holds a list of {len(tensors)} tensors of unlike lengths"
                f" ({', '.join(str(t.shape[0]) for t in tensors[:4])}{', ...' if len(tensors) > 4 else ''}){where}, so its"
                f" rows cannot be told from its columns.{_WAY_OUT}"
            )
