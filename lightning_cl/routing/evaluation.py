# SPDX-License-Identifier: Apache-2.0
"""How the batches of an evaluation are routed: by the router, by the task they are of, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_cl.routing.confusion import RoutingConfusion
from lightning_cl.routing.features import prompt_mask, text_fields
from lightning_cl.routing.forward import RoutedForward
from lightning_cl.routing.router import BASE, Routes

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = [
    "MODES",
    "EvaluationMode",
    "EvaluationRouting",
    "Split",
    "aside",
    "check_mode",
    "task_of_loader",
    "task_scores",
]

EvaluationMode = Literal["routed", "oracle", "base"]
Split = Literal["val", "test"]
MODES: tuple[EvaluationMode, ...] = ("routed", "oracle", "base")


class EvaluationRouting:
    """Tells the routing what it must know of each batch of one evaluation, and counts where the samples go.

    Args:
        routed: The routing of the module.
        confusion: Where the counts go.
    """

    def __init__(self, routed: RoutedForward, confusion: RoutingConfusion) -> None:
        self.routed = routed
        self.confusion = confusion
        self._task: str | None = None
        self._before = routed.adapters_given
        confusion.start()

    def begin_batch(self, mode: EvaluationMode, batch: Any, task: str | None) -> None:
        """Say where the batch's prompts end, of which task it is, and which adapters answer.

        Raises:
            MisconfigurationException: In mode ``"oracle"`` without a task.
        """
        fields = text_fields(batch)
        self._task = task
        self.routed.prompt = prompt_mask(fields.get("attention_mask"), fields.get("labels"))
        self.routed.on_routes = self._count
        own = self._adapter(mode)
        self.routed.use(self._before if own is None else own)

    def end(self, trainer: pl.Trainer, keep: bool, counted: bool) -> None:
        """Close the confusion matrix and log the accuracy. Collective if ``counted``."""
        self.clear()
        if not counted:
            return
        router = self.routed.router
        learnt = [c.name for c in router.classes if c.adapter != BASE] if router is not None else []
        accuracy = self.confusion.finish(learnt, keep=keep)
        if accuracy is not None:
            # Not `pl_module.log`: among the metrics of a loader it could be taken for the task's score.
            for logger in trainer.loggers:
                logger.log_metrics({"cl/routing_accuracy": accuracy}, step=trainer.global_step)

    def clear(self) -> None:
        """Forget the batch."""
        self.routed.prompt, self.routed.on_routes, self._task = None, None, None
        self.routed.use(self._before)

    def _adapter(self, mode: EvaluationMode) -> str | None:
        if mode == "routed":
            return None
        if mode == "base":
            return BASE
        if self._task is None:
            raise MisconfigurationException(
                "`evaluate_with='oracle'` needs to know the task of each loader, which only a `TaskStream` tells. Give the"
                " Trainer a `TaskStream`, or name the adapters yourself (`with router.routed.given(name)`)."
            )
        classes = self.routed.router.classes if self.routed.router is not None else []
        return next((c.adapter for c in classes if c.name == self._task), BASE)

    def _count(self, routes: Routes) -> None:
        if self._task is not None:
            self.confusion.add(self._task, routes)


def task_of_loader(trainer: pl.Trainer, split: Split, dataloader_idx: int) -> str | None:
    """The name of the task that a loader belongs to, where the data module is a ``TaskStream``."""
    stream: Any = getattr(trainer, "datamodule", None)
    return stream.loader_tasks(split)[dataloader_idx].name if hasattr(stream, "loader_tasks") else None


@contextmanager
def aside(trainer: pl.Trainer) -> Iterator[Any]:
    """Evaluate without loggers and monitors, so that the scores go into no task matrix; gives the monitor, or None."""
    runner: Any = trainer
    callbacks, loggers = runner.callbacks, runner.loggers
    monitors = [callback for callback in callbacks if type(callback).__name__ == "ForgettingMonitor"]
    runner.callbacks = [callback for callback in callbacks if callback not in monitors]
    runner.loggers = []
    try:
        with isolate_rng():
            yield monitors[0] if monitors else None
    finally:
        runner.callbacks, runner.loggers = callbacks, loggers


def task_scores(trainer: pl.Trainer, pl_module: pl.LightningModule, stream: Any, monitor: Any) -> dict[str, float]:
    """Each task's score, evaluated and read as a row of the stream's matrix is, but not put into it. Collective."""
    from lightning_cl.stream.scores import read_scores

    tests, validates = (is_overridden(step, pl_module) for step in ("test_step", "validation_step"))
    rows = [task for task in stream.tasks if task.test is not None or task.val is not None]
    by_test = [task for task in rows if tests and task.test is not None]
    by_validation = [task for task in rows if validates and task not in by_test]
    before = stream.row, stream.cells, stream.missing
    stream.cells, stream.missing = {}, {}
    try:
        for split, tasks, call in (("test", by_test, trainer.test), ("val", by_validation, trainer.validate)):
            if tasks:
                stream.row = {"test": [], "val": [], split: tasks}
                logged = call(pl_module, datamodule=stream, verbose=False)
                read_scores(stream, 0, tasks, logged, monitor)
        return {task: cell["value"] for (_, task), cell in stream.cells.items()}
    finally:
        stream.row, stream.cells, stream.missing = before


def check_mode(mode: str) -> None:
    """Refuse an unknown mode.

    Raises:
        MisconfigurationException: With the known ones.
    """
    if mode not in MODES:
        raise MisconfigurationException(
            f"`evaluate_with={mode!r}` of `RLSRouterFitter` is unknown. Use 'routed', 'oracle' or 'base'."
        )
