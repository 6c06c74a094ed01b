# SPDX-License-Identifier: Apache-2.0
"""Losses of single tokens, with logits computed only where they are needed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_cl.anatomy import accepts, logit_transform
from lightning_cl.functional.token_cross_entropy import CHUNK_ELEMENTS, token_cross_entropy

IGNORE_INDEX = -100
# What a batch may hold besides the model's own inputs.
_NOT_INPUTS = frozenset(
    {"labels", "loss_weight", "metric", "reference", "reference_length", "row", "options", "option_ids", "option_mask"}
    | {"answer_index"}
)

# Models whose logits are, or are not, what `logit_transform` makes of their head's output.
_KNOWN_LOGITS: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_UNKNOWN_LOGITS: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass(frozen=True)
class Positions:
    """Some positions of a batch, as numbers: indexing by a mask makes the host wait for the device each time.

    Attributes:
        shape: ``(B, T)``.
        index: int64 ``[N]``, the positions in row-major order.
    """

    shape: torch.Size
    index: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> Positions:
        """Where a bool mask ``[B, T]`` is True."""
        return cls(mask.shape, mask.flatten().nonzero()[:, 0])

    def fits(self, values: Any) -> bool:
        """Whether ``values`` is ``[B, T, ...]``."""
        return isinstance(values, Tensor) and values.shape[:2] == self.shape

    def take(self, values: Tensor) -> Tensor:
        """``[N, ...]`` of ``[B, T, ...]``."""
        return values.flatten(0, 1).index_select(0, self.index)


@dataclass
class TokenTargets:
    """What each position of a batch has to predict.

    Attributes:
        positions: where the next token has a label.
        targets: int64 ``[N]``, the labels of these positions in row-major order.
        weights: float32 ``[N]``, their weights.
        rows: int64 ``[N]``, the row (of a packed batch: the segment) each belongs to.
        num_rows: number of rows (segments).
    """

    positions: Positions
    targets: Tensor
    weights: Tensor
    rows: Tensor
    num_rows: int

    def sum_by_row(self, values: Tensor) -> Tensor:
        """``[N]`` values summed for each row, ``[num_rows]``."""
        return values.new_zeros(self.num_rows).index_add(0, self.rows, values)


def token_targets(batch: Mapping[str, Any]) -> TokenTargets:
    """The targets of a batch's ``labels``, weighted by ``loss_weight`` where it is there.

    In a packed batch (``[1, T]`` with ``position_ids`` that start anew) each segment is a row, and a segment's first
    token is predicted by nothing.

    Args:
        batch: ``labels`` ``[B, T]``, and maybe ``loss_weight`` ``[B, T]`` and ``position_ids`` ``[B, T]``.

    Example:
        >>> targets = token_targets({"labels": torch.tensor([[-100, 7, 8], [-100, -100, -100]])})
        >>> targets.targets.tolist(), targets.rows.tolist()
        ([7, 8], [0, 0])
    """
    is_target, weights, number, num_rows = _dense(batch)
    own = Positions.of(is_target)
    before = Positions(own.shape, own.index - 1)  # in the same row, whose first token is no target
    return TokenTargets(before, own.take(batch["labels"]), own.take(weights), own.take(number), num_rows)


def row_weights(batch: Mapping[str, Any]) -> Tensor:
    """The summed weights of each row's targets, float32 ``[B]``."""
    _, weights, number, num_rows = _dense(batch)
    return weights.new_zeros(num_rows).index_add(0, number.flatten(), weights.flatten())


def _dense(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor, int]:
    """For each token whether it is a target, its weight (else 0) and its row's (segment's) number; how many rows."""
    labels = batch["labels"]
    is_target = labels != IGNORE_INDEX
    is_target[:, 0] = False
    number = torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)
    num_rows = len(labels)
    position_ids = batch.get("position_ids")
    if position_ids is not None and len(labels) == 1 and position_ids.shape == labels.shape:
        begins = position_ids == 0
        is_target &= ~begins
        number = (begins.long().cumsum(1) - 1).clamp_min(0)
        num_rows = max(int(begins.sum()), 1)
    given = batch.get("loss_weight")
    weights = torch.ones_like(labels, dtype=torch.float32) if given is None else given.float()
    return is_target, weights * is_target, number, num_rows


def token_losses(model: nn.Module, batch: Mapping[str, Any], targets: TokenTargets) -> Tensor:
    """Cross-entropy of each target, float32 ``[N]``; other positions never get logits.

    Args:
        model: a Hugging Face causal LM, with or without PEFT.
        batch: the model's inputs; keys that are not its inputs are left out.
        targets: of :func:`token_targets`, at least one.
    """
    inputs = model_inputs(batch)
    if accepts(model, "use_cache"):
        # A cache is of no use here, and with one the library does not tell the segments of a packed batch apart.
        inputs.setdefault("use_cache", False)
    head = _large_head(model, len(targets.targets))
    if head is not None:
        losses = _losses_in_chunks(model, head, inputs, targets)
        if losses is not None:
            return losses
    logits, _ = output_at(model, inputs, targets.positions)
    return F.cross_entropy(logits.float(), targets.targets, reduction="none")


def output_at(model: nn.Module, inputs: Mapping[str, Any], positions: Positions, **options: Any) -> tuple[Tensor, Any]:
    """The logits ``[N, V]`` of the positions, gradients and all, and the model's output.

    The model is called as a whole, so that sharding, adapters and what its family does to logits stay in place.
    """
    with _head_at(model, positions):
        output = model(**inputs, **options)
    logits = output.logits
    # A head that the hook did not reach (a compiled model, an unusual one) gave logits everywhere.
    return (positions.take(logits) if positions.fits(logits) else logits.flatten(0, 1)), output


def _large_head(model: Any, tokens: int) -> nn.Linear | None:
    """The head, if its logits at ``tokens`` positions are too many to hold at once and it can be applied in chunks."""
    head = None if _is_compiled(model) else model.get_output_embeddings()
    if type(head) is not nn.Linear or tokens * head.out_features <= CHUNK_ELEMENTS or model in _UNKNOWN_LOGITS:
        return None
    return head


def _losses_in_chunks(
    model: nn.Module, head: nn.Linear, inputs: Mapping[str, Any], targets: TokenTargets
) -> Tensor | None:
    """The losses, computed where the head is called (a sharded weight is whole there); None if that cannot be known."""
    transform = logit_transform(model)
    found: list[Tensor] = []

    def apply(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = args[0] if args and isinstance(args[0], Tensor) else None
        if hidden is None or not targets.positions.fits(hidden) or not _is_whole(head):
            return None
        states = targets.positions.take(hidden)
        found.append(token_cross_entropy(states, targets.targets, head.weight, head.bias, logit_transform=transform))
        if model not in _KNOWN_LOGITS:
            found.append(_transformed(F.linear(hidden[:1, :1], head.weight, head.bias).detach(), transform))
        # What the model goes on with is not used.
        return (hidden[:1, :1], *args[1:])

    handle = head.register_forward_pre_hook(apply)
    try:
        logits = model(**inputs).logits
    finally:
        handle.remove()
    if not found:
        return F.cross_entropy(targets.positions.take(logits).float(), targets.targets, reduction="none")
    if len(found) == 2:
        # A family may do to its logits what nobody here knows of: its own ones decide, once.
        known = torch.allclose(found[1], logits.detach().float(), rtol=0.02, atol=0.02)
        (_KNOWN_LOGITS if known else _UNKNOWN_LOGITS).add(model)
    return found[0] if model in _KNOWN_LOGITS else None


def _transformed(logits: Tensor, transform: Callable[[Tensor], Tensor] | None) -> Tensor:
    return logits.float() if transform is None else transform(logits.float())


def _is_whole(head: nn.Linear) -> bool:
    # A trained head that is a group of its own is gathered again only for its own output's backward pass.
    return type(head.weight) is nn.Parameter and not (head.weight.requires_grad and hasattr(head, "reshard"))


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a batch that the model reads."""
    return {key: value for key, value in batch.items() if key not in _NOT_INPUTS}


@contextmanager
def _head_at(model: Any, positions: Positions) -> Iterator[None]:
    head = None if _is_compiled(model) else model.get_output_embeddings()
    if head is None:
        yield
        return

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (positions.take(args[0]).unsqueeze(0), *args[1:]) if args and positions.fits(args[0]) else None

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def _is_compiled(model: Any) -> bool:
    # A compiled graph would be made anew for each number of labels.
    return hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None
