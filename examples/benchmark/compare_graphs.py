# SPDX-License-Identifier: Apache-2.0
"""Training steps from CUDA graphs: one launch for a block of the network, where its kernels are launched one by one else.

A step of a small model is thousands of small kernels, and launching them takes several times as long as running them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_cl.anatomy import CACHE_NAMES
from lightning_cl.strategies.blocks import find_shard_blocks, has_hooks_inside

#: Lengths are padded to multiples of it: a task's batches have a few lengths then, and each is captured once.
MULTIPLE = 64


class GraphedBlocks(pl.Callback):
    """Runs the blocks of a Llama-like network from CUDA graphs in training steps, with the same results up to rounding.

    Forward and backward passes are captured when a batch size and a padded length first come, all blocks at once, and
    again after a task that left other parameters (a new adapter). What a graph cannot do runs as without it: passes
    without gradients, in evaluation or with a cache, a step's second pass (its activations would take the first one's
    place), and blocks with hooks inside.

    Raises:
        MisconfigurationException: if gradients are to be accumulated over batches: they lie in the graphs' memory, which
            the next batch writes again.

    Example:
        >>> trainer = pl.Trainer(callbacks=[GraphedBlocks()], accelerator="gpu", devices=1)  # doctest: +SKIP
    """

    def __init__(self) -> None:
        self._blocks: list[tuple[nn.Module, Callable[..., Tensor], Any]] = []
        self._graphs: dict[tuple[int, ...], Graphs] = {}
        self._captured_for: list[tuple[int, int, bool]] = []
        self._parts: list[nn.Module] = []
        self._current: Graphs | None = None
        self._is_first_pass = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.accumulate_grad_batches != 1:
            raise MisconfigurationException(
                f"`GraphedBlocks` keeps gradients in memory that each batch writes again, so that"
                f" `accumulate_grad_batches={trainer.accumulate_grad_batches}` would lose them. Use 1, or no graphs."
            )
        blocks = [pl_module.get_submodule(name) for name in find_shard_blocks(pl_module)]
        # A graph knows its parameters by their addresses.
        parameters = [(id(p), p.data_ptr(), p.requires_grad) for block in blocks for p in block.parameters()]
        if parameters != self._captured_for:
            self._graphs.clear()
            self._captured_for = parameters
        self._parts = [part for block in blocks for part in block.modules() if part is not block]
        self._blocks = [(block, block.forward, block.__dict__.get("forward")) for block in blocks]
        for index, block in enumerate(blocks):
            block.forward = partial(self._forward, index)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._is_first_pass = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for block, _, own in self._blocks:
            if own is None:
                del block.forward
            else:
                block.forward = own
        self._blocks = []

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    def _forward(self, index: int, hidden: Tensor, **arguments: Any) -> Tensor:
        if index == 0:
            self._current = self._choose(hidden, arguments)
        if self._current is None:
            return self._blocks[index][1](hidden, **arguments)
        return self._current(index, hidden)

    def _choose(self, hidden: Tensor, arguments: dict[str, Any]) -> Graphs | None:
        mask, positions = arguments.get("attention_mask"), arguments.get("position_embeddings")
        usual = (
            torch.is_grad_enabled()
            and self._is_first_pass
            and positions is not None
            and (mask is None or mask.dtype == torch.bool)
            and not any(arguments.get(name) is not None for name in CACHE_NAMES)
            and self._blocks[-1][0].training  # the first may be frozen, under a router
            and not self._has_hooks_inside()
        )
        if not usual:
            return None
        self._is_first_pass = False
        rows, tokens = hidden.shape[:2]
        length = -(-tokens // MULTIPLE) * MULTIPLE
        key = rows, length, len(positions[0]), *(block.training for block, _, _ in self._blocks)
        if key not in self._graphs:
            known = next(iter(self._graphs.values()), None)
            pool = torch.cuda.graph_pool_handle() if known is None else known.pool  # no two are at work at a time
            forwards = [(block, forward) for block, forward, _ in self._blocks]
            self._graphs[key] = Graphs(forwards, pad(hidden, length), context(hidden, mask, positions, length), pool)
        self._graphs[key].begin(hidden, mask, positions)
        return self._graphs[key]

    def _has_hooks_inside(self) -> bool:
        # This package tells of its own, some of which do nothing in training.
        hooks = (
            hook
            for part in self._parts
            for known in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks)
            for hook in known.values()
        )
        foreign = any(not getattr(hook, "__module__", "").startswith("lightning_cl.") for hook in hooks)
        return foreign or any(has_hooks_inside(block, training=True) for block, _, _ in self._blocks)


class Graphs:
    """The blocks' graphs for one batch size and one length.

    Args:
        forwards: each block with its own ``forward``.
        hidden: the first block's input ``[B, T, D]``, padded.
        shared: what :func:`context` gave; it becomes the graphs' own.
        pool: memory that graphs share.
    """

    def __init__(
        self,
        forwards: list[tuple[nn.Module, Callable[..., Tensor]]],
        hidden: Tensor,
        shared: tuple[Tensor, ...],
        pool: Any,
    ) -> None:
        self.pool = pool
        self._shared, self._length, self._tokens = shared, hidden.shape[1], 0
        # Above frozen layers alone a block's input has no gradient.
        trained = [any(p.requires_grad for p in block.parameters()) for block, _ in forwards]
        gradients = [hidden.requires_grad or any(trained[:k]) for k in range(len(forwards))]
        samples = tuple((torch.zeros_like(hidden, requires_grad=gradient), *shared) for gradient in gradients)
        device = hidden.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        calls = tuple(Call(block, forward, autocast) for block, forward in forwards)
        with torch.autocast(device, enabled=False):  # what it keeps of one pass would not be there in the next
            self._calls = torch.cuda.make_graphed_callables(calls, samples, num_warmup_iters=1, pool=pool)

    def begin(self, hidden: Tensor, mask: Tensor | None, positions: tuple[Tensor, Tensor]) -> None:
        """A pass begins: what all blocks share goes to where their graphs read it."""
        self._tokens = hidden.shape[1]
        for own, value in zip(self._shared, context(hidden, mask, positions, self._length), strict=True):
            own.copy_(value)

    def __call__(self, index: int, hidden: Tensor) -> Tensor:
        """A block's output ``[B, T, D]``."""
        return self._calls[index](pad(hidden, self._length), *self._shared)[:, : self._tokens]


class Call(nn.Module):
    """A block as a graph needs it: tensors alone, and autocast that remembers nothing."""

    def __init__(self, block: nn.Module, forward: Callable[..., Tensor], autocast: torch.dtype | None) -> None:
        super().__init__()
        self.block = block
        self._forward = forward
        self._autocast = autocast

    def forward(self, hidden: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The block's output ``[B, T, D]``."""
        enabled = self._autocast is not None
        with torch.autocast(hidden.device.type, self._autocast, enabled=enabled, cache_enabled=False):
            return self._forward(hidden, attention_mask=mask, position_embeddings=(cos, sin), use_cache=False)


def pad(values: Tensor, length: int) -> Tensor:
    """``[B, T, D]`` with zeros after the tokens, as long as asked for."""
    extra = length - values.shape[1]
    return F.pad(values, (0, 0, 0, extra)) if extra else values


def context(
    hidden: Tensor, mask: Tensor | None, positions: tuple[Tensor, Tensor], length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What a block takes beside its input, for an input that is padded with tokens that no other token sees.

    Args:
        hidden: ``[B, T, D]``, not padded.
        mask: ``[B, 1, T, T]``, true where a token sees another; None: all before it and itself.
        positions: cosines and sines, ``[1 or B, T, d]`` each.
        length: tokens afterwards.

    Returns:
        Mask, cosines and sines.
    """
    rows, tokens = hidden.shape[:2]
    wide = torch.zeros(rows, 1, length, length, dtype=torch.bool, device=hidden.device)
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=hidden.device).tril() if mask is None else mask
    wide[:, :, :tokens, :tokens] = seen
    wide[:, :, tokens:, 0] = True  # the softmax over nothing is not a number
    cos, sin = positions
    return wide, pad(cos, length), pad(sin, length)
