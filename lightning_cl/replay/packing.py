# SPDX-License-Identifier: Apache-2.0
"""Append replay rows to a packed batch, each as a segment of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_cl.replay.ragged import CUMULATIVE, LONGEST
from lightning_cl.replay.rows import IGNORED_LABEL, BatchLayout, Row, describe, fit_keys


def join_packed(layout: BatchLayout, rows: Sequence[Row]) -> Any:
    """The packed batch ``[1, tokens]`` with every row appended as a further segment.

    Raises:
        MisconfigurationException: if a leaf is of a kind that cannot be extended, by name.
    """
    leaves = dict(layout.leaves)
    contents = [fit_keys(row, layout) for row in rows]
    device = leaves["input_ids"].device
    added = [len(c["input_ids"]) for c in contents]
    for path, leaf in layout.leaves.items():
        key = path.rpartition(".")[2]
        if key in CUMULATIVE:
            ends = torch.tensor(added, device=device).cumsum(0).to(leaf.dtype)
            leaves[path] = torch.cat([leaf, ends + leaf[-1]])
        elif key in LONGEST:
            leaves[path] = (
                type(leaf)(max(int(leaf), *added)) if not isinstance(leaf, Tensor) else leaf.clamp_min(max(added))
            )
        elif key == "position_ids":
            tail = torch.cat([torch.arange(n, device=device) for n in added]).to(leaf.dtype)
            leaves[path] = torch.cat([leaf, tail[None]], dim=1)
        elif key == "seq_idx":
            first = len(layout.lengths or ())
            tail = torch.cat([torch.full((n,), first + i, device=device) for i, n in enumerate(added)]).to(leaf.dtype)
            leaves[path] = torch.cat([leaf, tail[None]], dim=1)
        elif isinstance(leaf, Tensor) and leaf.ndim == 2 and leaf.shape == layout.leaves["input_ids"].shape:
            values = [c[path].clone() for c in contents]
            if key == "labels":
                # In a packed row, a segment's first token would be predicted from its neighbour's last.
                for value in values:
                    value[0] = IGNORED_LABEL
            leaves[path] = torch.cat([leaf, torch.cat(values).to(device, leaf.dtype)[None]], dim=1)
        else:
            raise MisconfigurationException(
                f"The packed batch has a key {path!r} ({describe(leaf)}) that replay segments cannot be appended to."
                " Known are `[1, tokens]` tensors, `position_ids`, `cu_seqlens` (`cu_seq_lens_q/k`) and `max_length_q/k`."
                " Drop the key, or train on padded batches."
            )
    return layout.rebuild(leaves)
