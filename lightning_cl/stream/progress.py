# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint keeps of a stream, and how a run takes it up again."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cl.distributed import gather_objects, rank
from lightning_cl.stream import csv_log
from lightning_cl.stream.files import peek
from lightning_cl.stream.loader import Position

if TYPE_CHECKING:
    from lightning_cl.stream.task_stream import TaskStream

VERSION = 1


def save(stream: TaskStream) -> dict[str, Any]:
    """The stream's state in plain types and tensors; called on all processes."""
    state: dict[str, Any] = {
        "version": VERSION,
        "current_index": stream.current_index,
        "stage": stream.stage,
        "seed": stream.seed,
        "run_id": stream.run_id,
        "tasks": stream.fingerprints(),
        "cells": [[stage, task, dict(cell)] for (stage, task), cell in stream.cells.items()],
        "missing": [[stage, task, reason] for (stage, task), reason in stream.missing.items()],
        "stop_reason": stream.stop_reason,
        "best_loaded": stream.best_loaded,
        "rng": gather_objects(random_state()),
    }
    trainer = stream.trainer
    if trainer is not None:
        state["point"] = where(trainer)
        state["position"] = position(stream, trainer)
        state["should_stop"] = bool(trainer.should_stop)
        state["csv_rows"] = csv_log.keep(trainer)
        state["unlogged"] = unlogged(trainer)
        state["metrics"] = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if torch.as_tensor(value).numel() == 1
        }
    return state


def where(trainer: pl.Trainer) -> str:
    """At what point of the fit loop the Trainer stands.

    ``"epoch_end"``: no epoch is open; ``"epoch_start"``: one was just announced; ``"in_step"``: inside a training step;
    ``"batch_end"``: after a step, before what Lightning does once its hooks have run (validation, counting the step);
    ``"validation_end"``: after the validation that followed a step; ``"between"``: after all of that.
    """
    loop = trainer.fit_loop
    epoch: Any = loop.epoch_progress.current
    batch: Any = loop.epoch_loop.batch_progress.current
    if trainer.validating:
        evaluated = loop.epoch_loop.val_loop.batch_progress
        whole = evaluated.is_last_batch and evaluated.current.ready == evaluated.current.completed
        return "validation_end" if whole else "batch_end"
    if epoch.processed == epoch.ready:
        return "epoch_end"
    if epoch.started < epoch.ready:
        return "epoch_start"
    if batch.ready > batch.processed:
        return "in_step"
    return "batch_end" if batch.processed > batch.completed else "between"


def unlogged(trainer: pl.Trainer) -> dict[str, int | float]:
    """What Lightning is about to log of the step or the epoch that has just ended, once its hooks have run."""
    loop, connector = trainer.fit_loop, trainer._logger_connector
    epoch: Any = loop.epoch_progress.current
    if where(trainer) == "batch_end" and not trainer.validating:
        due = connector.should_update_logs and not loop._should_accumulate()
    else:
        due = trainer.training and epoch.completed < epoch.processed == epoch.ready
    if not due or trainer._results is None:
        return {}
    values: dict[str, int | float] = {name: float(value) for name, value in connector.metrics["log"].items()}
    if values and "step" not in values:
        # Lightning adds it, and on resuming an epoch's end it counts that epoch already.
        values.setdefault("epoch", trainer.current_epoch)
    return values


def log_unlogged(trainer: pl.Trainer, resume: Resume) -> None:
    """Log it in the run that takes up from there, at its own step."""
    if not resume.unlogged:
        return
    values = {
        name: torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
        for name, value in resume.unlogged.items()
    }
    loop = trainer.fit_loop.epoch_loop
    # Lightning logs an epoch's metrics at its last step.
    back = resume.point == "epoch_end"
    loop._batches_that_stepped -= back
    trainer._logger_connector.log_metrics(values)
    loop._batches_that_stepped += back


def position(stream: TaskStream, trainer: pl.Trainer) -> Position:
    """The current task's epoch, and how many of its batches were trained (not fetched)."""
    loop = trainer.fit_loop
    epoch, batch = (cast(Any, p.current) for p in (loop.epoch_progress, loop.epoch_loop.batch_progress))
    loader = stream.train_loader
    if loader is None or where(trainer) in ("epoch_end", "epoch_start"):
        return {"epoch": epoch.processed, "batches": 0, "rows": 0}
    return loader.position(batch.processed)


class Resume:
    """A checkpoint's state on its way back into a running fit.

    Args:
        state: what :func:`save` returned.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.point: str = state.get("point", "epoch_end")
        self.position: Position = dict(state.get("position") or {"epoch": 0, "batches": 0, "rows": 0})
        self.should_stop: bool = bool(state.get("should_stop"))
        self.metrics: dict[str, float] = dict(state.get("metrics", {}))
        self.unlogged: dict[str, int | float] = dict(state.get("unlogged", {}))
        self._rng: list[dict[str, Any]] | None = list(state.get("rng", ())) or None

    @property
    def mid_epoch(self) -> bool:
        """Whether the checkpoint lies inside an epoch."""
        return self.point in ("batch_end", "validation_end", "between", "in_step")

    def restore_random_state(self) -> None:
        """Set the random generators as they were; the first call counts.

        With more processes than before, the new ones take over a state that no other has.
        """
        if self._rng is None:
            return
        states, self._rng = self._rng, None
        set_random_state(states[rank() % len(states)], offset=rank() // len(states))


def adopt(stream: TaskStream, state: Mapping[str, Any]) -> None:
    """Put the stream where the state stood.

    Raises:
        MisconfigurationException: if the state is of another stream, or of a later version of this package.
    """
    if state.get("version") != VERSION:
        raise MisconfigurationException(
            f"The checkpoint holds a stream's state of version {state.get('version')!r}; this version of lightning_cl reads"
            f" version {VERSION}. Resume with the version that wrote it."
        )
    stream.check_same_tasks(state["tasks"], state["current_index"])
    stream.current_index = state["current_index"]
    stream.stage = state["stage"]
    stream.seed = state["seed"]
    stream.run_id = state["run_id"]
    known = {task.name for task in stream.tasks}
    stream.cells = {(stage, task): dict(cell) for stage, task, cell in state["cells"] if task in known}
    stream.missing = {(stage, task): reason for stage, task, reason in state["missing"] if task in known}
    stream.stop_reason = state["stop_reason"]
    stream.best_loaded = state["best_loaded"]
    stream.resume = Resume(state)


def restore(stream: TaskStream, state: Mapping[str, Any]) -> None:
    """Take a checkpoint's state, whether or not :func:`adopt` has seen it before the fit began."""
    if stream.resume is not None:
        return
    adopt(stream, state)
    trainer = stream.trainer
    if trainer is not None and trainer.fit_loop._combined_loader is not None:
        # `configure_optimizers` has asked for the number of steps, and the loader made for it stands at the beginning.
        trainer.fit_loop._combined_loader = None


def adopt_before_plain_fit(stream: TaskStream, trainer: pl.Trainer) -> None:
    """For ``trainer.fit(ckpt_path=...)`` without ``fit_stream``: know the task before callbacks prepare for it."""
    state = peek(trainer.ckpt_path).get(type(stream).__qualname__)
    if state is not None:
        adopt(stream, state)


def random_state() -> dict[str, Any]:
    """This process's random generators: torch (CPU and GPUs), NumPy and Python."""
    name, keys, place, has_gauss, gauss = np.random.get_state()
    version, internal, normal = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": list(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else [],
        "numpy": [
            str(name),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(place),
            int(has_gauss),
            float(gauss),
        ],
        "python": [version, list(internal), normal],
    }


def set_random_state(state: Mapping[str, Any], offset: int = 0) -> None:
    """Set the generators; ``offset`` tells processes apart that share one saved state."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([entry.cpu() for entry in state["cuda"]])
    name, keys, place, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), place, has_gauss, gauss))
    version, internal, normal = state["python"]
    random.setstate((version, tuple(internal), normal))
    if offset:
        torch.manual_seed(torch.initial_seed() + offset)
        np.random.seed((int(np.random.randint(2**31)) + offset) % 2**32)
        random.seed(random.getrandbits(64) + offset)
