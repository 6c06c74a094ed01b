# SPDX-License-Identifier: Apache-2.0
"""Watches what a model forgets, from the metrics that Lightning logs anyway."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from typing_extensions import override

from lightning_cl import weights
from lightning_cl.callbacks.base import ContinualCallback
from lightning_cl.distributed import gather_objects, raise_together, rank
from lightning_cl.last_good import LastGood
from lightning_cl.metrics import TaskMatrix, find_score
from lightning_cl.metrics.loaders import LoaderNames, loader_count, loop_of, rows_of_loader
from lightning_cl.metrics.lookup import label_of, logged_for
from lightning_cl.report.diary import Diary


@dataclass
class _State:
    """What a resumed run needs to go on: plain types only."""

    #: The rows between the tasks, from evaluations outside of a fit.
    rows: dict[str, Any] | None = None
    #: The last validation inside each fit.
    running: dict[str, Any] | None = None
    #: Whether the monitor's metric was seen at least once.
    found: bool = False
    #: Costs, curves and loss terms for the report.
    diary: dict[str, Any] = field(default_factory=dict)
    #: What the limit on forgetting has done.
    events: list[dict[str, Any]] = field(default_factory=list)
    stop_reason: str | None = None
    #: The matrices' cells of the stage in which the last good weights were measured.
    good: dict[str, Any] | None = None


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
        self._state = _State()
        self._good = LastGood()
        self._row_seen: set[str] = set()
        self._row_complete = False
        self._pending: Literal["keep", "restore"] | None = None
        self._unwritten = False
        self._unchecked = False
        self._diary = Diary()

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
        return self._state.stop_reason

    @property
    def events(self) -> list[dict[str, Any]]:
        """Each time the limit was exceeded: stage, forgetting, and what was done."""
        return list(self._state.events)

    # ---------------------------------------------------------------------- before the training

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what could not be measured, before anything is trained."""
        self._learn_tasks(trainer)
        if stage == "fit":
            self._diary.start("prepare_seconds")
            stream = _stream(trainer)
            if self._state.stop_reason is not None and stream is None:
                raise MisconfigurationException(
                    f"{self._state.stop_reason} `on_exceed='stop'` ends the tasks here. End your loop when"
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
        state = dict(self._state.__dict__)
        state |= {"rows": self._rows.to_dict(), "running": self._running.to_dict(), "diary": self._diary.to_dict()}
        return {**super().state_dict(), "monitor": state}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint stood; one that was written without a monitor changes nothing."""
        super().load_state_dict(state_dict)
        if "monitor" in state_dict:
            self._state = _State(**state_dict["monitor"])
            self._rows, self._running = (self._load_matrix(s) for s in (self._state.rows, self._state.running))
            self._diary = Diary(**self._state.diary)
            self._state.rows = self._state.running = None

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the last good weights. A collective call under sharding."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._good:
            checkpoint[f"{self.state_key}.last_good"] = self._good.state(weights.sharding_root(trainer, pl_module))

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take over the last good weights."""
        saved = checkpoint.get(f"{self.state_key}.last_good")
        if saved is not None:
            self._good.load(saved)

    # -------------------------------------------------------------------------------- internals

    def _new_matrix(self) -> TaskMatrix:
        # Every rank holds the same scores (they are averaged when they are read): nothing is left to join.
        matrix = TaskMatrix(**self._matrix_options, sync_on_compute=False)
        for name in self._names.names or ():
            matrix.add_task(name)
        return matrix

    def _load_matrix(self, saved: dict[str, Any] | None) -> TaskMatrix:
        return self._new_matrix() if saved is None else TaskMatrix.from_dict(saved, sync_on_compute=False)

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
            self._check_logged(trainer, pl_module, names, dict.fromkeys(_names_in_sanity_check(trainer), 0.0))
            return
        logged = {name: float(value) for name, value in trainer.callback_metrics.items() if _is_number(value)}
        self._check_logged(trainer, pl_module, names, logged)
        self._diary.stop("evaluation_seconds", stage)
        found = self._scores(trainer, pl_module, names, logged)
        matrix = self._running if in_fit else self._rows
        for task, (value, rows, scores) in found.items():
            matrix.update(stage, task, value, rows, scores)
        if not found:
            return
        if in_fit:
            from lightning_cl.report.loggers import logger_step

            self._diary.add_validation(stage, logger_step(trainer), [(task, score[0]) for task, score in found.items()])
            self._judge(trainer, self._running, stage)
            return
        self._row_seen.update(names)
        expected = {t.name for t in getattr(stream, "tasks", ()) if t.val is not None or t.test is not None}
        if expected <= self._row_seen:
            self._judge(trainer, self._rows, stage)
            self._row_complete = True

    def _scores(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, names: list[str], logged: dict[str, float]
    ) -> dict[str, tuple[float, int | None, list[float] | None]]:
        """The score of each task: value, number of rows and the rows' scores, the same on every rank."""
        own_metrics = {task.name: task.metric for task in getattr(_stream(trainer), "tasks", ())}
        per_row: dict[int, Any] = getattr(pl_module, "row_scores", None) or {}
        local: dict[str, tuple[float, int | None, list[float] | None]] = {}
        for index, task in enumerate(names):
            name, _ = find_score(logged, index, len(names), task, self.metric, own_metrics.get(task))
            if name is None:
                continue
            for matrix in (self._rows, self._running):
                matrix.add_task(task)
                matrix.declare(task, mode=matrix.modes.get(task, self.mode), metric=label_of(name, task))
            scores = [float(score) for score in per_row.get(index, ())]
            local[task] = (logged[name], rows_of_loader(trainer, index), scores or None)
        gathered = gather_objects(local)
        found = {}
        for task, (_, rows, _) in local.items():
            values = [part[task][0] for part in gathered]
            # A metric logged without `sync_dist` differs over the ranks; their decisions must not.
            value = values[0] if len(set(values)) == 1 else sum(values) / len(values)
            parts = [part[task][2] or [] for part in gathered]
            # Each rank holds its own rows, or (CausalLMModule) every rank holds all of them.
            whole = all(part == parts[0] for part in parts) and (rows is None or len(parts[0]) >= rows)
            joined = parts[0] if whole else [score for part in parts for score in part]
            usable = bool(joined) and _same_unit(value, joined)
            found[task] = (value, len(joined) or rows, joined if usable else None)
        return found

    def _check_logged(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, names: list[str], logged: dict[str, float]
    ) -> None:
        if self._state.found:
            return
        for index, task in enumerate(names):
            if find_score(logged, index, len(names), task, self.metric)[0] is not None:
                self._state.found = True
                return
        own_metrics = {task.name: task.metric for task in getattr(_stream(trainer), "tasks", ())}
        tested = is_overridden("test_step", pl_module) and "test" in self.metric
        if not names or (loop_of(trainer) == "val" and tested):
            return
        existing = {label for index in range(len(names)) for label in logged_for(logged, index, len(names))}
        if len(names) > 1 and self.metric in logged:
            raise MisconfigurationException(
                f"`ForgettingMonitor(metric={self.metric!r})`: it is logged once for all {len(names)} loaders, so the tasks"
                " cannot be told apart. Log it in the evaluation step, or under a name that holds the task's, and give"
                " `metric='{task}/...'`."
            )
        own = [metric for metric in own_metrics.values() if metric is not None]
        raise MisconfigurationException(
            f"`ForgettingMonitor(metric={self.metric!r})`: nothing logs a metric of that name for the loaders of"
            f" {', '.join(map(repr, names))}. Logged are {', '.join(map(repr, sorted(existing))) or 'no metrics at all'}"
            f"{' (the tasks name ' + ', '.join(map(repr, dict.fromkeys(own))) + ')' if own else ''}. Give one of these as"
            " `metric`, or log the score with `self.log` in the evaluation step."
        )

    # ---- the limit

    def _judge(self, trainer: pl.Trainer, matrix: TaskMatrix, stage: int) -> None:
        if self.max_forgetting is None or stage >= len(matrix.train_tasks):
            return
        forgetting = matrix.at(stage)["forgetting"]
        if forgetting is None and stage > 0 and not self._unchecked:
            self._unchecked = True
            rank_zero_warn(
                f"`max_forgetting={self.max_forgetting}` cannot be checked after stage {stage}:"
                f" {matrix.reasons['forgetting']}."
            )
        exceeded = forgetting is not None and forgetting > self.max_forgetting
        if not exceeded or forgetting is None:
            if self.on_exceed == "restore":
                self._pending = "keep"
                self._state.good = {
                    name: [[task, score.value, score.rows] for (s, task), score in m.scores().items() if s == stage]
                    for name, m in (("rows", self._rows), ("running", self._running))
                }
            return
        in_fit = trainer.state.fn == TrainerFn.FITTING
        task = matrix.train_tasks[stage]
        reason = (
            f"Forgetting of {forgetting:.4g} {'in' if in_fit else 'after'} task {stage} ({task!r}) exceeds"
            f" `max_forgetting={self.max_forgetting:g}`; {_worst(matrix, stage)}."
        )
        action = self.on_exceed if self.on_exceed != "restore" or self._state.good is not None else "stop"
        done = {
            "warn": "",
            "stop": " The stream ends after this task.",
            "restore": " The weights of the last evaluation within the limit are put back, and the task ends.",
        }[action]
        rank_zero_warn(f"`ForgettingMonitor`: {reason}{done}")
        self._state.events.append(
            {"stage": stage, "task": task, "in_fit": in_fit, "forgetting": forgetting, "action": action}
        )
        if action == "warn":
            return
        if in_fit:
            trainer.should_stop = True
        if action == "stop":
            self._state.stop_reason = reason
            stream = _stream(trainer)
            if stream is not None:
                stream.stop(reason)
        else:
            self._pending = "restore"
            self._replace_row(matrix, stage)

    def _replace_row(self, matrix: TaskMatrix, stage: int) -> None:
        # The weights go back, so the stage's scores are those that these weights had.
        good = (self._state.good or {}).get("rows" if matrix is self._rows else "running", ())
        for task, value, rows in good:
            matrix.update(stage, task, value, rows)

    def _settle(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pending, self._pending = self._pending, None
        if pending == "keep":
            self._good.keep(weights.sharding_root(trainer, pl_module))
        elif pending == "restore":
            self._good.put_back(weights.sharding_root(trainer, pl_module))

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
        try:
            self._write(trainer, folder, figures)
        except OSError as error:
            self._unwritten = True
            rank_zero_warn(
                f"`ForgettingMonitor` could not write the results of stage {max(matrix.stages)}: {error} Nothing is lost:"
                " the matrix is in the monitor and in every checkpoint, and is written again with the next row."
            )

    def _write(self, trainer: pl.Trainer, folder: Path, figures: dict[str, Any]) -> None:
        from lightning_cl.report import row

        parts = {
            "monitor": {"metric": self.metric, "mode": self.mode, "max_forgetting": self.max_forgetting},
            "curves": self._diary.curves,
            "terms": self._diary.terms,
            "costs": self._diary.costs,
            "events": self._state.events,
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


def _names_in_sanity_check(trainer: pl.Trainer) -> list[str]:
    """What the sanity check logged: Lightning drops its values and shows them to no callback, but keeps the names."""
    names = []
    for key, result in (getattr(trainer, "_results", None) or {}).items():
        loader = re.search(r"\.(\d+)$", key)
        names.append(result.meta.name + (f"/dataloader_idx_{loader[1]}" if loader else ""))
    return names


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.numel() == 1)


def _same_unit(value: float, scores: list[float]) -> bool:
    """Whether the rows' scores can be what the value is the mean of (a percentage of shares is not)."""
    mean = sum(scores) / len(scores)
    return abs(mean - value) <= max(0.02, 0.25 * max(abs(mean), abs(value)))


def _worst(matrix: TaskMatrix, stage: int) -> str:
    """The task that has lost most since it was learnt."""
    table = matrix.scores()
    lost = {}
    for index, task in enumerate(matrix.train_tasks[:stage]):
        now, then = table.get((stage, task)), table.get((index, task))
        if now is not None and then is not None:
            sign = 1 if matrix.mode_of(task) == "max" else -1
            lost[task] = sign * (then.value - now.value), then.value, now.value
    name = max(lost, key=lambda task: lost[task][0])
    return f"{name!r} went from {lost[name][1]:.4g} to {lost[name][2]:.4g}"
