# SPDX-License-Identifier: Apache-2.0
"""Bring replay rows and the task's batch together: in one forward pass or in two, whichever is cheaper."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_cl.distributed import raise_together, sum_over_ranks, world_size
from lightning_cl.replay.packing import join_packed
from lightning_cl.replay.rows import (
    IGNORED_LABEL,
    BatchLayout,
    Row,
    alone,
    collate_rows,
    join,
    layout_of,
)
from lightning_cl.step import ReplayRows

# Two passes pay for themselves only if joining wastes more than this share of the tokens on padding.
_WORTH_A_SECOND_PASS = 1.1


@dataclass
class RowProvider:
    """What a callback that adds rows gives to the attachment.

    Attributes:
        draw: called as ``draw(layout, minimum)`` in each step, on every rank; gives this rank's rows, at least
            ``minimum`` if it has any.
        layout: ``"joined"`` (one forward), ``"separate"`` (two) or ``"auto"``.
        task_weight: weight of the task rows' loss; the replay rows' has the rest. None: the module's own mean.
        pad_values: fill by key, for keys of variable length outside the known ones.
        observe: called with each batch before rows are drawn for it.
    """

    draw: Callable[[BatchLayout, int], list[Row]]
    layout: Literal["auto", "joined", "separate"] = "auto"
    task_weight: float | None = None
    pad_values: Mapping[str, float] = field(default_factory=dict)
    observe: Callable[[BatchLayout], None] | None = None


@dataclass
class Added:
    """A step's batch with its replay rows.

    Attributes:
        batch: what ``training_step`` gets.
        replay: the replay rows and where they lie.
        separate: the replay rows' own batch, if they have their own pass.
        task_weight: weight of the task rows in the loss (effective, where it is not given).
        replay_loss_counts: whether the module's own loss on the replay rows is part of the training loss.
        row_tokens: tokens with loss of each row of ``batch``; None where rows count alike.
    """

    batch: Any
    replay: ReplayRows = field(default_factory=lambda: ReplayRows([], [], 0))
    separate: Any = None
    task_weight: Any = None
    replay_loss_counts: bool = True
    row_tokens: Tensor | None = None

    def weigh(self, row_losses: Tensor | None) -> Tensor:
        """Combine the rows' losses ``[B]``: ``task_weight`` for the task rows' mean, the rest for the replay rows'."""
        if row_losses is None:
            raise MisconfigurationException(
                "`task_weight` is set and the module has `per_row_loss`, but `training_step` did not call it. Take the"
                ' loss from `self.per_row_loss(batch)` in `training_step`, or use `layout="separate"`.'
            )
        tokens = torch.ones_like(row_losses) if self.row_tokens is None else self.row_tokens.to(row_losses.dtype)
        first = len(row_losses) - self.replay.count
        # Rows without any label may have an undefined loss; they have no weight either.
        weighted = torch.where(tokens > 0, row_losses, 0) * tokens
        task = weighted[:first].sum() / tokens[:first].sum().clamp_min(1)
        if not self.replay_loss_counts:
            return task
        replay = weighted[first:].sum() / tokens[first:].sum().clamp_min(1)
        return self.task_weight * task + (1 - self.task_weight) * replay


class Joiner:
    """Adds the rows of all providers to each batch of a fit.

    Attributes:
        providers: in the order of the callbacks.
        unlabelled_sources: sets of source names whose rows carry no labels; None stands for all sources.
        draws_ahead: draw the rows of all batches of an optimizer step at its first batch.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._trainer = trainer
        self._module = module
        self.providers: list[RowProvider] = []
        self.unlabelled_sources: list[frozenset[str] | None] = []
        self.draws_ahead = False
        # Rows of the coming batches of this optimizer step, and of all of its batches.
        self._ahead: list[list[Row]] = []
        self._window: list[Row] | None = None

    @property
    def needs_row_losses(self) -> bool:
        """Whether the two losses of a joined batch must be told apart, row by row."""
        return self._task_weight is not None and hasattr(self._module, "per_row_loss") and self._layout != "separate"

    @property
    def _layout(self) -> str:
        asked = {provider.layout for provider in self.providers} - {"auto"}
        return asked.pop() if len(asked) == 1 else "auto"

    @property
    def _task_weight(self) -> float | None:
        asked = {provider.task_weight for provider in self.providers} - {None}
        return asked.pop() if len(asked) == 1 else None

    @property
    def _pad_values(self) -> dict[str, float]:
        return {key: value for provider in self.providers for key, value in provider.pad_values.items()}

    def check(self) -> None:
        """Refuse settings that cannot hold together.

        Raises:
            MisconfigurationException: with the settings and the ways out.
        """
        if (
            len({p.layout for p in self.providers} - {"auto"}) > 1
            or len({p.task_weight for p in self.providers} - {None}) > 1
        ):
            raise MisconfigurationException(
                "Several `ReplayMixer`s ask for different `layout` or `task_weight`:"
                f" {[(p.layout, p.task_weight) for p in self.providers]}. All rows of a step share one loss: give both to"
                " one of them only, or give one `ReplayMixer` a list of sources."
            )
        manual = not self._module.automatic_optimization
        if manual and (self._layout == "separate" or (self._task_weight is not None and not self.needs_row_losses)):
            raise MisconfigurationException(
                '`layout="separate"` (also needed for `task_weight` here) runs `training_step` twice, which under manual'
                " optimization would step the optimizers twice. Use"
                ' `layout="joined"` without `task_weight`, or automatic optimization.'
            )
        if self._task_weight is not None and self._layout == "joined" and not self.needs_row_losses:
            raise MisconfigurationException(
                f'`task_weight={self._task_weight}` with `layout="joined"` needs the task and replay rows\' losses apart,'
                f" and `{type(self._module).__name__}` gives one mean for both. Use"
                ' `layout="separate"`, or define `per_row_loss(batch) -> Tensor [rows]` and take the loss from it in'
                " `training_step` (as `CausalLMModule` does)."
            )

    def add(self, batch: Any) -> Added:
        """The batch with this step's replay rows; whether there are any, and their layout, is agreed over the ranks."""
        layout = layout_of(batch)
        for provider in self.providers:
            if provider.observe is not None:
                provider.observe(layout)
        rows, made, error = self._next_that_fit(layout)
        plan = self._plan(layout, rows)
        if world_size() > 1:
            having, joined, separate, failed = sum_over_ranks([float(bool(rows)), *plan, float(error is not None)])
            if failed:
                raise_together(error)
            if 0 < having < world_size() and not rows:
                # A rank without rows would skip the passes that the others make, and hang them.
                rows = self._draw(layout, 1)
                made = self._made(layout, rows)
            plan = (joined, separate)
        if not rows:
            return Added(batch)
        is_separate = self._is_separate(layout, plan)
        counts = any(not self._is_unlabelled(row) for row in rows)
        if not is_separate or counts:
            rows = self._leave_out_labels(layout, rows, made)
        added = self._separate(layout, rows, made, counts) if is_separate else self._joined(layout, rows, made, counts)
        added.replay.window = self._window
        return added

    def _next_that_fit(self, layout: BatchLayout) -> tuple[list[Row], Any, Exception | None]:
        """This batch's rows, as they are and made to fit the batch.

        Of several ranks, one that cannot use its rows says so instead of leaving the others alone.
        """
        try:
            rows = self._next(layout)
            return rows, self._made(layout, rows), None
        except Exception as error:
            if world_size() == 1:
                raise
            return [], None, error

    def _made(self, layout: BatchLayout, rows: list[Row]) -> Any:
        """The rows' columns as :func:`collate_rows` gives them; of a packed batch, the batch with the rows at its end."""
        if not rows:
            return None
        if not layout.packed:
            return collate_rows(rows, layout, self._pad_values)
        return join_packed(
            layout, [self._without_labels(row, layout) if self._is_unlabelled(row) else row for row in rows]
        )

    def _next(self, layout: BatchLayout) -> list[Row]:
        """This batch's rows."""
        if not self.draws_ahead:
            return self._draw(layout, 0)
        if not self._ahead:
            self._ahead = [self._draw(layout, 0) for _ in range(self._batches_left())]
            self._window = [row for rows in self._ahead for row in rows]
        return self._ahead.pop(0)

    def _batches_left(self) -> int:
        """Batches of the running optimizer step from the present one on."""
        done = self._trainer.fit_loop.epoch_loop.batch_progress.current.ready
        accumulated = self._trainer.accumulate_grad_batches
        # The last optimizer step of an epoch may be shorter (a loader without a length says so only when it ends).
        return int(max(1, min(accumulated - done % accumulated, self._trainer.num_training_batches - done)))

    def _draw(self, layout: BatchLayout, minimum: int) -> list[Row]:
        rows: list[Row] = []
        for provider in self.providers:
            rows += provider.draw(layout, max(0, minimum - len(rows)))
        return rows

    def _plan(self, layout: BatchLayout, rows: list[Row]) -> tuple[float, float]:
        """Tokens that the joined pass and the two separate passes would compute."""
        if not rows:
            return 0.0, 0.0
        widest = max(row.length for row in rows)
        joined = (layout.rows + len(rows)) * max(layout.width, widest)
        return float(joined), float(layout.rows * layout.width + len(rows) * widest)

    def _is_separate(self, layout: BatchLayout, plan: tuple[float, float]) -> bool:
        if layout.packed or not self._module.automatic_optimization:
            return False
        if self._layout != "auto":
            return self._layout == "separate"
        if self._task_weight is not None and not self.needs_row_losses:
            return True
        if self.unlabelled_sources and "labels" not in layout.per_row:
            return True
        return plan[0] > _WORTH_A_SECOND_PASS * plan[1]

    def _is_unlabelled(self, row: Row) -> bool:
        return any(sources is None or row.source in sources for sources in self.unlabelled_sources)

    def _leave_out_labels(self, layout: BatchLayout, rows: list[Row], made: Any) -> list[Row]:
        """Blank the labels of the rows that shall carry none; a packed batch was made without them."""
        blank = [self._is_unlabelled(row) for row in rows]
        if not layout.packed and any(blank):
            self._check_labels(layout, layout.per_row)
            made["labels"][torch.tensor(blank)] = IGNORED_LABEL
        return [replace(row, tokens=0) if without else row for row, without in zip(rows, blank, strict=True)]

    def _without_labels(self, row: Row, layout: BatchLayout) -> Row:
        self._check_labels(layout, layout.leaves)
        labels = torch.full_like(row.content["input_ids"], IGNORED_LABEL)
        return replace(row, content={**row.content, "labels": labels}, tokens=0)

    def _check_labels(self, layout: BatchLayout, keys: Collection[str]) -> None:
        labels = layout.leaves.get("labels")
        if "labels" not in keys or not isinstance(labels, Tensor) or labels.is_floating_point():
            raise MisconfigurationException(
                "Replay rows shall carry no labels (they are distilled), but the batch has no key `labels` of token numbers"
                f' to leave out: it has {list(layout.leaves)}. Use `ReplayMixer(layout="separate")`, whose replay loss is'
                " dropped, with all rows distilled."
            )

    def _joined(self, layout: BatchLayout, rows: list[Row], made: Any, counts: bool) -> Added:
        ids, sources = _ids(rows), [row.source for row in rows]
        if layout.packed:
            batch = made
            mask, index, start, total = _segments(layout, rows)
            replay = ReplayRows(ids, sources, total, mask, index, packed_start=start)
        else:
            batch = join(layout, self._transfer(made, layout), self._pad_values)
            width = max(layout.width, *(row.length for row in rows))
            total = layout.rows + len(rows)
            replay = ReplayRows(ids, sources, total, _mask(rows, width, layout), full=_are_full(rows, width))
        tokens = self._row_tokens(layout, rows)
        weight = self._task_weight
        if weight is None:
            weight = self._effective_weight(layout, rows, tokens)
        return Added(batch, replay, None, weight, counts, tokens)

    def _separate(self, layout: BatchLayout, rows: list[Row], made: Any, counts: bool) -> Added:
        columns = self._transfer(made, layout)
        widest = max(row.length for row in rows)
        mask, full = _mask(rows, widest, layout), _are_full(rows, widest)
        replay = ReplayRows(_ids(rows), [row.source for row in rows], len(rows), mask, layout="separate", full=full)
        weight: Any = self._task_weight
        if weight is None:
            weight = self._effective_weight(layout, rows, self._row_tokens(layout, rows)) if counts else 1.0
        return Added(layout.batch, replay, alone(layout, columns), weight, counts)

    def _row_tokens(self, layout: BatchLayout, rows: list[Row]) -> Tensor | None:
        """Tokens with loss of each task and replay row, on the batch's device; None without labels."""
        labels = layout.leaves.get("labels")
        if layout.packed or not isinstance(labels, Tensor) or labels.ndim != 2:
            return None
        mine = (labels[:, 1:] != IGNORED_LABEL).sum(1)
        theirs = torch.tensor([row.tokens for row in rows]).to(mine.device, non_blocking=True)
        return torch.cat([mine, theirs])

    def _effective_weight(self, layout: BatchLayout, rows: list[Row], tokens: Tensor | None) -> Any:
        """The share that the task rows have in a mean over all tokens (all rows, for data without labels)."""
        if tokens is None:
            return layout.rows / (layout.rows + len(rows))
        return tokens[: layout.rows].sum() / tokens.sum().clamp_min(1)

    def _transfer(self, columns: dict[str, Any], layout: BatchLayout) -> dict[str, Any]:
        columns = self._trainer.precision_plugin.convert_input(columns)
        moved = {}
        for path, value in columns.items():
            like = layout.leaves[path]
            moved[path] = value.to(like.device, like.dtype, non_blocking=True) if isinstance(value, Tensor) else value
        return moved


def _ids(rows: list[Row]) -> list[str]:
    return [f"{row.source}:{row.id}" for row in rows]


def _mask(rows: list[Row], width: int, layout: BatchLayout) -> Tensor | None:
    if not width:
        return None
    lengths = torch.tensor([row.length for row in rows])
    mask = torch.arange(width)[None] < lengths[:, None]
    return mask.to(layout.leaves["input_ids"].device, non_blocking=True)


def _are_full(rows: list[Row], width: int) -> bool:
    """Whether each row has ``width`` tokens, and attention leaves none of them out."""
    masks = [row.content.get("attention_mask") for row in rows]
    return all(row.length == width for row in rows) and all(m is None or bool(torch.as_tensor(m).all()) for m in masks)


def _segments(layout: BatchLayout, rows: list[Row]) -> tuple[Tensor, Tensor, int, int]:
    """Of a packed batch with ``rows`` at its end: their token mask and positions ``[R, T]``, their start, all tokens."""
    ids = layout.leaves["input_ids"]
    start = ids.shape[1]
    lengths = torch.tensor([row.length for row in rows])
    starts = start + lengths.cumsum(0) - lengths
    offsets = torch.arange(int(lengths.max()))[None]
    mask = offsets < lengths[:, None]
    index = torch.where(mask, starts[:, None] + offsets, starts[:, None])
    return mask.to(ids.device), index.to(ids.device), start, start + int(lengths.sum())
