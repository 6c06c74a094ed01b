# SPDX-License-Identifier: Apache-2.0
"""One adapter a task, and an analytic router that picks it for each sample inside the pass that runs anyway."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_cl import anatomy, distributed
from lightning_cl.attachment import Step
from lightning_cl.callbacks.base import ContinualCallback
from lightning_cl.checkpoints import peek_callback_state
from lightning_cl.routing.collecting import new_general_rows, task_rows
from lightning_cl.routing.confusion import RoutingConfusion
from lightning_cl.routing.evaluation import (
    MODES,
    EvaluationMode,
    EvaluationRouting,
    Split,
    check_mode,
    task_of_loader,
    task_scores,
)
from lightning_cl.routing.features import find_feature_layer, prompt_mask, shallow_modules, text_fields
from lightning_cl.routing.forward import RoutedForward
from lightning_cl.routing.router import BASE, AnalyticRouter, RouteClass, Routes
from lightning_cl.routing.statistics import RouterStatistics

if TYPE_CHECKING:
    from lightning_cl.routing.adapters import AdapterBank

GENERAL = "general"


class RLSRouterFitter(ContinualCallback):
    r"""Trains one LoRA adapter a task and fits, in closed form, the router that chooses among them.

    Analytic subspace routing (arXiv 2503.13575): each task's adapter lies in the layers above a feature layer and is
    trained alone, so that nothing of an earlier task is overwritten. The output of the feature layer, averaged over
    the prompt's tokens and expanded at random, is what the router reads: ``x = relu(h Phi)``, and
    ``W = (sum x^T x + ridge I)^-1 sum x^T y`` (equations 5 to 8). The sums need no old data, so ``W`` is exactly the
    joint solution over all tasks. In evaluation, ``predict`` and ``generate``, each sample of a batch is routed at the
    feature layer and goes on with its own adapter, in the same forward pass.

    Features are taken from the passes that training runs anyway, over the first epoch of a task: each row counts
    once. Layers up to the feature layer are frozen and run without dropout, so the features are those of serving.

    A module without LoRA layers (a CNN, full fine-tuning) gets the router alone: see :meth:`route`.

    Memory: one ``E x E`` float64 matrix for the finished tasks (in host memory between tasks; E = 4096: 134 MB), one
    more while a task runs; one adapter on the device, the other tasks' in host memory (FSDP: sharded, on the device).

    Args:
        feature_layer: ``"auto"`` (an eighth of the depth, the paper's 4 of 32), the number of blocks below the
            adapters, or the name of any submodule.
        expansion_dim: Width E of the random features (the paper: 10,000). More separates better, at E^2 memory.
        ridge: ``"auto"`` chooses it at each task's end by generalized cross-validation, from the sums alone; or a
            number above 0 (the paper's code: 100, in float32).
        min_margin: Where best and second best score are closer than this, the base model answers. None: never. Scores
            are about 1 and 0, so 0.1 to 0.3 keeps clear samples.
        max_tasks: Number of adapters to allocate at the start. Needed when the model is sharded (FSDP) and the tasks
            do not come from a ``TaskStream``, whose number is known.
        general_class: Also learn a class ``"general"``, answered by the base model, from the ``GeneralSamples`` that a
            ``ReplayMixer`` replays.
        evaluate_with: ``"routed"``, ``"oracle"`` (the adapter of the loader's own task; needs a ``TaskStream``), or
            ``"base"`` (no adapter): for comparison.
        seed: Seed of the expansion and of the adapters' first weights.

    Attributes:
        confusion: Where samples of each task were sent, by stage.

    Note:
        Under FSDP all adapters are allocated before sharding: a parameter that is added later would not have its
        gradients reduced over the ranks. With a 4-bit base nothing changes.

    Raises:
        MisconfigurationException: For values out of range, a feature layer that does not exist, adapters that cannot be
            kept apart, more tasks than adapters, or an episodic memory beside it.

    Example:
        >>> router = RLSRouterFitter(expansion_dim=1024, ridge="auto", min_margin=0.1)
        >>> router.task_index
        0

    YAML::

        trainer:
          callbacks+:
            - class_path: lightning_cl.callbacks.RLSRouterFitter
              init_args: {expansion_dim: 4096, ridge: auto}
    """

    def __init__(
        self,
        feature_layer: str | int = "auto",
        expansion_dim: int = 4096,
        ridge: float | Literal["auto"] = "auto",
        min_margin: float | None = None,
        max_tasks: int | None = None,
        general_class: bool = False,
        evaluate_with: EvaluationMode = "routed",
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check(expansion_dim, ridge, min_margin, max_tasks, evaluate_with)
        self.feature_layer = feature_layer
        self.expansion_dim = expansion_dim
        self.ridge = ridge
        self.min_margin = min_margin
        self.max_tasks = max_tasks
        self.general_class = general_class
        self.evaluate_with: EvaluationMode = evaluate_with
        self.seed = seed
        self.confusion = RoutingConfusion()
        self._statistics = RouterStatistics(expansion_dim, ridge, seed)
        self._stored: dict[str, dict[str, Tensor]] = {}  # whole weights of the finished tasks' adapters
        self._general_ids: set[str] = set()
        self._routed: RoutedForward | None = None
        self._bank: AdapterBank | None = None
        self._outdated = False  # whether adapters in the model are older than the stored ones
        self._batch: Any = None  # the training batch whose features are still to come
        self._frozen: list[nn.Module] = []
        self._evaluation: EvaluationRouting | None = None

    # ------------------------------------------------------------------ what users read

    @property
    def router(self) -> AnalyticRouter | None:
        """The fitted router; None before the first task has ended."""
        return self._fitted()

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
        """Test all tasks of a ``TaskStream`` routed, by oracle and with the base model: ``{mode: {task: score}}``.

        The scores are kept in :attr:`confusion`, for the report.
        """
        self.confusion.scores = {}
        for mode in MODES:
            with self.evaluating_with(mode):
                self.confusion.scores[mode] = task_scores(trainer, pl_module, stream)
        return self.confusion.scores

    def export(self, folder: str | Path) -> None:
        """Write adapters (standard PEFT folders) and router (one small file) for ``lightning_cl.routing.load_routed``.

        Raises:
            RuntimeError: Before the first task has ended, or without LoRA layers.
        """
        from lightning_cl.routing.serving import save_routed

        router = self.router
        if router is None or self._bank is None:
            raise RuntimeError(
                "There is nothing to export: no task has ended yet, or the module has no LoRA layers. Export after a fit."
            )
        save_routed(folder, router, self._bank, self._stored)

    # ------------------------------------------------------------------ before a run

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Before training, prepare the task; before an evaluation, make room for the checkpoint's adapters."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            self._when_built(pl_module, lambda: self._connect(trainer, pl_module))

    @override
    def prepare_task(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add and activate the task's adapter."""
        if self.max_tasks is not None and self.task_index >= self.max_tasks:
            raise MisconfigurationException(
                f"Task {self.task_index} (the {self.task_index + 1}th) has no adapter: `max_tasks={self.max_tasks}` of"
                " `RLSRouterFitter` allocates no more. Set `max_tasks` to the number of tasks, or to None if the model is"
                " not sharded."
            )
        self._when_built(pl_module, lambda: self._prepare(trainer, pl_module))

    def _when_built(self, pl_module: pl.LightningModule, action: Any) -> None:
        """Run ``action`` now, or right after ``configure_model`` where the module builds its network there."""
        if not is_overridden("configure_model", pl_module) or any(True for _ in pl_module.parameters()):
            action()
            return
        original = pl_module.configure_model

        def configure_model() -> None:
            object.__delattr__(pl_module, "configure_model")
            original()
            action()

        # Lightning asks whether the hook is overridden by looking at its code.
        object.__setattr__(pl_module, "configure_model", configure_model)

    def _connect(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the parts of this module, and give it an adapter for each task that is known."""
        saved = (peek_callback_state(trainer, self.state_key) or {}).get("router") or {}
        if self._routed is None or self._routed.module is not pl_module:
            if self._routed is not None:
                self._routed.detach()
            layer = find_feature_layer(pl_module, self.feature_layer)
            self._bank = None
            if anatomy.has_lora(pl_module):
                from lightning_cl.routing.adapters import AdapterBank

                self._bank = AdapterBank(pl_module, layer, self.seed)
            self._routed = RoutedForward(pl_module, layer, self._bank)
            self._outdated = bool(self._stored)
        if self._bank is not None:
            known = max(int(saved.get("allocated") or 0), len(self._stored), self._ahead(trainer))
            for number in range(known):
                self._bank.add(_adapter_name(number))

    def _ahead(self, trainer: pl.Trainer) -> int:
        """How many adapters to allocate before the strategy shards, be it for an evaluation before the first task."""
        if self.max_tasks is None and isinstance(trainer.strategy, ModelParallelStrategy):
            return len(getattr(_stream(trainer), "train_tasks", ()))
        return self.max_tasks or 0

    def _prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._connect(trainer, pl_module)
        assert self._routed is not None
        if self.general_class and "GeneralSamples" not in _sources(trainer):
            raise MisconfigurationException(
                "`general_class=True` of `RLSRouterFitter` learns from replayed general samples, and none are replayed."
                " Add `ReplayMixer(GeneralSamples(...))` to the callbacks, or use `general_class=False`."
            )
        trained_below = [
            name
            for name, part in pl_module.named_modules()
            if name in shallow_modules(pl_module, self._routed.feature_layer)
            if not _in_adapter(name) and any(p.requires_grad for p in part.parameters(recurse=False))
        ]
        if self._bank is None:
            if trained_below:
                rank_zero_warn(
                    f"`RLSRouterFitter`: {trained_below[0]!r} and {len(trained_below) - 1} other modules at or below the"
                    f" feature layer {self._routed.feature_layer!r} are trained, so the features of earlier tasks move on"
                    " after they were fitted. Freeze them for a router that does not forget."
                )
            return
        if trained_below:
            raise MisconfigurationException(
                f"{trained_below[0]!r} is at or below the feature layer {self._routed.feature_layer!r} and is trained, so"
                " the router's features would move from task to task. Freeze it (`requires_grad_(False)`), or choose a"
                " lower `feature_layer`."
            )
        if "EpisodicMemory" in _sources(trainer):
            raise MisconfigurationException(
                "`EpisodicMemory` would train each task's adapter on the rows of other tasks, which the router never sends"
                " to it. Leave the memory out (adapters of earlier tasks are not changed, so nothing of them is"
                " forgotten), or use a shared adapter without `RLSRouterFitter`."
            )
        if isinstance(trainer.strategy, FSDPStrategy):
            raise MisconfigurationException(
                "`FSDPStrategy` flattens all adapters of a block into one parameter, of which one task's part cannot train"
                " alone. Use `strategy='cl_fsdp'` (or `ModelParallelStrategy`)."
            )
        names = [type(callback).__name__ for callback in getattr(trainer, "callbacks", [])]
        if "LoRAInterpolator" in names[names.index(type(self).__name__) + 1 if type(self).__name__ in names else 0 :]:
            raise MisconfigurationException(
                "`LoRAInterpolator` comes after `RLSRouterFitter` in the callbacks, so the router would store a task's"
                " adapter before the slow weights are put into it. Put `LoRAInterpolator` first."
            )
        bank = self._bank
        for number in range(self.task_index + 1):
            bank.add(_adapter_name(number))
        self._warn_of_other_weights(bank)
        bank.activate(_adapter_name(self.task_index))
        # Another callback's `on_task_start` may run the network before ours: sources that generate their rows.
        self._routed.enabled = False

    def _warn_of_other_weights(self, bank: AdapterBank) -> None:
        if self.task_index > 0:
            return
        shared = [n for n, p in bank.module.named_parameters() if p.requires_grad and not _in_adapter(n)]
        if shared:
            rank_zero_warn(
                f"`RLSRouterFitter`: {len(shared)} parameters outside the adapters are trained (first: {shared[0]!r})."
                " All tasks share them, so they can forget. Freeze them to train adapters alone."
            )
        if bank.template is not None and not bank.untrained(bank.template):
            rank_zero_warn(
                f"`RLSRouterFitter`: the adapter {bank.template!r} is not in its initial state. It is the pattern for the"
                " tasks' adapters and is itself not used: merge it into the model (`merge_and_unload`) to keep what it"
                " learnt."
            )

    # ------------------------------------------------------------------ while a task trains

    @override
    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen at the feature layer; send the adapters that are not trained to host memory."""
        routed = self.routed
        self._restore_adapters()
        if self._bank is not None:
            self._bank.forget_copies()
            self._bank.offload(keep=[_adapter_name(self.task_index)])
        routed.attach()
        routed.enabled = False
        routed.on_hidden = self._collect
        self._statistics.label(self.task_name or f"task {self.task_index}", self._adapter())
        if self.general_class:
            self._statistics.label(GENERAL, BASE)
            self.attachment.watch(self, routed.feature_layer)
            self.attachment.add_loss(self, "router", self._collect_general)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the task's sums, unless the run was resumed in the middle of it."""
        super().on_train_start(trainer, pl_module)
        self._restore_adapters()
        if trainer.current_epoch == 0 and trainer.fit_loop.epoch_loop.batch_progress.current.ready == 0:
            self._statistics.restart_task()
        if self._bank is not None:
            below = shallow_modules(pl_module, self.routed.feature_layer)
            # A checkpointed block must stay in training mode, or it would store what it is meant to recompute.
            self._frozen = [
                part
                for name, part in pl_module.named_modules()
                if name in below and part.training and not getattr(part, "gradient_checkpointing", False)
            ]

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Wait for the features of this batch. Each row counts once: in the first epoch."""
        for part in self._frozen:
            part.training = False  # no dropout: features are those of serving
        self._batch = batch if trainer.current_epoch == 0 else None

    def _collect(self, hidden: Tensor, arguments: Mapping[str, Any]) -> None:
        # Reference passes run without gradients; checkpointed blocks run again in backward, when the batch is taken.
        if self._batch is None or not torch.is_grad_enabled():
            return
        rows = task_rows(hidden, self._batch, arguments, self._joined_rows())
        if rows is not None:
            self._batch = None
            self._statistics.observe(rows, self._column(self._adapter()))

    def _joined_rows(self) -> int:
        """How many rows at the end of the training batch are replayed ones."""
        step = self.attachment.step
        return step.replay.count if step is not None and step.replay.layout == "joined" else 0

    def _collect_general(self, step: Step) -> None:
        rows = new_general_rows(step, self.routed.feature_layer, self._general_ids)
        if rows is not None:
            self._statistics.observe(rows, self._column(BASE))

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The batch is over, whether the feature layer was called on it or not."""
        self._batch = None

    @override
    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fit the router; store the adapter."""
        seen = sum(distributed.sum_over_ranks([self._statistics.rows_in_task]))
        if seen == 0 and not self._knows(self._adapter()):
            raise MisconfigurationException(
                f"No features of task {self.task_index} were seen: the feature layer {self.routed.feature_layer!r} was"
                " never called on a whole training batch. Choose a `feature_layer` that `training_step` runs once on the"
                " batch."
            )
        self._statistics.end_task()
        if self._bank is not None:
            name = _adapter_name(self.task_index)
            self._stored[name] = self._bank.snapshot(name)
            self._bank.active = None
        self._statistics.weight()
        self._statistics.rest()
        self._stop_listening()

    def _stop_listening(self) -> None:
        for part in self._frozen:
            part.training = True
        self._batch, self._frozen = None, []
        if self._routed is not None:
            self._routed.on_hidden = None
            self._routed.prompt, self._routed.on_routes = None, None
            if self._evaluation is not None:
                self._evaluation.clear()
                self._evaluation = None
            self._routed.router, self._routed.enabled = self._fitted(), True
            if self._routed.router is None:
                self._routed.detach()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """From here on the module routes by itself, in evaluation mode and in ``generate``."""
        super().teardown(trainer, pl_module, stage)
        self._stop_listening()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """As after an ordinary end."""
        super().on_exception(trainer, pl_module, exception)
        self._stop_listening()

    # ------------------------------------------------------------------ evaluation

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
        self._restore_adapters()
        in_task = trainer.state.fn == "fit" and self._clock.in_task
        routed.router = self._fitted(running=in_task)
        routed.enabled = routed.router is not None or self.evaluate_with != "routed"
        routed.attach()
        self._evaluation = EvaluationRouting(routed, self.confusion)

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
        self._end_evaluation(trainer)

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the confusion matrix."""
        self._end_evaluation(trainer)

    @override
    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The batches are over."""
        self._end_evaluation(trainer, counted=False)

    # ------------------------------------------------------------------ state

    @override
    def state_dict(self) -> dict[str, Any]:
        """Statistics, seed, the finished tasks' adapters and the confusion matrices."""
        bank = self._bank
        router = {
            "statistics": self._statistics.state_dict(),
            "adapters": {name: dict(weights) for name, weights in self._stored.items()},
            "allocated": 0 if bank is None else len(bank.names),
            "serving": {} if bank is None else {**bank.description(), "min_margin": self.min_margin},
            "general_ids": sorted(self._general_ids),
            "confusion": self.confusion.state_dict(),
        }
        return {**super().state_dict(), "router": router}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state, before or after the task has started."""
        super().load_state_dict(state_dict)
        if "router" not in state_dict:
            return
        state = state_dict["router"]
        self._statistics.load_state_dict(state["statistics"])
        self._stored = {name: dict(weights) for name, weights in state["adapters"].items()}
        self._general_ids = set(state["general_ids"])
        self.confusion.load_state_dict(state["confusion"])
        self._outdated = True

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write the running task's sums of all ranks, which rank 0 goes on with."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if distributed.world_size() > 1 and "callbacks" in checkpoint:
            self._statistics.sum_over_ranks()
            self._general_ids = set().union(*distributed.gather_objects(self._general_ids))
            checkpoint["callbacks"][self.state_key] = self.state_dict()
            if distributed.rank() != 0:
                self._statistics.restart_task()

    # ------------------------------------------------------------------ inside

    def _adapter(self) -> str:
        """What stands for the running task in the router's classes (without LoRA layers there is no such adapter)."""
        return _adapter_name(self.task_index)

    def _column(self, adapter: str) -> int:
        return next(i for i, c in enumerate(self._statistics.classes) if c.adapter == adapter)

    def _knows(self, adapter: str) -> bool:
        counts = self._statistics.total.counts.tolist()
        return any(
            c.adapter == adapter and i < len(counts) and counts[i] for i, c in enumerate(self._statistics.classes)
        )

    def _fitted(self, running: bool = False) -> AnalyticRouter | None:
        statistics = self._statistics
        if running:
            if not sum(distributed.sum_over_ranks([statistics.rows_in_task])) and not statistics.total.num_classes:
                return None
        elif not statistics.total.num_classes:
            return None
        weight, seen = statistics.weight(running)
        if self._routed is None or statistics.expansion is None:
            return None
        layer = self._routed.feature_layer
        classes: list[RouteClass] = list(statistics.classes)
        return AnalyticRouter(layer, statistics.expansion, classes, weight, seen, self.min_margin)

    def _restore_adapters(self) -> None:
        if self._outdated and self._bank is not None:
            for name, whole in self._stored.items():
                self._bank.restore(name, whole)
        self._outdated = False


def _adapter_name(task_index: int) -> str:
    return f"task_{task_index}"


def _in_adapter(name: str) -> bool:
    return "lora_" in name


def _stream(trainer: pl.Trainer) -> Any:
    return getattr(trainer, "datamodule", None)


def _sources(trainer: pl.Trainer) -> set[str]:
    """Kinds of the replay sources in the Trainer's callbacks."""
    callbacks: list[Any] = getattr(trainer, "callbacks", [])
    return {
        type(source).__name__
        for callback in callbacks
        if getattr(callback, "adds_replay_rows", False)
        for source in callback.sources
    }


def _check(
    expansion_dim: int, ridge: float | str, min_margin: float | None, max_tasks: int | None, evaluate_with: str
) -> None:
    if expansion_dim < 1:
        raise MisconfigurationException(
            f"`expansion_dim={expansion_dim}` of `RLSRouterFitter` leaves no features. Use some thousands, such as 4096."
        )
    if ridge != "auto" and (isinstance(ridge, str) or not 0 < ridge < float("inf")):
        raise MisconfigurationException(
            f"`ridge={ridge!r}` of `RLSRouterFitter`: the router's system needs a ridge above 0. Use a positive number, or"
            " 'auto' to choose it by leave-one-out error."
        )
    if min_margin is not None and min_margin < 0:
        raise MisconfigurationException(
            f"`min_margin={min_margin}` of `RLSRouterFitter` can never be undercut: a margin is at least 0. Use a number"
            " from 0 to 1, or None to always route."
        )
    if max_tasks is not None and max_tasks < 1:
        raise MisconfigurationException(
            f"`max_tasks={max_tasks}` of `RLSRouterFitter` allocates no adapter. Use the number of tasks, or None."
        )
    check_mode(evaluate_with)
