# SPDX-License-Identifier: Apache-2.0
"""Replay: rows of general, past or self-generated data in every training batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from lightning_cl.callbacks.base import ContinualCallback
from lightning_cl.distributed import raise_together, rank, world_size
from lightning_cl.replay.joining import RowProvider
from lightning_cl.replay.rows import IGNORED_LABEL, BatchLayout, Row, split_rows
from lightning_cl.replay.source import ReplaySource

# One replay row to four task rows: arXiv 2605.26097, section 4, and the other papers' order of magnitude.
_DEFAULT_RATIO = 0.2


class ReplayMixer(ContinualCallback):
    """Adds replay rows to every training batch of any LightningModule.

    The rows of the sources are appended to the batch after its transfer to the device, in the batch's own structure
    (dicts, tuples, lists, dataclasses, nested), so ``training_step`` sees one longer batch; :func:`lightning_cl.replay_rows`
    tells which rows are replay. Metrics that ``training_step`` logs and BatchNorm statistics see the replay rows too.
    Where joining would pad much (32 rows of 48 tokens with 8 of 512), ``training_step`` runs a second time on the
    replay rows alone and the two losses are added with the weights that one joint mean would give them; what the second
    run logs is dropped. Packed batches (``[1, tokens]`` with ``position_ids`` or ``cu_seqlens``) get further segments.

    Several sources share the rows evenly; a source that has none yet (an empty memory) leaves its share to the others.
    All ranks draw different rows.

    Args:
        sources: a :class:`~lightning_cl.replay.ReplaySource` or a list of them.
        rows_per_batch: replay rows in each batch of each rank.
        ratio: share of the replay rows in the final batch; kept exactly on average where it gives fractions of rows.
        token_ratio: share of the replay rows' loss-bearing tokens, kept within one row over any number of steps. It
            reads the batch's labels, which on a GPU waits for the transfer.
        layout: ``"joined"``, ``"separate"``, or ``"auto"`` for the cheaper one in each batch (always joined under manual
            optimization).
        task_weight: weight of the mean loss on task rows, the replay rows' mean has the rest (the papers'
            (task + replay) / 2 is 0.5). None: the module's own mean over all; the weights that result are logged as
            ``cl/task_weight``. Needs ``layout="separate"`` or a module whose ``training_step`` takes its loss from a
            method ``per_row_loss(batch) -> Tensor [rows]``.
        pad_values: fill by key for keys of variable length outside the usual ones of language models.

    Without ``rows_per_batch``, ``ratio`` and ``token_ratio``, ``ratio`` is 0.2: one replay row to four task rows.

    Raises:
        ValueError: if more than one amount is given, or one is out of its range.
        MisconfigurationException: at the start of training, if rows and batches do not fit, by key.

    Example:
        >>> from lightning_cl.replay import EpisodicMemory
        >>> ReplayMixer(EpisodicMemory(capacity=500), rows_per_batch=8).rows_per_batch
        8

        In YAML::

            trainer:
              callbacks+:
                - class_path: lightning_cl.callbacks.ReplayMixer
                  init_args:
                    sources:
                      class_path: lightning_cl.replay.EpisodicMemory
                      init_args: {capacity: 500}
    """

    adds_replay_rows = True

    def __init__(
        self,
        sources: ReplaySource | list[ReplaySource],
        rows_per_batch: int | None = None,
        ratio: float | None = None,
        token_ratio: float | None = None,
        layout: Literal["auto", "joined", "separate"] = "auto",
        task_weight: float | None = None,
        pad_values: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        amounts = {"rows_per_batch": rows_per_batch, "ratio": ratio, "token_ratio": token_ratio}
        given = {name: value for name, value in amounts.items() if value is not None}
        if len(given) > 1:
            raise ValueError(f"`ReplayMixer` was given {' and '.join(given)}: keep exactly one of them.")
        for name in ("ratio", "token_ratio"):
            if name in given and not 0 < given[name] < 1:
                raise ValueError(
                    f"`ReplayMixer({name}={given[name]})`: the share of replay in the final batch must lie between 0 and"
                    " 1, without them."
                )
        if rows_per_batch is not None and rows_per_batch < 1:
            raise ValueError(
                f"`ReplayMixer(rows_per_batch={rows_per_batch})`: must be at least 1. Leave the callback out to train"
                " without replay."
            )
        if layout not in ("auto", "joined", "separate"):
            raise ValueError(f'`ReplayMixer(layout={layout!r})`: use "auto", "joined" or "separate".')
        if task_weight is not None and not 0 < task_weight < 1:
            raise ValueError(f"`ReplayMixer(task_weight={task_weight})`: must lie between 0 and 1, without them.")
        self.sources = list(sources) if isinstance(sources, (list, tuple)) else [sources]
        wrong = [type(s).__name__ for s in self.sources if not isinstance(s, ReplaySource)]
        if wrong or not self.sources:
            raise ValueError(
                f"`ReplayMixer(sources=...)` got {wrong or 'an empty list'}: give `GeneralSamples`, `EpisodicMemory`,"
                " `SelfGenerated` or another `ReplaySource`."
            )
        self.rows_per_batch = rows_per_batch
        self.ratio = ratio if given else _DEFAULT_RATIO
        self.token_ratio = token_ratio
        self.layout = layout
        self.task_weight = task_weight
        self.pad_values = dict(pad_values or {})
        # What is owed to the wanted amount: fractions of a row, or loss-bearing tokens.
        self._owed = 0.0
        # Rows drawn so far: sources take turns, also over batches that are too small for all of them.
        self._next_source = 0

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(sources=[source.name for source in self.sources])

    @override
    def prepare_task(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the sources read their data; an error on one rank is raised on all."""
        error: Exception | None = None
        try:
            for source in self.sources:
                source.prepare(trainer, pl_module, self.task_index)
        except Exception as found:
            error = found
        raise_together(error)

    @override
    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the sources collect or generate what they need, and offer their rows to each batch."""
        for source in self.sources:
            source.start(trainer, pl_module, self.attachment)
        provider = RowProvider(self._draw, self.layout, self.task_weight, self.pad_values, self._observe)
        self.attachment.add_rows(self, provider)

    @override
    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the sources take the task into their memory."""
        for source in self.sources:
            source.end_task(trainer, pl_module, self.task_index)

    def _draw(self, layout: BatchLayout, minimum: int) -> list[Row]:
        if not minimum:
            self._owed += self._wanted(layout)
        ready = [source for source in self.sources if source.available() > 0]
        if not ready:
            # Nothing can be drawn yet, so nothing is owed later either.
            self._owed = 0.0
            return []
        if self.token_ratio is None:
            count = max(int(self._owed + 1e-9), minimum)
            self._owed -= count
            return self._take(ready, count)
        rows: list[Row] = []
        while self._owed > 0 or len(rows) < minimum:
            rows += self._take(ready, 1)
            self._owed -= rows[-1].tokens
        return rows

    def _wanted(self, layout: BatchLayout) -> float:
        """Replay rows, or loss-bearing replay tokens, that this batch asks for."""
        if self.rows_per_batch is not None:
            return self.rows_per_batch
        if self.token_ratio is not None:
            return _loss_tokens(layout) * self.token_ratio / (1 - self.token_ratio)
        assert self.ratio is not None
        return layout.rows * self.ratio / (1 - self.ratio)

    def _take(self, ready: list[ReplaySource], count: int) -> list[Row]:
        shares = [0] * len(ready)
        for i in range(count):
            shares[(self._next_source + i) % len(ready)] += 1
        self._next_source += count
        rows = []
        for source, share in zip(ready, shares, strict=True):
            drawn = source.draw(share, rank(), world_size()) if share else []
            rows += [row if row.source else replace(row, source=source.name) for row in drawn]
        return rows

    def _observe(self, layout: BatchLayout) -> None:
        learners = [source for source in self.sources if source.observes]
        if not learners:
            return
        cpu = {path: leaf.cpu() if isinstance(leaf, Tensor) else leaf for path, leaf in layout.leaves.items()}
        rows = split_rows(replace(layout, leaves=cpu), task=self.task_name or str(self.task_index))
        for source in learners:
            source.observe(rows)

    @override
    def state_dict(self) -> dict[str, Any]:
        """The task, what is owed, and the state of every source (a collective call under several ranks)."""
        return {
            **super().state_dict(),
            "owed": self._owed,
            "next_source": self._next_source,
            "sources": [source.state_dict() for source in self.sources],
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take all of it back."""
        super().load_state_dict(state_dict)
        self._owed = state_dict["owed"]
        self._next_source = state_dict["next_source"]
        for source, state in zip(self.sources, state_dict["sources"], strict=True):
            source.load_state_dict(state)


def _loss_tokens(layout: BatchLayout) -> int:
    labels = layout.leaves.get("labels")
    if isinstance(labels, Tensor) and labels.ndim == 2:
        return int((labels[:, 1:] != IGNORED_LABEL).sum())
    mask = layout.leaves.get("attention_mask")
    if isinstance(mask, Tensor):
        return int(mask.sum())
    ids = layout.leaves.get("input_ids")
    return ids.numel() if isinstance(ids, torch.Tensor) else layout.rows
