# SPDX-License-Identifier: Apache-2.0
"""What callbacks can see of one training step: its replay rows and their activations."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_cl.replay.rows import Row

# Rank-one arguments that merely happen to be as long as the batch (Hugging Face passes token positions under this name).
_NOT_ROWS = ("cache_position",)


@dataclass
class ReplayRows:
    """The replay rows of one step, and where they lie in the batch that the network sees. They are always last.

    Attributes:
        ids: identity of each row (data set index or content hash, prefixed with the source's name).
        sources: class name of the source of each row.
        total: rows of the batch that holds them (tokens, if it is packed).
        token_mask: bool ``[R, T]``, True at real tokens; None for data without a token axis.
        packed_index: ``[R, T]`` positions on the token axis of a packed batch; None for an ordinary batch.
        packed_start: the first of these positions.
        full: True if none of their tokens is padding. Both are known without asking the device, which would wait for it.
        layout: whether they share the task rows' forward pass.
        window: the replay rows of all batches of this optimizer step on this rank, this batch's included; None unless a
            callback asked for them (``attachment.draw_ahead``).
    """

    ids: list[str]
    sources: list[str]
    total: int
    token_mask: Tensor | None = None
    packed_index: Tensor | None = None
    layout: str = "joined"
    window: list[Row] | None = None
    packed_start: int = 0
    full: bool = False

    @property
    def count(self) -> int:
        """Number of replay rows."""
        return len(self.ids)

    def fits(self, value: Any) -> bool:
        """Whether ``value`` is a tensor with one entry for each row (token) of the batch that holds the replay rows."""
        if not isinstance(value, Tensor) or value.ndim == 0:
            return False
        if self.packed_index is not None:
            return value.ndim >= 2 and value.shape[0] == 1 and value.shape[1] == self.total
        return value.shape[0] == self.total

    def select(self, value: Tensor) -> Tensor:
        """The replay rows of a tensor that :meth:`fits`: ``[R, T, ...]`` (a view, unless the batch is packed)."""
        if self.packed_index is None:
            return value[self.total - self.count :]
        rows = value[0][self.packed_index]
        assert self.token_mask is not None
        return torch.where(self.token_mask.reshape(*self.token_mask.shape, *[1] * (rows.ndim - 2)), rows, 0)

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The arguments of a call on the whole batch, reduced to the replay rows; None if no argument fits."""
        values = [*args, *kwargs.values()]
        if not any(self.fits(value) for value in values):
            return None
        return tuple(self._argument("", value) for value in args), {k: self._argument(k, v) for k, v in kwargs.items()}

    def _argument(self, name: str, value: Any) -> Any:
        if self.packed_index is not None:
            return self._packed_argument(name, value)
        if name == "use_cache":
            return False
        return self.select(value) if name not in _NOT_ROWS and self.fits(value) else value

    def _packed_argument(self, name: str, value: Any) -> Any:
        start = self.packed_start
        if name == "use_cache":
            return False
        if name.startswith(("cu_seqlens", "cu_seq_lens")) and isinstance(value, Tensor):
            return value[-(self.count + 1) :] - start
        if isinstance(value, Tensor) and value.ndim == 1 and name in _NOT_ROWS:
            return value[: self.total - start]
        return value[:, start:] if self.fits(value) else value

    def alone(self) -> ReplayRows:
        """The same rows as a reference pass sees them: with nothing before them."""
        if self.packed_index is None:
            return ReplayRows(self.ids, self.sources, self.count, self.token_mask, full=self.full)
        start = self.packed_start
        index = (self.packed_index - start).clamp_min(0)
        return ReplayRows(self.ids, self.sources, self.total - start, self.token_mask, index)


@dataclass
class Step:
    """One training step, as the callbacks' loss terms see it. It is gone when the step ends.

    Attributes:
        batch: the batch that ``training_step`` was given, replay rows included where they are joined.
        batch_idx: its index.
        replay_batch: the replay rows' own batch, where they have a pass of their own; else None.
        replay: the replay rows.
        activations: output of each watched module on the replay rows, ``[R, T, D]`` or ``[R, D]``, with its graph.
        reference: the same from each reference pass, by the pass's key, without a graph.
        task_loss: the loss of the module itself, detached.
    """

    batch: Any
    batch_idx: int
    replay: ReplayRows
    activations: dict[str, Tensor] = field(default_factory=dict)
    reference: dict[Hashable, dict[str, Tensor]] = field(default_factory=dict)
    task_loss: Tensor | None = None
    replay_batch: Any = None
