# SPDX-License-Identifier: Apache-2.0
"""Training steps from CUDA graphs: one launch for a block of the network, where its kernels are launched one by one else.

A step of a small model is thousands of small kernels, and launching them takes several times as long as running them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_cl.anatomy import CACHE_NAMES
from lightning_cl.strategies.blocks import find_shard_blocks, has_hooks_inside, is_prepared

#: Lengths are padded to multiples of it: a task's batches have a few lengths then, and each is captured once.
MULTIPLE = 64


class GraphedBlocks(pl.Callback):
    """Runs the blocks of a Llama-like network from CUDA graphs in training steps, with the same results up to rounding.

    Forward and backward passes are captured when a batch size and a padded length first come, all blocks at once, and
    again where other parameters train (a new adapter) or what has been captured no longer holds. What a graph cannot do
    runs as without it: passes without gradients, in evaluation or with a cache, a step's second pass (its activations
    would take the first one's place), checkpointed blocks, and blocks with hooks inside.

    Raises:
        MisconfigurationException: if gradients are accumulated over batches, or by hand: they lie in the graphs' memory,
            which the next batch writes again; if blocks get different masks or positions.

    Example:
        >>> trainer = pl.Trainer(callbacks=[GraphedBlocks()], accelerator="gpu", devices=1)  # doctest: +SKIP
    """

    def __init__(self) -> None:
        self._blocks: list[tuple[nn.Module, Callable[..., Tensor], Any]] = []
        self._hooks: list[dict[int, Callable[..., Any]]] = []
        self._tensors: list[Tensor] = []
        self._graphs: dict[Any, Graphs] = {}
        self._captured_for: list[tuple[int, int, bool]] = []
        self._current: Graphs | None = None
        self._shared: tuple[Any, ...] = ()
        self._is_first_pass = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        blocks = [pl_module.get_submodule(name) for name in find_shard_blocks(pl_module)]
        # Looked through in each step: the registers of thousands of layers, which stay the same objects.
        inner = [part for block in blocks for part in block.modules() if part is not block]
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        self._hooks = [getattr(part, kind) for part in inner for kind in kinds]
        self._tensors = [value for block in blocks for value in (*block.parameters(), *block.buffers())]
        self._blocks = [(block, block.forward, block.__dict__.get("forward")) for block in blocks]
        for index, block in enumerate(blocks):
            block.forward = partial(self._forward, index)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not pl_module.automatic_optimization or trainer.accumulate_grad_batches != 1:
            raise MisconfigurationException(
                "`GraphedBlocks` keeps gradients in memory that each batch writes again, so that accumulating them would"
                " lose some. Use automatic optimization and `accumulate_grad_batches=1`, or no graphs."
            )
        self._is_first_pass = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for block, _, own in self._blocks:
            if own is None:
                del block.forward
            else:
                block.forward = own
        self._blocks, self._hooks, self._tensors, self._shared = [], [], [], ()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    def _forward(self, index: int, hidden: Tensor, **arguments: Any) -> Tensor:
        shared = arguments.get("attention_mask"), arguments.get("position_embeddings")
        if index == 0:
            self._shared = shared
            self._current = self._choose(hidden, arguments)
        if self._current is None:
            return self._blocks[index][1](hidden, **arguments)
        if any(own is not first for own, first in zip(shared, self._shared, strict=True)):
            raise MisconfigurationException(
                "`GraphedBlocks` gives all blocks the first one's mask and positions, but this network's differ (some"
                " with sliding attention?). Train it without graphs."
            )
        return self._current(index, hidden)

    def _choose(self, hidden: Tensor, arguments: dict[str, Any]) -> Graphs | None:
        mask, positions = self._shared
        usual = (
            torch.is_grad_enabled()
            and self._is_first_pass
            and positions is not None
            and (mask is None or mask.dtype == torch.bool)
            and not any(arguments.get(name) is not None for name in CACHE_NAMES)
            and not any(is_prepared(block) for block, _, _ in self._blocks)
            and not self._has_hooks_inside()
        )
        if not usual:
            return None
        self._is_first_pass = False
        self._forget_what_has_changed()
        device = hidden.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        length = -(-hidden.shape[1] // MULTIPLE) * MULTIPLE
        training = tuple(block.training for block, _, _ in self._blocks)
        key = len(hidden), length, len(positions[0]), hidden.dtype, hidden.requires_grad, autocast, training
        if key not in self._graphs:
            known = next(iter(self._graphs.values()), None)
            pool = torch.cuda.graph_pool_handle() if known is None else known.pool  # no two are at work at a time
            calls = tuple(Call(block, forward, autocast) for block, forward, _ in self._blocks)
            self._graphs[key] = Graphs(calls, pad(hidden, length), context(hidden, mask, positions, length), pool)
        self._graphs[key].begin(hidden, mask, positions)
        return self._graphs[key]

    def _forget_what_has_changed(self) -> None:
        # A graph knows parameters by their addresses, and which of them train.
        found = [(id(value), value.data_ptr(), value.requires_grad) for value in self._tensors]
        if found != self._captured_for:
            self._captured_for = found
            if self._graphs:
                self._graphs.clear()
                gc.collect()  # torch ties them into cycles, and each holds memory of the device

    def _has_hooks_inside(self) -> bool:
        # This package tells of its own, some of which do nothing in training.
        hooks = (hook for registered in self._hooks if registered for hook in registered.values())
        foreign = any(not getattr(hook, "__module__", "").startswith("lightning_cl.") for hook in hooks)
        on_parameters = any(value._backward_hooks for value in self._tensors)
        return foreign or on_parameters or any(has_hooks_inside(block, training=True) for block, _, _ in self._blocks)


class Graphs:
    """The blocks' graphs for one batch size and one length.

    Args:
        calls: the blocks.
        hidden: the first block's input ``[B, T, D]``, padded.
        shared: what :func:`context` gave; it becomes the graphs' own.
        pool: memory that graphs share.
    """

    def __init__(self, calls: tuple[Call, ...], hidden: Tensor, shared: tuple[Tensor, ...], pool: Any) -> None:
        self.pool = pool
        self._shared, self._length, self._tokens = shared, hidden.shape[1], 0
        # Above frozen layers alone a block's input has no gradient.
        trained = [any(p.requires_grad for p in call.parameters()) for call in calls]
        gradients = [hidden.requires_grad or any(trained[:k]) for k in range(len(calls))]
        samples = tuple((torch.zeros_like(hidden, requires_grad=gradient), *shared) for gradient in gradients)
        with torch.autocast(hidden.device.type, enabled=False):  # what it keeps would not be there in the next pass
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
