# SPDX-License-Identifier: Apache-2.0
"""The evaluation side of a routed module: each batch goes to the router's, the task's own, or no adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from typing_extensions import override

from lightning_cl.callbacks.base import ContinualCallback
from lightning_cl.callbacks.forgetting_monitor import ForgettingMonitor
from lightning_cl.routing.confusion import RoutingConfusion
from lightning_cl.routing.evaluation import (
    MODES,
    EvaluationMode,
    EvaluationRouting,
    Split,
    aside,
    check_mode,
    task_of_loader,
    task_scores,
)
from lightning_cl.routing.features import prompt_mask, text_fields
from lightning_cl.routing.forward import RoutedForward
from lightning_cl.routing.router import AnalyticRouter, Routes


class RoutedEvaluation(ContinualCallback):
    """Base of a callback that has a router: routes evaluations, counts where samples go, compares.

    Subclasses give the fitted router, and bring the module's adapters up to date before an evaluation.

    Args:
        evaluate_with: ``"routed"``, ``"oracle"`` or ``"base"``.
        compare: Whether ``fit_stream`` ends with the scores by oracle and with the base model.
    """

    def __init__(self, evaluate_with: EvaluationMode, compare: bool) -> None:
        super().__init__()
        check_mode(evaluate_with)
        self.evaluate_with: EvaluationMode = evaluate_with
        self.compare = compare
        self.confusion = RoutingConfusion()
        self._routed: RoutedForward | None = None
        self._evaluation: EvaluationRouting | None = None

    def fitted(self, running: bool = False) -> AnalyticRouter | None:
        """The router on the finished tasks; with ``running`` also on what was seen of the task that trains. Collective."""
        raise NotImplementedError

    def restore_adapters(self) -> None:
        """Write the finished tasks' adapters into the module, where it has older ones."""
        raise NotImplementedError

    # ------------------------------------------------------------------ what users read

    @property
    def router(self) -> AnalyticRouter | None:
        """The fitted router; None before the first task has ended."""
        return self.fitted()

    @property
    def routed(self) -> RoutedForward:
        """The routing of the module of the last run."""
        if self._routed is None:
            raise RuntimeError("`RLSRouterFitter` has seen no module yet: it exists from the first run on.")
        return self._routed

    @torch.no_grad()
    def route(self, batch: Any) -> Routes:
        """Where the samples of a batch go, without running the layers above the feature layer (unless sharded).

        Args:
            batch: What the module trains on: a mapping with ``input_ids`` (and ``attention_mask``, ``labels``), or
                tensors, the first of which is the network's input.

        Raises:
            RuntimeError: Before the first task has ended.
        """
        routed, router = self.routed, self.router
        if router is None:
            raise RuntimeError("No task has ended yet, so there is no router. Call `route` after the first fit.")
        fields = text_fields(batch)
        inputs = {k: v for k, v in fields.items() if k in ("input_ids", "attention_mask")}
        args = () if inputs else routed.arguments(batch)
        mask = prompt_mask(fields.get("attention_mask"), fields.get("labels"))
        pooled = routed.features(mask, *args, **inputs)
        return router.route(pooled)

    @contextmanager
    def evaluating_with(self, mode: EvaluationMode) -> Iterator[None]:
        """Evaluate with ``"routed"``, ``"oracle"`` or ``"base"`` for a while, to set their scores side by side."""
        check_mode(mode)
        before, self.evaluate_with = self.evaluate_with, mode
        try:
            yield
        finally:
            self.evaluate_with = before

    def side_by_side(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, stream: Any
    ) -> dict[str, dict[str, float]]:
        """Evaluate all tasks of a ``TaskStream`` routed, by oracle and with the base model: ``{mode: {task: score}}``.

        The scores are kept in :attr:`confusion`, for the report; loggers and the task matrix do not see them.
        """
        return self._compare(trainer, pl_module, stream, MODES, {})

    @override
    def on_stream_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the last row's scores beside those of the other modes."""
        if not self.compare or self.routed.bank is None:
            return
        stream = trainer.datamodule  # type: ignore[attr-defined]
        scores = stream.matrix().scores()
        last = max((stage for stage, _ in scores), default=-1)
        row = {task: score.value for (stage, task), score in scores.items() if stage == last}
        self._compare(
            trainer,
            pl_module,
            stream,
            [mode for mode in MODES if mode != self.evaluate_with],
            {self.evaluate_with: row},
        )

    def _compare(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        stream: Any,
        modes: Sequence[EvaluationMode],
        known: dict[str, dict[str, float]],
    ) -> dict[str, dict[str, float]]:
        scores = dict(known)
        for mode in modes:
            with self.evaluating_with(mode), aside(trainer) as monitor:
                scores[mode] = task_scores(trainer, pl_module, stream, monitor)
        self.confusion.scores = scores
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ForgettingMonitor):
                callback.write(trainer)
        return scores

    # ------------------------------------------------------------------ hooks

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Route; in the middle of a task also with what was seen of it so far."""
        self._begin_evaluation(trainer)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Route."""
        self._begin_evaluation(trainer)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Route."""
        self._begin_evaluation(trainer)

    def _begin_evaluation(self, trainer: pl.Trainer) -> None:
        routed = self.routed
        self.restore_adapters()
        in_task = trainer.state.fn == "fit" and self._clock.in_task
        routed.router = self.fitted(running=in_task)
        routed.enabled = routed.router is not None or self.evaluate_with != "routed"
        routed.attach()
        self._evaluation = EvaluationRouting(routed, self.confusion)

    def end_routing(self) -> None:
        """Forget a batch whose evaluation ended in the middle."""
        if self._evaluation is not None:
            self._evaluation.clear()
            self._evaluation = None

    def _end_evaluation(self, trainer: pl.Trainer, counted: bool = True) -> None:
        fitting = trainer.state.fn == "fit"
        assert self._evaluation is not None
        self._evaluation.end(trainer, keep=not fitting, counted=counted)
        if fitting:
            self.routed.enabled = False

    def _begin_batch(self, trainer: pl.Trainer, batch: Any, dataloader_idx: int, split: Split | None) -> None:
        assert self._evaluation is not None
        task = None if split is None else task_of_loader(trainer, split, dataloader_idx)
        self._evaluation.begin_batch(self.evaluate_with, batch, task)

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Tell the routing where this batch's prompts end, and of which task it is."""
        self._begin_batch(trainer, batch, dataloader_idx, "val")

    @override
    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """As for validation."""
        self._begin_batch(trainer, batch, dataloader_idx, "test")

    @override
    def on_predict_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """As for validation; no task is known."""
        self._begin_batch(trainer, batch, dataloader_idx, None)

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the confusion matrix; in a fit, the active adapter answers again."""
        # A fit that is resumed begins with a sanity check, which the unbroken one has not logged.
        self._end_evaluation(trainer, counted=not trainer.sanity_checking)

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the confusion matrix."""
        self._end_evaluation(trainer)

    @override
    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The batches are over."""
        self._end_evaluation(trainer, counted=False)
