# SPDX-License-Identifier: Apache-2.0
"""What the ranks tell each other on the CPU: sums, objects, and errors that all of them raise."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException

# One gloo group per default group, so that a decision in the training loop never waits for the accelerator's queue.
_groups: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def world_size() -> int:
    """Number of processes of the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's index in the run."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def cpu_group() -> Any:
    """A group of all ranks that carries CPU tensors. Created on first use, which must therefore be on all ranks."""
    default = dist.group.WORLD
    if "gloo" in dist.get_backend(default) or "mpi" in dist.get_backend(default):
        # Not kept here: a group that outlives `destroy_process_group` aborts the process when the interpreter ends.
        return default
    if default not in _groups:
        _groups[default] = dist.new_group(backend="gloo")
    return _groups[default]


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Each value summed over the ranks."""
    if world_size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total, group=cpu_group())
    return total.tolist()


def gather_objects(value: Any) -> list[Any]:
    """Every rank's ``value``, in order of rank, on all ranks."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value, group=cpu_group())
    return gathered


def raise_together(error: Exception | None) -> None:
    """Raise on every rank if any rank has an error, so that none waits for another in a collective call.

    The error of the lowest rank that has one is raised everywhere; the other ranks' messages are added to it.
    """
    if world_size() == 1:
        if error is not None:
            raise error
        return
    found = gather_objects(None if error is None else (type(error).__name__, str(error)))
    messages = {r: entry for r, entry in enumerate(found) if entry is not None}
    if not messages:
        return
    if error is not None and len({text for _, text in messages.values()}) == 1:
        raise error
    text = "; ".join(f"rank {r}: {name}: {message}" for r, (name, message) in messages.items())
    # A wrong setting is the same kind of error on the ranks that could not see it.
    if {name for name, _ in messages.values()} == {MisconfigurationException.__name__}:
        raise MisconfigurationException(text) from error
    raise (type(error)(text) if error is not None else RuntimeError(text)) from error
