# SPDX-License-Identifier: Apache-2.0
"""Train on every task of a stream in turn, with one Trainer."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_cl.stream import csv_log, files, progress
from lightning_cl.stream.boundary import TaskBoundary, begin_task
from lightning_cl.stream.scores import find_monitor, read_scores
from lightning_cl.stream.task import Task
from lightning_cl.stream.task_stream import TaskStream

if TYPE_CHECKING:
    from lightning_cl.metrics import TaskMatrix


def fit_stream(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    stream: TaskStream,
    ckpt_path: str | os.PathLike[str] | None = None,
    optimizer_reset: bool = True,
    task_end_weights: Literal["last", "best"] = "last",
) -> TaskMatrix:
    """Train on each task in turn and evaluate all of them before the first and after each.

    The Trainer's ``max_epochs`` and ``max_steps`` hold for each task. Between tasks epochs, steps, optimizer, schedule,
    and the scores of EarlyStopping and ModelCheckpoint start anew; logger steps go on. In callbacks that monitor a
    metric of the validation, its bare name is the current task's. Checkpoints go to ``task_K_NAME/`` in the run's folder
    (the logger's, else ``default_root_dir``) or in ModelCheckpoint's ``dirpath``; where the Trainer checkpoints at all,
    ``task_end.ckpt`` is written at the end of each task, and the scores of its row of the matrix beside it.

    The rows of the matrix are evaluated by ``trainer.test``, tasks without test rows by ``trainer.validate``; a module
    without ``test_step`` has its test rows evaluated by ``validation_step``. A task's score is the ForgettingMonitor's
    metric, else the task's own, else the only metric logged for it; else the cell stays empty, with its reason in
    ``stream.missing``.

    A run that was killed goes on from any of its checkpoints as if nothing had happened (bit for bit on the CPU with
    the same number of processes): the files of ForgettingMonitor and of a CSVLogger with the same folder are set back
    to the checkpoint. Loggers that only append may repeat steps; means that Lightning logs of an epoch begin anew where the
    epoch is taken up; and a checkpoint written by an exception inside a step begins that step anew.

    Args:
        trainer: any Trainer whose strategy keeps its processes (not ``ddp_spawn`` and the like).
        model: any LightningModule.
        stream: the tasks.
        ckpt_path: a checkpoint of this stream; ``"last"`` finds the run's furthest whole one (with none there yet it
            warns and starts from the beginning).
        optimizer_reset: False carries optimizer and schedule over from task to task.
        task_end_weights: ``"best"`` ends each task with the weights of ModelCheckpoint's best score, not the last ones.

    Returns:
        The task matrix. On a stream that is already finished nothing is trained: model and callbacks are restored (a
        ForgettingMonitor sees the last row evaluated once more), and the matrix is returned.

    Raises:
        MisconfigurationException: before training, for whatever cannot work; see :class:`TaskStream` and :class:`Task`.

    Example:
        >>> import lightning.pytorch as pl  # doctest: +SKIP
        >>> trainer = pl.Trainer(max_epochs=1)  # doctest: +SKIP
        >>> matrix = fit_stream(trainer, model, TaskStream(tasks, batch_size=8))  # doctest: +SKIP
        >>> matrix.compute()["backward_transfer"]  # doctest: +SKIP
    """
    return _Run(trainer, model, stream, optimizer_reset, task_end_weights).run(ckpt_path)


class _Run:
    def __init__(
        self,
        trainer: pl.Trainer,
        model: pl.LightningModule,
        stream: TaskStream,
        optimizer_reset: bool,
        task_end_weights: str,
    ) -> None:
        self._trainer: Any = trainer  # Lightning declares many of its attributes nowhere
        self._model = model
        self._stream = stream
        self._key = type(stream).__qualname__
        self._boundary = TaskBoundary(
            stream,
            saves=bool(trainer.checkpoint_callbacks) and not getattr(trainer, "fast_dev_run", False),
            optimizer_reset=optimizer_reset,
            task_end_weights=task_end_weights,
        )
        _check_arguments(trainer, stream, task_end_weights)

    def run(self, ckpt_path: str | os.PathLike[str] | None) -> TaskMatrix:
        stream, trainer = self._stream, self._trainer
        try:
            stream.sources()
        except Exception as error:
            if trainer.world_size == 1:
                raise
            stream.early_error = error  # raised by `setup`, on all processes together
        path = None if stream.early_error else self._resume(ckpt_path)
        if path is None:
            stream.restart(run_id=uuid.uuid4().hex)
        last = len(stream.train_tasks) - 1
        if path is not None and stream.current_index == last and find_monitor(trainer) is None:
            # Elsewhere the row is evaluated again: callbacks that read it were saved before it was known.
            self._read_row(path)
            if not self._unscored(last):
                rank_zero_info(f"The stream of {last + 1} tasks is finished; its end is restored from {path}.")
        finished = path is not None and path.name == files.TASK_END and stream.current_index == last
        if ckpt_path not in (None, "last") and not finished:
            # From here on it is another run, which "last" must tell from what stands in the folder already.
            stream.run_id = uuid.uuid4().hex
        with self._in_charge():
            if path is None:
                self._evaluate(-1)
            while True:
                self._fit(path)
                path = None
                self._evaluate(stream.current_index)
                if stream.current_index == last or stream.stop_reason is not None:
                    break
                stream.current_index += 1
            for callback in list(trainer.callbacks):
                if hasattr(callback, "on_stream_end"):
                    callback.on_stream_end(trainer, self._model)
        if stream.stop_reason is not None:
            rank_zero_warn(
                f"The stream ends after task {stream.current_task.name!r} ({stream.current_index + 1} of {last + 1}):"
                f" {stream.stop_reason}"
            )
        return stream.matrix()

    def _resume(self, ckpt_path: str | os.PathLike[str] | None) -> Path | None:
        """The checkpoint to go on from, its state adopted by the stream."""
        trainer = self._trainer
        requeued = trainer._checkpoint_connector._hpc_resume_path if SLURMEnvironment.detect() else None
        if ckpt_path is None and requeued is None:
            return None
        path: Path | None
        if ckpt_path is None or ckpt_path == "last":
            path = files.find_last(trainer, self._key, [Path(requeued)] if requeued else [])
            if path is None:
                rank_zero_warn(
                    f'`ckpt_path="last"`: there is no checkpoint of this stream in {files.run_folder(trainer)} yet, so it'
                    " starts from the beginning."
                )
                return None
        else:
            path = Path(ckpt_path)
            problem = files.damage(path)
            if problem is not None:
                raise MisconfigurationException(
                    f'The checkpoint {path} cannot be resumed: {problem}. Give another one, or `ckpt_path="last"`, which'
                    " takes the furthest whole one."
                )
        state = files.peek(path).get(self._key)
        if state is None:
            raise MisconfigurationException(
                f"The checkpoint {path} holds no state of a `{self._key}`: `fit_stream` did not write it, or another class"
                " did. To start from its weights, load them into the module and leave `ckpt_path` out."
            )
        progress.adopt(self._stream, state)
        self._boundary.csv_rows = csv_log.read(trainer, state.get("csv_rows", []))
        return path

    def _fit(self, path: Path | None) -> None:
        trainer, stream = self._trainer, self._stream
        if path is None:
            begin_task(trainer)
            stream.resume, stream.best_loaded = None, ""
        sanity, validated = trainer.num_sanity_val_steps, trainer.limit_val_batches
        if not stream.loader_tasks("val"):
            trainer.limit_val_batches = 0  # no task has such rows
        if stream.current_index > 0:
            trainer.num_sanity_val_steps = 0  # the module's evaluation has run, in the first row of the matrix
        self._boundary.path = path
        try:
            # `files.damage` has read the checkpoint the same way: nothing in it is executed, whatever the strategy.
            trainer.fit(self._model, datamodule=stream, ckpt_path=path, weights_only=None if path is None else True)
        finally:
            trainer.num_sanity_val_steps, trainer.limit_val_batches = sanity, validated

    def _evaluate(self, stage: int) -> None:
        """One row of the matrix: every task that has no score of this stage yet."""
        trainer, stream = self._trainer, self._stream
        stream.stage = stage
        trainer.ckpt_path = None
        tasks = self._unscored(stage)
        tests, validates = (is_overridden(step, self._model) for step in ("test_step", "validation_step"))
        rows = [task for task in tasks if task.test is not None or task.val is not None]
        by_test = [task for task in rows if tests and task.test is not None]
        by_validation = [task for task in rows if validates and task not in by_test]
        # What the evaluation draws must not change the training that follows: a resume may have no need of it.
        with isolate_rng():
            for split, chosen, call in (("test", by_test, trainer.test), ("val", by_validation, trainer.validate)):
                if not chosen:
                    continue
                stream.row = {"test": [], "val": [], split: chosen}
                try:
                    logged = call(self._model, datamodule=stream, verbose=False)
                finally:
                    stream.row = None
                row_scores = getattr(self._model, "row_scores", None)
                read_scores(stream, stage, chosen, logged, find_monitor(trainer), row_scores)
                if trainer.received_sigterm:
                    raise SIGTERMException
        for task in self._unscored(stage):
            reason = "the task has neither `test` nor `val` rows"
            if task in rows:
                reason = "the module has no `test_step` and no `validation_step`"
            stream.missing[stage, task.name] = reason
        if stage == -1 and not stream.cells:
            _say_once_why_empty(stream)
        self._write_row(stage)

    def _unscored(self, stage: int) -> list[Task]:
        known = self._stream.cells.keys() | self._stream.missing.keys()
        return [task for task in self._stream.tasks if (stage, task.name) not in known]

    def _write_row(self, stage: int) -> None:
        """Keep a row beside the checkpoint of its task, which was written before the row was known."""
        folder, stream = self._boundary.folder, self._stream
        if folder is None or stage < 0 or not self._trainer.is_global_zero:
            return
        row = {
            "run_id": stream.run_id,
            "stage": stage,
            "cells": {task: cell for (at, task), cell in stream.cells.items() if at == stage},
            "missing": {task: reason for (at, task), reason in stream.missing.items() if at == stage},
        }
        try:
            files.write_json(folder / files.ROW, row)
        except OSError as error:
            rank_zero_warn(
                f"The scores after task {stage} could not be written to {folder / files.ROW} ({error.strerror or error})."
                " They are in memory and in the next checkpoint; a resume from this task's end evaluates them again."
            )

    def _read_row(self, path: Path) -> None:
        """The row that was evaluated after a task's end, if the checkpoint is that end's."""
        stream, file = self._stream, path.parent / files.ROW
        if path.name != files.TASK_END or not file.is_file():
            return
        try:
            row = json.loads(file.read_text())
            cells, missing = dict(row["cells"]), dict(row["missing"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            rank_zero_warn(f"{file} cannot be read ({type(error).__name__}); the tasks are evaluated again.")
            return
        if row["run_id"] != stream.run_id or row["stage"] != stream.current_index:
            return
        names = {task.name for task in stream.tasks}
        stream.cells.update({(row["stage"], task): cell for task, cell in cells.items() if task in names})
        stream.missing.update({(row["stage"], task): why for task, why in missing.items() if task in names})

    @contextmanager
    def _in_charge(self) -> Iterator[None]:
        """While it runs, the boundary is the first callback, and Lightning looks for no checkpoint of its own."""
        trainer, boundary = self._trainer, self._boundary
        connector = trainer._checkpoint_connector
        folders = [(c, c.dirpath) for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        trainer.callbacks.insert(0, boundary)
        # After a SLURM requeue Lightning would load the requeued checkpoint into every later fit and test.
        connector._parse_ckpt_path = lambda fn, path, **_: path
        boundary.roots = {id(callback): dirpath for callback, dirpath in folders}
        try:
            yield
        finally:
            trainer.callbacks.remove(boundary)
            del connector._parse_ckpt_path
            boundary.release()
            for callback, dirpath in folders:
                callback.dirpath = dirpath
            self._stream.resume = self._stream.epoch_hook = self._stream.row = None


def _say_once_why_empty(stream: TaskStream) -> None:
    reasons = sorted(set(stream.missing.values()))
    rank_zero_warn(f"The task matrix stays empty: {'; '.join(reasons)}.")


def _check_arguments(trainer: pl.Trainer, stream: TaskStream, task_end_weights: str) -> None:
    if not isinstance(stream, TaskStream):
        raise TypeError(
            f"`fit_stream` needs a `TaskStream`, found `{type(stream).__name__}`. Wrap the data as"
            " `TaskStream([Task(name, train=...), ...], batch_size=...)`, or use `trainer.fit` for a single task."
        )
    if task_end_weights not in ("last", "best"):
        raise MisconfigurationException(f"`task_end_weights={task_end_weights!r}`: use 'last' or 'best'.")
    monitors = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor]
    if task_end_weights == "best" and not monitors:
        raise MisconfigurationException(
            "`task_end_weights='best'` needs a best score, but no ModelCheckpoint of the Trainer monitors a metric. Add"
            " `ModelCheckpoint(monitor=...)`, or use `task_end_weights='last'`."
        )
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise MisconfigurationException(
            "The Trainer's strategy starts new processes for every fit and discards what they learnt about the stream. Use"
            " `strategy='ddp'` (or a launcher such as torchrun), whose processes stay."
        )
    if trainer.max_epochs == -1 and trainer.max_steps == -1:
        raise MisconfigurationException(
            "The Trainer has no limit (`max_epochs=-1`, `max_steps=-1`), so the first task would never end. Set one of"
            " them: it holds for each task."
        )
