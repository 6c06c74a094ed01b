# SPDX-License-Identifier: Apache-2.0
"""Watches what a model forgets, from the metrics that Lightning logs anyway."""

import re
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from typing_extensions import override

from lightning_cl.callbacks.base import ContinualCallback
from lightning_cl.distributed import raise_together, rank
from lightning_cl.forgetting_limit import ForgettingLimit
from lightning_cl.metrics import TaskMatrix
from lightning_cl.metrics.loaders import LoaderNames, loader_count
from lightning_cl.metrics.reading import ScoreReader
from lightning_cl.report.diary import Diary


class ForgettingMonitor(ContinualCallback):
    """Fills the task matrix from the metrics that Lightning logs per dataloader, and acts when too much is forgotten.

    It runs no pass of its own: give your evaluation one loader per task and log as usual. Lightning tags the metrics
    with the loader (``val_acc/dataloader_idx_2``), and the monitor maps them to tasks. Under
    :func:`lightning_cl.fit_stream` the rows of the matrix are the evaluations before the first and after each task. In
    any other project each ``trainer.fit`` is a task (keep one monitor object for all of them), and a row is what you
    evaluate after it with ``trainer.test`` or ``trainer.validate``, or else the last validation inside the fit; an
    evaluation before the first fit is stage -1. The sanity check is ignored.

    After each row it logs the figures of :class:`~lightning_cl.metrics.TaskMatrix` as ``cl/average``,
    ``cl/backward_transfer``, ``cl/forgetting``, ... and ``cl/general_change/PROBE`` to all loggers (an undefined one is
    left out), sends a heat map and the tasks' curves to loggers that take images, prints both tables and writes
    ``task_matrix.json``, ``.csv`` and ``.png`` into the log directory. A module that keeps ``row_scores``, a dict from
    ``dataloader_idx`` to the score of each row, gets 95 % bootstrap intervals.

    With ``max_forgetting`` it compares the forgetting so far, in the metric's own unit, after every evaluation (inside
    a fit: of the validation scores; between tasks: of the matrix), and warns, stops the stream after the task, or puts
    the weights back that the last evaluation within the limit saw, and ends the task.

    Note:
        Works with every strategy, with sharded and quantized models, and with manual optimization. ``"restore"`` keeps
        one copy of the trainable weights on the CPU; it does not set back what other callbacks remember.

    Args:
        metric: name of the logged metric, without Lightning's ``/dataloader_idx_k``. ``{task}`` in it stands for the
            task's name, ``{metric}`` for the task's own metric. ``val_acc`` is also found as ``test_acc`` in a test
            loop. A task of a stream that logs another metric of its own (a probe's loss) is measured by that one.
        mode: ``"max"`` if higher is better, ``"min"`` if lower. The tasks of a stream that name their metric say it
            themselves.
        max_forgetting: largest mean forgetting that is accepted, in the metric's own unit (0.05 = five points of an
            accuracy between 0 and 1). None: no limit.
        on_exceed: ``"warn"``, ``"stop"`` (the stream ends after this task; elsewhere this fit ends and the next one
            is refused) or ``"restore"``.
        tasks: the tasks' names in the order of the loaders, for projects without a stream. Default: the keys of a dict
            of loaders, else ``task_0``, ``task_1``, ...
        roles: ``"train"`` or ``"probe"`` by task, for projects without a stream.
        reference: the score that each task reaches alone, for intransigence.
        normalise: worst and best score by task, or one pair, to average unlike metrics.
        dirpath: where the files go. Default: the log directory of the first logger, else ``default_root_dir``.
        print_table: whether the tables are printed after each row.
        plots: whether plots are drawn, written and sent to loggers.

    Raises:
        MisconfigurationException: for an argument outside its range; for a metric that nothing logs, with the names
            that exist; for a ``validation_step`` without ``dataloader_idx`` and several loaders; and at the start of a
            fit when the files cannot be written.

    Example:
        >>> monitor = ForgettingMonitor("val_acc", max_forgetting=0.05, on_exceed="stop")
        >>> monitor.matrix.tasks
        []

    In YAML::

        callbacks+:
          - class_path: lightning_cl.callbacks.ForgettingMonitor
            init_args:
              metric: val_acc
              max_forgetting: 0.05
              on_exceed: stop
    """

    def __init__(
        self,
        metric: str,
        mode: Literal["max", "min"] = "max",
        max_forgetting: float | None = None,
        on_exceed: Literal["warn", "stop", "restore"] = "warn",
        tasks: list[str] | None = None,
        roles: dict[str, str] | None = None,
        reference: dict[str, float] | None = None,
        normalise: dict[str, list[float]] | list[float] | None = None,
        dirpath: str | None = None,
        print_table: bool = True,
        plots: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(metric, str) or not metric.strip():
            raise MisconfigurationException(
                f"`ForgettingMonitor(metric={metric!r})`: it needs the name of a logged metric, such as 'val_acc'."
            )
        if mode not in ("max", "min"):
            raise MisconfigurationException(
                f"`ForgettingMonitor(mode={mode!r})`: use 'max' if a higher score is better, 'min' if a lower one is."
            )
        if on_exceed not in ("warn", "stop", "restore"):
            raise MisconfigurationException(
                f"`ForgettingMonitor(on_exceed={on_exceed!r})`: use 'warn', 'stop' or 'restore'."
            )
        if max_forgetting is not None and not max_forgetting >= 0:
            raise MisconfigurationException(
                f"`ForgettingMonitor(max_forgetting={max_forgetting})`: the limit is at least 0, in the metric's own unit"
                " (0.05 = five points of an accuracy between 0 and 1). Leave it out for no limit."
            )
        if tasks is not None and len(set(tasks)) < len(tasks):
            raise MisconfigurationException(
                f"`ForgettingMonitor(tasks={tasks})` holds a name twice. Each task needs a name of its own."
            )
        self.metric = metric
        self.mode = mode
        self.max_forgetting = max_forgetting
        self.on_exceed = on_exceed
        self.dirpath = dirpath
        self.print_table = print_table
        self.plots = plots
        self._names = LoaderNames(tasks)
        self._matrix_options: dict[str, Any] = {"roles": roles, "reference": reference, "normalise": normalise}
        try:
            self._rows, self._running = self._new_matrix(), self._new_matrix()
        except (TypeError, ValueError) as error:
            raise MisconfigurationException(f"`ForgettingMonitor`: {error}") from error
        if mode == "max" and re.search(r"loss|perplexity|error", metric, re.IGNORECASE):
            rank_zero_warn(
                f"`ForgettingMonitor(metric={metric!r}, mode='max')` takes a higher {metric} as better. Give `mode='min'`"
                " unless that is meant."
            )
        self._reader = ScoreReader(metric)
        self._limit = ForgettingLimit(max_forgetting, on_exceed)
        self._diary = Diary()
        # The tasks of the row that is being evaluated between the fits, and whether none is missing any more.
        self._row_seen: set[str] = set()
        self._row_complete = False
        # Whether results lie in memory that could not be written.
        self._unwritten = False
        # Whether a checkpoint was loaded whose results the files do not show yet.
        self._restored = False

    # --------------------------------------------------------------------------------- public

    @property
    def state_key(self) -> str:
        """Two monitors of different metrics may stand in one Trainer."""
        return self._generate_state_key(metric=self.metric)

    @property
    def matrix(self) -> TaskMatrix:
        """The task matrix: of the rows between the tasks, or of the validations inside the fits if those know more."""
        return self._rows if len(self._rows.stages) >= len(self._running.stages) else self._running

    @property
    def running(self) -> TaskMatrix:
        """The matrix of the last validation inside each fit."""
        return self._running

    @property
    def stop_reason(self) -> str | None:
        """Why ``on_exceed="stop"`` has ended the stream; a loop of your own breaks when it is set."""
        return self._limit.stop_reason

    @property
    def events(self) -> list[dict[str, Any]]:
        """Each time the limit was exceeded: stage, forgetting, and what was done."""
        return list(self._limit.events)

    def write(self, trainer: pl.Trainer) -> None:
        """Write the result files again, with what other callbacks have found out since the last row. Collective."""
        from lightning_cl.report import row

        folder = self._folder(trainer)
        if rank() == 0 and not _is_dry(trainer) and self.matrix.stages:
            self._try_to_write(trainer, folder, row.draw(self.matrix) if self.plots else {})

    # ---------------------------------------------------------------------- before the training

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what could not be measured, before anything is trained."""
        self._learn_tasks(trainer)
        if stage == "fit":
            self._diary.start("prepare_seconds")
            stream = _stream(trainer)
            if self.stop_reason is not None and stream is None:
                raise MisconfigurationException(
                    f"{self.stop_reason} `on_exceed='stop'` ends the tasks here. End your loop when"
                    " `monitor.stop_reason` is set, or raise `max_forgetting`."
                )
            self._check_signature(pl_module, _validation_loaders(trainer))
            if self._row_seen:
                self._finish_row(trainer, pl_module)
            self._check_restore(trainer)
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not _is_dry(trainer):
            self._check_writable(trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The loaders are known now, also where there was no sanity check."""
        if isinstance(trainer.num_val_batches, list):
            self._check_signature(pl_module, len(trainer.num_val_batches))
        super().on_train_start(trainer, pl_module)
        if self._restored and not _is_dry(trainer):
            # The run before may have got further than its checkpoint: the files are set back to it.
            self._unwritten = bool(self.matrix.stages)
            self._check_writable(trainer)
        self._restored = False
        self._diary.stop("prepare_seconds", self.task_index)
        self._diary.start("train_seconds")

    # ----------------------------------------------------------------------------- in training

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep or put back the weights, now that every callback has left the validation."""
        self._settle(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take down the added loss terms as often as Lightning logs."""
        from lightning_cl.report.loggers import logger_step

        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if rank() == 0 and every and (logger_step(trainer) + 1) % every == 0:
            self._diary.take_down(trainer.callback_metrics, logger_step(trainer))

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As before a batch: the validation at the end of an epoch has no batch after it."""
        self._settle(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Book the task's cost; the base ends the task."""
        self._settle(trainer, pl_module)
        self._diary.end_task(self.task_index, trainer.global_step)
        super().on_train_end(trainer, pl_module)

    @override
    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Without evaluations between the fits, the last validation is the row."""
        if not self._rows.stages and self.task_index in self._running.stages:
            self._finish_row(trainer, pl_module)

    # ----------------------------------------------------------------------------- evaluations

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._diary.start("evaluation_seconds")

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._diary.start("evaluation_seconds")

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read a validation: of a fit, or between the tasks."""
        self._read(trainer, pl_module)

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read a test."""
        self._read(trainer, pl_module)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Keep or put back the weights after an evaluation between the tasks, and show a row that is complete."""
        self._settle(trainer, pl_module)
        if self._row_complete:
            # Every callback has closed its own books of the evaluation by now.
            self._finish_row(trainer, pl_module)
        super().teardown(trainer, pl_module, stage)

    # ----------------------------------------------------------------------------------- state

    @override
    def state_dict(self) -> dict[str, Any]:
        """The matrices with their row scores, the curves, the costs and what the limit has done."""
        state = {
            "rows": self._rows.to_dict(),
            "running": self._running.to_dict(),
            "diary": self._diary.to_dict(),
            "found": self._reader.found,
            **self._limit.state_dict(),
        }
        return {**super().state_dict(), "monitor": state}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint stood; one that was written without a monitor changes nothing."""
        super().load_state_dict(state_dict)
        state = state_dict.get("monitor")
        if state is not None:
            self._rows, self._running = (
                TaskMatrix.from_dict(state[name], sync_on_compute=False) for name in ("rows", "running")
            )
            self._diary = Diary(**state["diary"])
            self._reader.found = state["found"]
            self._limit.load_state_dict(state)
            self._restored = True

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the last good weights. A collective call under sharding."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._limit.weights:
            kept = self._limit.weights.state(pl_module)
            checkpoint[f"{self.state_key}.last_good"] = kept

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take over the last good weights."""
        saved = checkpoint.get(f"{self.state_key}.last_good")
        if saved is not None:
            self._limit.weights.load(saved)

    # -------------------------------------------------------------------------------- internals

    def _new_matrix(self) -> TaskMatrix:
        # Every rank holds the same scores (they are averaged when they are read): nothing is left to join.
        matrix = TaskMatrix(**self._matrix_options, sync_on_compute=False)
        for name in self._names.names or ():
            matrix.add_task(name)
        return matrix

    def _learn_tasks(self, trainer: pl.Trainer) -> None:
        for task in getattr(_stream(trainer), "tasks", ()):
            told = task.metric is not None or task.higher_is_better is not None
            for matrix in (self._rows, self._running):
                matrix.add_task(task.name)
                matrix.declare(task.name, role=task.role, mode=task.mode if told else self.mode)

    def _check_restore(self, trainer: pl.Trainer) -> None:
        if self.max_forgetting is None or self.on_exceed != "restore":
            return
        names = [type(callback).__name__ for callback in trainer.callbacks]  # type: ignore[attr-defined]
        for other in ("LoRAInterpolator", "RLSRouterFitter"):
            if other in names:
                raise MisconfigurationException(
                    f"`ForgettingMonitor(on_exceed='restore')` puts back the trained weights alone, and `{other}` keeps"
                    " weights of its own, which it would put over them at the task's end. Use `on_exceed='stop'` or"
                    " 'warn', or leave `" + other + "` out."
                )

    def _check_signature(self, pl_module: pl.LightningModule, loaders: int) -> None:
        if loaders > 1 and not is_param_in_hook_signature(pl_module.validation_step, "dataloader_idx"):
            raise MisconfigurationException(
                f"There are {loaders} validation loaders, one per task, but `{type(pl_module).__name__}.validation_step`"
                " takes no `dataloader_idx`, so Lightning cannot tell their metrics apart. Write `def validation_step("
                "self, batch, batch_idx, dataloader_idx=0)`, or give a single loader."
            )

    def _read(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        in_fit = trainer.state.fn == TrainerFn.FITTING
        stream = _stream(trainer)
        if in_fit:
            stage = self.task_index
        elif stream is not None:
            stage = stream.stage
        else:
            stage = self._clock.completed - (0 if self._clock.in_task else 1)
        names = self._names.of(trainer, stage)
        if trainer.sanity_checking:
            self._reader.check_sanity(trainer, pl_module, names)
            return
        found = self._reader.read(trainer, pl_module, names)
        self._diary.stop("evaluation_seconds", stage)
        matrix = self._running if in_fit else self._rows
        for task, reading in found.items():
            for known in (self._rows, self._running):
                known.add_task(task)
                known.declare(task, mode=known.modes.get(task, self.mode), metric=reading.label)
            matrix.update(stage, task, reading.value, reading.rows, reading.scores)
        if not found:
            return
        if in_fit:
            from lightning_cl.report.loggers import logger_step

            values = [(task, reading.value) for task, reading in found.items()]
            self._diary.add_validation(stage, logger_step(trainer), values)
            self._judge(trainer, "running", stage)
            return
        self._row_seen.update(names)
        expected = {t.name for t in getattr(stream, "tasks", ()) if t.val is not None or t.test is not None}
        if expected <= self._row_seen:
            self._judge(trainer, "rows", stage)
            self._row_complete = True

    def _judge(self, trainer: pl.Trainer, name: str, stage: int) -> None:
        in_fit = name == "running"
        action = self._limit.judge({"rows": self._rows, "running": self._running}, name, stage, in_fit)
        if action in ("stop", "restore") and in_fit:
            trainer.should_stop = True
        stream = _stream(trainer)
        if action == "stop" and stream is not None:
            stream.stop(self.stop_reason)

    def _settle(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._limit.settle(pl_module)

    # ---- what is shown

    def _finish_row(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._row_seen, self._row_complete = set(), False
        folder = self._folder(trainer)
        if rank() != 0 or _is_dry(trainer):
            return
        from lightning_cl.report import row

        matrix = self.matrix
        figures = row.draw(matrix) if self.plots else {}
        row.show(trainer, matrix, self.print_table, figures)
        self._try_to_write(trainer, folder, figures)

    def _try_to_write(self, trainer: pl.Trainer, folder: Path, figures: dict[str, Any]) -> None:
        try:
            self._write(trainer, folder, figures)
        except OSError as error:
            self._unwritten = True
            rank_zero_warn(
                f"`ForgettingMonitor` could not write the results of stage {max(self.matrix.stages)}: {error} Nothing is"
                " lost: the matrix is in the monitor and in every checkpoint, and is written again with the next row."
            )

    def _write(self, trainer: pl.Trainer, folder: Path, figures: dict[str, Any]) -> None:
        from lightning_cl.report import row

        parts = {
            "monitor": {"metric": self.metric, "mode": self.mode, "max_forgetting": self.max_forgetting},
            "curves": self._diary.curves,
            "terms": self._diary.terms,
            "costs": self._diary.costs,
            "events": self.events,
        }
        row.write(trainer, self.matrix, folder, self._stem(trainer), parts, figures)
        self._unwritten = False

    def _check_writable(self, trainer: pl.Trainer) -> None:
        error: Exception | None = None
        folder = self._folder(trainer)
        if rank() == 0:
            from lightning_cl.report import row

            try:
                if self._unwritten:
                    self._write(trainer, folder, row.draw(self.matrix) if self.plots else {})
                row.check_writable(folder, self._stem(trainer))
            except OSError as caught:
                error = MisconfigurationException(
                    f"`ForgettingMonitor` cannot write its results into {folder}: {caught} Free space, or set `dirpath`."
                )
        raise_together(error)

    def _folder(self, trainer: pl.Trainer) -> Path:
        # `trainer.log_dir` is a collective call.
        log_dir = trainer.log_dir
        return Path(self.dirpath or log_dir or trainer.default_root_dir)

    def _stem(self, trainer: pl.Trainer) -> str:
        from lightning_cl.report.results import STEM

        monitors = [callback for callback in trainer.callbacks if isinstance(callback, ForgettingMonitor)]  # type: ignore[attr-defined]
        return STEM if monitors[:1] == [self] else f"{STEM}_{re.sub(r'[^A-Za-z0-9]+', '_', self.metric).strip('_')}"


def _stream(trainer: pl.Trainer) -> Any:
    """The TaskStream that the Trainer runs, or None."""
    data = getattr(trainer, "datamodule", None)
    return data if hasattr(data, "loader_tasks") else None


def _validation_loaders(trainer: pl.Trainer) -> int:
    """How many validation loaders a fit will have, where that shows before they are made."""
    stream = _stream(trainer)
    if stream is not None:
        return len(stream.loader_tasks("val"))
    return loader_count(trainer)


def _is_dry(trainer: pl.Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
