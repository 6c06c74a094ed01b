# SPDX-License-Identifier: Apache-2.0
"""Packed 4-bit weights that FSDP2 gathers as integers, so that no kernel takes their bits for floating-point numbers."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

# Integers of the same size, by the dtype that the packed bytes are stored in.
_INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
_aten = torch.ops.aten
# Of these a packed weight gives another packed weight: what FSDP2 makes a shard with, and what moves it.
_KEEP = {
    _aten.detach.default,
    _aten.alias.default,
    _aten.view.default,
    _aten.as_strided.default,
    _aten.slice.Tensor,
    _aten.split.Tensor,
    _aten.clone.default,
    _aten.new_zeros.default,
    _aten.empty_like.default,
    _aten._to_copy.default,
    _aten._pin_memory.default,
}


def ordinary(weight: Tensor) -> Tensor:
    """The same memory as an ordinary tensor without a graph.

    Example:
        >>> type(ordinary(torch.zeros(2, 1).as_subclass(PackedWeight))) is Tensor
        True
    """
    with torch._C._DisableTorchDispatch():
        return weight.detach().as_subclass(Tensor)


class _Send:
    """Gives a shard as integers, padded to the length that all ranks send.

    FSDP2 counts the arguments of what it calls in each gather; Python takes a method's signature apart anew each time, but
    an object's own signature as it is.
    """

    __slots__ = ("_shard",)

    def __init__(self, shard: Tensor) -> None:
        self._shard = shard

    def __call__(
        self, mesh: Any, outer_size: torch.Size, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], None]:
        shard = ordinary(self._shard).view(_INTEGERS[self._shard.dtype])
        ranks = 1 if mesh is None else mesh.size()
        missing = -(-outer_size[0] // ranks) - shard.shape[0]
        return (F.pad(shard, (0, 0, 0, missing)) if missing else shard,), None

    __signature__ = inspect.signature(partial(__call__, None))  # type: ignore[arg-type]


class PackedWeight(Tensor):
    """A packed weight ``[N, 1]`` in a floating-point storage dtype, whose bits are codes and not numbers.

    FSDP2 copies the shards of a group into one buffer before it gathers them. On CUDA a copy of floating-point numbers may
    turn one NaN into another (bitsandbytes issue 1945): with torch 2.11 on an H100, 3,969 of 8,388,608 packed bytes were
    others after sharding, and the model was silently another one. A group with integers in it is copied byte by byte.

    The storage dtype stays the compute dtype, since FSDP2 converts and creates parameters by it; only what is gathered
    is seen as integers, through the two methods that FSDP2 looks for on a shard.

    Example:
        >>> weight = torch.tensor([[1.0], [float("nan")]], dtype=torch.bfloat16).as_subclass(PackedWeight)
        >>> (shard,), _ = weight.fsdp_pre_all_gather(None, weight.shape, (1, 1), None, None)
        >>> shard.dtype
        torch.int16
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Every operation is that of an ordinary tensor; its result stays packed where it still holds packed bits."""
        with torch._C._DisableTorchDispatch():
            out = func(*args, **(kwargs or {}))
            if func not in _KEEP:
                return out
            return tree_map_only(Tensor, lambda part: part.as_subclass(cls) if part.dtype in _INTEGERS else part, out)

    @property
    def fsdp_pre_all_gather(self) -> _Send:
        """What FSDP2 calls for this rank's part of a gather."""
        return _Send(self)

    def fsdp_post_all_gather(
        self, gathered: tuple[Tensor, ...], metadata: Any, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """The whole weight in its storage dtype, on the memory that was gathered into."""
        if out is not None:
            # FSDP2 gathers into the same memory each time, of which `out` is a view.
            return None
        return gathered[0].view(self.dtype), ()
