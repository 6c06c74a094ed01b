# SPDX-License-Identifier: Apache-2.0
"""Look into a checkpoint before Lightning restores it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_cl.strategies.files import load_file

if TYPE_CHECKING:
    import lightning.pytorch as pl


def pending_checkpoint(trainer: pl.Trainer) -> Any:
    """The checkpoint that the running ``trainer.fit`` is about to restore, or None.

    Until it restores, Lightning keeps the path only in an argument of ``Trainer._run``, which is where this reads it.
    """
    run = type(trainer)._run.__code__
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is run and frame.f_locals.get("self") is trainer:
            return frame.f_locals.get("ckpt_path")
        frame = frame.f_back
    return trainer.ckpt_path


def peek_callback_state(trainer: pl.Trainer, state_key: str) -> dict[str, Any] | None:
    """The state that the checkpoint about to be restored holds for one callback, or None.

    Lightning restores callbacks after ``setup``, but what a callback changes in the model before sharding (a new
    adapter for task 3) must follow the checkpoint. Tensors stay on disk.
    """
    pending = pending_checkpoint(trainer)
    if pending is None:
        return None
    path = Path(str(pending))
    if path.is_dir():
        # Lightning's sharded checkpoints keep everything but weights and optimizer in this file.
        path = path / "meta.pt"
    if not path.is_file():
        return None
    checkpoint = load_file(path)
    return checkpoint.get("callbacks", {}).get(state_key)
