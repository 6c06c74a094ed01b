# SPDX-License-Identifier: Apache-2.0
"""The boundary between tasks inside one Trainer: what is set back, what is saved, and how a resume takes it up."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from typing_extensions import override

from lightning_cl import rank_watch
from lightning_cl.distributed import gather_objects, world_size
from lightning_cl.stream import csv_log, files, progress
from lightning_cl.stream.signals import AgreedSignals

if TYPE_CHECKING:
    from lightning_cl.stream.task_stream import TaskStream


class TaskBoundary(Callback):
    """Stands first in the Trainer's callbacks while :func:`~lightning_cl.fit_stream` runs.

    It saves at a task's end before any callback has acted on it, so a resume from there runs their ``on_train_end`` as
    the unbroken run did; and it leads Lightning's loops back to the point of the checkpoint, where Lightning itself
    would skip a validation, count a step twice, or train beyond an early stop.

    Args:
        stream: the stream.
        saves: whether checkpoints are written at all.
        optimizer_reset: whether a new task begins with a new optimizer and schedule.
        task_end_weights: ``"last"`` or ``"best"``.
    """

    def __init__(self, stream: TaskStream, saves: bool, optimizer_reset: bool, task_end_weights: str) -> None:
        self._stream = stream
        self._saves = saves
        self._optimizer_reset = optimizer_reset
        self._task_end_weights = task_end_weights
        #: The current task's folder, None where nothing is saved.
        self.folder: Path | None = None
        #: Optimizer and schedule at the end of the task before, with ``optimizer_reset=False``.
        self.optimizers: list[dict[str, Any]] = []
        self.schedulers: list[dict[str, Any]] = []
        #: The folder each ModelCheckpoint was given, by its id.
        self.roots: dict[int, Any] = {}
        #: The checkpoint that the coming fit resumes.
        self.path: Path | None = None
        #: What the CSV loggers had written when that checkpoint was.
        self.csv_rows: list[list[dict[str, str]]] = []
        self._limits: tuple[int | None, int] | None = None
        self._lock: files.RunLock | None = None
        self._signals = AgreedSignals()
        self._looked_into_checkpoint = False

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Agree on the run's folder, take it, and point the checkpoints to the task's."""
        stream = self._stream
        rank_watch.start(trainer)
        self._signals.take_over(trainer)
        if world_size() > 1:
            stream.run_id = trainer.strategy.broadcast(stream.run_id)
            _check_agreement(f"{self.path}, task {stream.current_index}")
        rows, self.csv_rows = self.csv_rows, []
        csv_log.put_back(trainer, rows)
        if not self._saves:
            return
        root = trainer.strategy.broadcast(str(self._root(trainer)))
        problem = ""
        if self._lock is None:
            self._lock = files.RunLock(Path(root))
            if trainer.is_global_zero:
                try:
                    files.check_writable(Path(root))
                    self._lock.acquire()
                    files.note_run(Path(root), stream.run_id)
                except (MisconfigurationException, OSError) as error:
                    problem = str(error)
            problem = trainer.strategy.broadcast(problem)
            if problem:
                raise MisconfigurationException(problem)
        task = files.task_folder(stream.current_index, stream.current_task.name)
        self.folder = Path(root, task)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and stage == "fit":
                callback.dirpath = str(Path(self.roots.get(id(callback)) or root, task))

    def release(self) -> None:
        """Give the run's folder and the Trainer's signals back."""
        self._signals.give_back()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _root(self, trainer: pl.Trainer) -> Path:
        given = [root for root in self.roots.values() if root]
        return Path(given[0]) if given else files.run_folder(trainer)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say at the first checkpoint, and not at the resume, that there is something in it that cannot be read back."""
        if not self._looked_into_checkpoint:
            self._looked_into_checkpoint = True
            files.warn_of_unreadable(trainer, checkpoint)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Give Lightning's loops a state that they take up exactly."""
        resume = self._stream.resume
        if resume is None:
            return
        loops = checkpoint["loops"]["fit_loop"]
        loops["state_dict"].pop("combined_loader", None)  # the stream's own state says where its loader stands
        batch = loops["epoch_loop.batch_progress"]
        for counts in (batch["total"], batch["current"]):
            if resume.point == "batch_end":
                counts["completed"] = counts["processed"]
            elif resume.point == "in_step":
                for name in ("ready", "started", "completed"):
                    counts[name] = counts["processed"]
        if resume.point == "in_step":
            batch["is_last_batch"] = False
        evaluated = loops["epoch_loop.val_loop.batch_progress"]
        for counts in (evaluated["total"], evaluated["current"]):
            counts.update(dict.fromkeys(counts, 0))
        for callback in trainer.checkpoint_callbacks:
            saved = checkpoint.get("callbacks", {}).get(callback.state_key)
            if isinstance(callback, ModelCheckpoint) and saved is not None:
                # In another folder Lightning would forget the best score, and the next checkpoint would be "best".
                saved["dirpath"] = callback.dirpath

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """With its limits lifted, a fit that has only its end left runs the hooks of that end."""
        if self._stream.resume is not None:
            self._lift_limits(trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lead the loops to the checkpoint's point, or carry the optimizer over from the task before."""
        resume = self._stream.resume
        if resume is None:
            for optimizer, state in zip(trainer.optimizers, self.optimizers, strict=False):
                optimizer.load_state_dict(state)
            for config, state in zip(trainer.lr_scheduler_configs, self.schedulers, strict=False):
                config.scheduler.load_state_dict(state)
            return
        metrics = {name: torch.tensor(value) for name, value in resume.metrics.items()}
        trainer._logger_connector._callback_metrics.update(metrics)
        progress.log_unlogged(trainer, resume)
        if not resume.mid_epoch:
            self._end_lift(trainer)
            return
        loop = trainer.fit_loop.epoch_loop
        trainer.should_stop = resume.should_stop
        due = loop._should_check_val_fx(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]
        trainer.should_stop = False
        stepped = not loop._should_accumulate()
        # A loop whose validation "has run" does not ask for a batch beyond the last.
        loop.val_loop._has_run = not due
        if resume.point == "batch_end" and due:
            loop.val_loop._restart_stage = "restarted_mid_evaluation"
        elif resume.point in ("batch_end", "validation_end") and not due:
            loop.update_lr_schedulers("step", update_plateau_schedulers=True)
            loop._batches_that_stepped += stepped
        elif resume.point in ("between", "in_step") and due:
            loop._batches_that_stepped -= stepped  # Lightning counts the step once more on its way
        # The rest of the epoch's end must run even where a limit is reached, so the limits come back inside the epoch.
        self._stream.epoch_hook = lambda: self._end_lift(trainer)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Act on a scheduler's signal, on all processes together."""
        self._signals.agree()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Offer the current task's metrics under their bare names, for EarlyStopping, ModelCheckpoint and plateaus."""
        tasks = [task.name for task in self._stream.loader_tasks("val")]
        current = self._stream.current_task.name
        if trainer.sanity_checking or len(tasks) < 2 or current not in tasks:
            return
        suffix = f"/dataloader_idx_{tasks.index(current)}"
        metrics = trainer.callback_metrics
        for name in [name for name in metrics if name.endswith(suffix)]:
            metrics[name.removesuffix(suffix)] = metrics[name]

    @override
    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Keep the mean over the processes exact."""
        _count_rows_in_float(trainer)
        self._signals.agree()

    @override
    def on_test_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Keep the mean over the processes exact."""
        _count_rows_in_float(trainer)
        self._signals.agree()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Load the best weights if they end the task, then save."""
        stream = self._stream
        stream.epoch_hook = None
        if stream.resume is not None:
            stream.resume.restore_random_state()
            stream.resume = None
        if self._task_end_weights == "best":
            self._load_best(trainer, pl_module)
        if not self._optimizer_reset:
            self.optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]
            self.schedulers = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
        if self.folder is not None:
            trainer.save_checkpoint(self.folder / files.TASK_END)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """On SIGTERM, save before anything is taken apart; tell the other processes of an error."""
        rank_watch.failed(trainer, exception)
        self._end_lift(trainer)
        self._stream.epoch_hook = None
        if isinstance(exception, SIGTERMException) and self.folder is not None and trainer.training:
            trainer.save_checkpoint(self.folder / files.INTERRUPTED)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The other processes need not be watched between two fits."""
        rank_watch.stop(trainer)

    def _lift_limits(self, trainer: pl.Trainer) -> None:
        if self._limits is None:
            loop = trainer.fit_loop
            self._limits = loop.max_epochs, loop.epoch_loop.max_steps
            loop.max_epochs, loop.epoch_loop.max_steps = -1, -1

    def _end_lift(self, trainer: pl.Trainer) -> None:
        if self._limits is not None:
            loop = trainer.fit_loop
            loop.max_epochs, loop.epoch_loop.max_steps = self._limits
            self._limits = None
            resume = self._stream.resume
            trainer.should_stop = trainer.should_stop or (resume is not None and resume.should_stop)

    def _load_best(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        callback = next(c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor)
        best = callback.best_model_path
        if not best or best == self._stream.best_loaded:
            return
        checkpoint = trainer.strategy.load_checkpoint(best, weights_only=True)
        pl_module.on_load_checkpoint(checkpoint)
        if not trainer.strategy.restore_checkpoint_after_setup:  # those strategies load weights in `load_checkpoint`
            trainer.strategy.load_model_state_dict(checkpoint, strict=pl_module.strict_loading)
        self._stream.best_loaded = best


def _count_rows_in_float(trainer: pl.Trainer) -> None:
    # Lightning averages the processes' numbers of rows as integers: of 4 and 3 rows it makes 3, and the logged mean is
    # too large by a sixth. As floating point numbers they come out right.
    if world_size() > 1 and trainer._results is not None:
        for metric in trainer._results.values():
            count = getattr(metric, "cumulated_batch_size", None)
            if isinstance(count, torch.Tensor) and not count.is_floating_point():
                metric.cumulated_batch_size = count.double()


def _check_agreement(choice: str) -> None:
    chosen = gather_objects(choice)
    if len(set(chosen)) > 1:
        listed = "; ".join(f"rank {i}: {entry}" for i, entry in enumerate(chosen))
        raise MisconfigurationException(
            f"The processes would resume from different checkpoints ({listed}): they do not see the same files. Use a folder"
            " that all of them share."
        )


def begin_task(trainer: pl.Trainer) -> None:
    """Set back what the Trainer remembers of the task before: a second fit would train 0 steps.

    The number of logged steps stays, so that logger steps never go back.
    """
    fit = trainer.fit_loop
    epoch = fit.epoch_loop
    fit.epoch_progress.reset()
    epoch.batch_progress.reset()
    epoch.scheduler_progress.reset()
    epoch.automatic_optimization.optim_progress.reset()
    epoch.manual_optimization.optim_step_progress.reset()
    epoch.val_loop.batch_progress.reset()
    epoch.val_loop._has_run = False
    _Loop.restarting.fset(fit, False)  # type: ignore[attr-defined]
    for loop in (fit, epoch, epoch.val_loop):
        loop._loaded_from_state_dict = loop._resuming_from_checkpoint = False
        loop.reset_restart_stage()
    fit._combined_loader_states_to_load = []
    fit._last_train_dl_reload_epoch = epoch.val_loop._last_val_dl_reload_epoch = float("-inf")
    # What was restored for the task before must not be looked into for this one.
    trainer.ckpt_path = None
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping):
            callback.wait_count = callback.stopped_epoch = 0
            callback.best_score = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
            callback.stopping_reason = EarlyStoppingReason.NOT_STOPPED
            callback.stopping_reason_message = None
        elif isinstance(callback, ModelCheckpoint):
            callback.current_score = callback.best_model_score = None
            callback.best_k_models = {}
            callback.kth_best_model_path = callback.best_model_path = callback.last_model_path = ""
            callback.kth_value = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
            callback._last_checkpoint_saved = ""
            callback._last_global_step_saved = 0
            callback._defer_save_until_validation = False
