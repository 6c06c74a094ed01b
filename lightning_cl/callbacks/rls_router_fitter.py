# SPDX-License-Identifier: Apache-2.0
"""One adapter a task, and an analytic router that picks it for each sample inside the pass that runs anyway."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from typing_extensions import override

from lightning_cl import anatomy, distributed
from lightning_cl.attachment import Step
from lightning_cl.callbacks.routed_evaluation import RoutedEvaluation
from lightning_cl.checkpoints import peek_callback_state
from lightning_cl.routing.checks import (
    check_arguments,
    check_features,
    check_finite,
    check_run,
    warn_of_shared_weights,
)
from lightning_cl.routing.collecting import FeatureCollector, new_general_rows
from lightning_cl.routing.evaluation import EvaluationMode
from lightning_cl.routing.features import find_feature_layer
from lightning_cl.routing.forward import RoutedForward
from lightning_cl.routing.router import BASE, AnalyticRouter, RouteClass
from lightning_cl.routing.statistics import RouterStatistics

if TYPE_CHECKING:
    from lightning_cl.routing.adapters import AdapterBank

GENERAL = "general"


class RLSRouterFitter(RoutedEvaluation):
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
    more while a task runs, and four more for a moment at its end; one adapter on the device, the other tasks' in host
    memory (FSDP: sharded, on the device).

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
            ``ReplayMixer`` replays; with its ``task_weight=0.99`` the adapters hardly train on them.
        evaluate_with: ``"routed"``, ``"oracle"`` (the adapter of the loader's own task; needs a ``TaskStream``), or
            ``"base"`` (no adapter): for comparison.
        compare: At the end of a ``fit_stream``, also test all tasks by oracle and with the base model, so that the
            report sets their scores beside the routed ones (two more evaluations).
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
        compare: bool = False,
        seed: int = 0,
    ) -> None:
        check_arguments(expansion_dim, ridge, min_margin, max_tasks)
        super().__init__(evaluate_with, compare)
        self.feature_layer = feature_layer
        self.expansion_dim = expansion_dim
        self.ridge = ridge
        self.min_margin = min_margin
        self.max_tasks = max_tasks
        self.general_class = general_class
        self.seed = seed
        self._statistics = RouterStatistics(expansion_dim, ridge, seed)
        self._stored: dict[str, dict[str, Tensor]] = {}  # whole weights of the finished tasks' adapters
        self._general_ids: set[str] = set()
        self._bank: AdapterBank | None = None
        self._outdated = False  # whether adapters in the model are older than the stored ones
        self._collector: FeatureCollector | None = None

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
        adapters = self._bank is not None
        check_run(trainer, adapters, self.general_class)
        check_features(pl_module, self._routed.feature_layer, adapters)
        if self._bank is None:
            return
        bank = self._bank
        for number in range(self.task_index + 1):
            bank.add(_adapter_name(number))
        if self.task_index == 0:
            warn_of_shared_weights(bank)
        bank.activate(_adapter_name(self.task_index))
        # Another callback's `on_task_start` may run the network before ours: sources that generate their rows.
        self._routed.enabled = False

    # ------------------------------------------------------------------ while a task trains

    @override
    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen at the feature layer; send the adapters that are not trained to host memory."""
        routed = self.routed
        self.restore_adapters()
        if self._bank is not None:
            self._bank.forget_copies()
            self._bank.offload(keep=[_adapter_name(self.task_index)])
        name = self.task_name or f"task {self.task_index}"
        self._statistics.label(name, self._adapter())
        self._collector = FeatureCollector(self._statistics, name, self._adapter(), self._joined_rows)
        routed.attach()
        routed.enabled = False
        routed.on_hidden = self._collector.collect
        if self.general_class:
            self._statistics.label(GENERAL, BASE)
            self.attachment.watch(self, routed.feature_layer)
            self.attachment.add_loss(self, "router", self._collect_general)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the task's sums, unless the run was resumed in the middle of it."""
        super().on_train_start(trainer, pl_module)
        self.restore_adapters()
        if trainer.current_epoch == 0 and trainer.fit_loop.epoch_loop.batch_progress.current.ready == 0:
            self._statistics.restart_task()
        if self._bank is not None and self._collector is not None:
            self._collector.freeze(pl_module, self.routed.feature_layer)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Wait for the features of this batch. Each row counts once: in the first epoch."""
        assert self._collector is not None
        self._collector.expect(batch if trainer.current_epoch == 0 else None)

    def _joined_rows(self) -> int:
        """How many rows at the end of the training batch are replayed ones."""
        step = self.attachment.step
        return step.replay.count if step is not None and step.replay.layout == "joined" else 0

    def _collect_general(self, step: Step) -> None:
        rows = new_general_rows(step, self.routed.feature_layer, self._general_ids)
        if rows is not None:
            self._statistics.observe(rows, self._statistics.label(GENERAL, BASE))

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The batch is over, whether the feature layer was called on it or not."""
        if self._collector is not None:
            self._collector.expect(None)

    @override
    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fit the router; store the adapter."""
        seen = sum(distributed.sum_over_ranks([self._statistics.rows_in_task]))
        if seen == 0 and not self._statistics.knows(self._adapter()):
            raise MisconfigurationException(
                f"No features of task {self.task_index} were seen: the feature layer {self.routed.feature_layer!r} was"
                " never called on a whole training batch. Choose a `feature_layer` that `training_step` runs once on the"
                " batch."
            )
        self._statistics.end_task()
        if self._bank is not None:
            name = _adapter_name(self.task_index)
            whole = self._bank.snapshot(name)
            check_finite(name, whole)
            self._stored[name] = whole
            self._bank.active = None
        self._statistics.weight()
        self._statistics.rest()
        self._stop_listening()

    def _stop_listening(self) -> None:
        if self._collector is not None:
            self._collector.release()
            self._collector = None
        if self._routed is not None:
            self._routed.on_hidden = None
            self._routed.prompt, self._routed.on_routes = None, None
            self.end_routing()
            self._routed.router, self._routed.enabled = self.fitted(), True
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

    # ------------------------------------------------------------------ the router and its adapters

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

    def _adapter(self) -> str:
        """What stands for the running task in the router's classes (without LoRA layers there is no such adapter)."""
        return _adapter_name(self.task_index)

    @override
    def fitted(self, running: bool = False) -> AnalyticRouter | None:
        """The router on the finished tasks; with ``running`` also on what was seen of the task that trains. Collective."""
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

    @override
    def restore_adapters(self) -> None:
        """Write the finished tasks' adapters into the module, where it has older ones."""
        if self._outdated and self._bank is not None:
            for name, whole in self._stored.items():
                self._bank.restore(name, whole)
        self._outdated = False


def _adapter_name(task_index: int) -> str:
    return f"task_{task_index}"


def _stream(trainer: pl.Trainer) -> Any:
    return getattr(trainer, "datamodule", None)
