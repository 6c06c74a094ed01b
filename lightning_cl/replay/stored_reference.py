# SPDX-License-Identifier: Apache-2.0
"""A reference's hidden states of rows that are known ahead: taken once, in large batches, instead of in each step."""

from __future__ import annotations

import os
import time
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_cl.distributed import raise_together
from lightning_cl.replay.collecting import ActivationCollector
from lightning_cl.replay.reference_states import TokenCheck
from lightning_cl.replay.rows import Row

# Tokens of one pass: enough to keep a GPU busy with a small model.
_TOKENS_A_PASS = 8192

# Share of a node's memory that its processes' states may take.
_HOST_SHARE = 0.5


class StoredReference:
    """Hidden states ``[tokens, D]`` of each of a set of rows, in host memory, in the network's own dtype.

    Every rank holds those of all rows, since it may draw any of them.

    Attributes:
        made_for: what the states were taken for, as the caller named it; None before :meth:`take`.
    """

    def __init__(self) -> None:
        self.made_for: Hashable = None
        self._states: dict[str, Tensor] = {}
        self._check_tokens = TokenCheck()

    def take(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        layer: str,
        rows: Sequence[Row],
        pad_values: Mapping[str, float],
        token_bytes: int,
        made_for: Hashable,
    ) -> None:
        """Take the states of these rows with the weights that the module has now, and forget those of others. Collective.

        Args:
            trainer: the running Trainer.
            module: the module, on its device and sharded, outside of a training step.
            layer: dotted name of the submodule whose output is kept.
            rows: the rows, the same on every rank.
            pad_values: fill by key, for keys of variable length outside the usual ones.
            token_bytes: about how much the output at one token takes.
            made_for: names the occasion, for :attr:`made_for`.

        Raises:
            MisconfigurationException: on all ranks, if the states would take more than half of a node's memory.
        """
        began = time.perf_counter()
        needed = trainer.num_devices * token_bytes * sum(row.length for row in rows)
        raise_together(_too_much(needed, len(rows)))
        states: dict[str, Tensor] = {}

        def keep(_: str, keys: list[str], activations: Sequence[Tensor]) -> None:
            states.update(zip(keys, activations, strict=True))

        if rows:
            batch_size = max(1, _TOKENS_A_PASS // max(1, *(row.length for row in rows)))
            collector = ActivationCollector(trainer, module, [layer], pad_values, batch_size, skip_first_token=False)
            collector.each(rows, keep)
        self._states, self._check_tokens, self.made_for = states, TokenCheck(), made_for
        if rows:
            seconds = time.perf_counter() - began
            size = sum(s.numel() * s.element_size() for s in states.values())
            rank_zero_info(f"Reference states of {len(states)} rows: {size / 2**20:.1f} MiB in {seconds:.1f} s.")

    def batch(self, keys: Sequence[str], mask: Tensor) -> Tensor:
        """The states of some rows, each beside its token: ``[R, T, D]`` on the mask's device, zero at the padding.

        Args:
            keys: ids of the rows.
            mask: bool ``[R, T]``, True at real tokens. Nothing waits for the copy to its device.

        Raises:
            MisconfigurationException: if a row has other tokens than when its states were taken.
        """
        pieces = [self._states[key] for key in keys]
        self._check_tokens(keys, [len(piece) for piece in pieces], mask.shape[1], mask)
        first = pieces[0]
        out: Any = torch.zeros(*mask.shape, first.shape[1], dtype=first.dtype, pin_memory=mask.is_cuda)
        for row, piece in zip(out, pieces, strict=True):
            row[: len(piece)] = piece
        return out.to(mask.device, non_blocking=True)


def _too_much(needed: int, rows: int) -> MisconfigurationException | None:
    if not hasattr(os, "sysconf"):
        return None  # no POSIX system
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed <= _HOST_SHARE * memory:
        return None
    return MisconfigurationException(
        f"`ReplayDistillation(precompute=True)` would keep {needed / 2**30:.1f} GiB of states of {rows} rows on a node with"
        f" {memory / 2**30:.1f} GiB of memory. Take fewer or shorter rows (`num_samples`, `pool_size`, `max_tokens`,"
        " `length`), or leave `precompute` out."
    )
