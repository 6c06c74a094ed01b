# SPDX-License-Identifier: Apache-2.0
"""I-LoRA: a slow copy of the trained weights that averages over the run and holds the fast ones to what it knew."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_cl import anatomy, weights
from lightning_cl.attachment import Step
from lightning_cl.callbacks.base import ContinualCallback
from lightning_cl.functional.interpolation import consistency_loss, half_life_to_decay, remaining_share
from lightning_cl.replay.source import replay_mixers
from lightning_cl.slow_weights import SlowWeights, averaged_parameters

# An average that still holds more than this share of the weights of before the task has hardly seen the task.
_LARGEST_SHARE_OF_BEFORE = 0.1


class LoRAInterpolator(ContinualCallback):
    """Averages the trained weights over the run, evaluates the average, and keeps the trained ones near it on replay.

    I-LoRA (Ren et al., arXiv 2402.18865, "Analyzing and Reducing Catastrophic Forgetting in Parameter Efficient
    Tuning"): the *fast* weights are trained; the *slow* ones start as an exact copy and follow,
    ``slow <- decay * slow + (1 - decay) * fast`` after each optimizer step, so they move along the low-loss valley
    between the minima of successive tasks. On the replay rows of each step (give a
    :class:`~lightning_cl.callbacks.ReplayMixer`) the fast weights are pulled to the hidden states that the slow ones
    give: ``consistency_weight * MSE(hidden_fast, hidden_slow)``. Without replay rows it is the average alone.

    The slow weights are float32 copies of the averaged parameters (4 bytes each, divided by the number of ranks under
    FSDP) and never of the frozen or 4-bit base. Updating them needs no communication. The slow forward runs on the
    replay rows alone, without gradient and in evaluation mode, before the real one. Validation swaps the slow weights
    in and keeps one temporary copy of the fast ones. Checkpoints hold the fast weights in ``state_dict`` and the slow
    ones, whole, in this callback's state. When a task ends, the module holds the set that ``evaluate_with`` names, and
    the next task starts from it.

    Note:
        Single device, DDP, FSDP1 and FSDP2. With a 4-bit base the adapters are averaged. Parameters that start to
        train later (an unfreezing schedule) join at the next epoch with a copy of their own. With
        :class:`~lightning_cl.callbacks.RLSRouterFitter`, which trains a new adapter for each task, the average is kept
        per adapter and starts again with each. Under manual optimization a batch in which any optimizer stepped counts
        as one step.

    Example:
        >>> from lightning_cl.callbacks import LoRAInterpolator, ReplayMixer
        >>> from lightning_cl.replay import EpisodicMemory
        >>> callbacks = [ReplayMixer(EpisodicMemory(500)), LoRAInterpolator()]

    In YAML::

        trainer:
          callbacks+:
            - class_path: lightning_cl.callbacks.LoRAInterpolator
              init_args:
                half_life: 0.1

    Args:
        half_life: fraction of the task's optimizer steps after which a weight counts half in the average.
        decay: decay of one update (0.25 in the paper's released code, 0.99 to 0.9999 for a slow learner), instead of
            ``half_life``.
        warmup: the k-th update has decay ``min(1 - 1/(k+1), decay)``, with k counted over the whole life of the
            average: it is the plain mean of all weights until that would be slower than ``decay``.
        consistency_weight: weight of the consistency term (the paper's gamma); 0 leaves the slow forward out.
        evaluate_with: the set that validation uses and that the module holds after the task, ``"slow"`` or ``"fast"``.
        consistency: ``"mse"`` (the paper), or ``"one_sided"`` (its released code): only hidden values below the slow
            ones cost.
        layers: where hidden states are compared. ``"last"``: output of the final norm; ``"all"``: of each block but
            the last, and of the final norm (the paper); or a list of block indices and module names.
        parameters: which trained parameters are averaged. ``"auto"``: all, in a model with PEFT adapters, and an error
            in one without; ``"lora"``: those of LoRA layers alone; ``"trainable"``: all, in any model; anything else
            is a pattern for names, as in ``"*.mlp.*"``.
        update_every_n_steps: optimizer steps between two updates.
        export: write the set as a standard PEFT adapter folder under ``adapters/`` in the log folder after each task.

    Raises:
        MisconfigurationException: for a value outside its range; when the fit starts, for a model without the named
            parameters or layers; at its first step, if ``half_life`` is given and the task's length is unknown.
    """

    def __init__(
        self,
        half_life: float | None = 0.1,
        decay: float | None = None,
        warmup: bool = True,
        consistency_weight: float = 1.0,
        evaluate_with: Literal["slow", "fast"] = "slow",
        consistency: Literal["mse", "one_sided"] = "mse",
        layers: Literal["last", "all"] | list[int | str] = "last",
        parameters: str = "auto",
        update_every_n_steps: int = 1,
        export: Literal["slow", "fast"] | None = None,
    ) -> None:
        super().__init__()
        _check_arguments(half_life, decay, consistency_weight, layers, parameters, update_every_n_steps)
        for name, value, choices in (
            ("evaluate_with", evaluate_with, ("slow", "fast")),
            ("consistency", consistency, ("mse", "one_sided")),
            ("export", export, ("slow", "fast", None)),
        ):
            if value not in choices:
                raise MisconfigurationException(
                    f"`LoRAInterpolator({name}={value!r})` is not one of {', '.join(map(repr, choices))}."
                )
        self.half_life = half_life
        self.decay = decay
        self.warmup = warmup
        self.consistency_weight = consistency_weight
        self.evaluate_with = evaluate_with
        self.consistency = consistency
        self.layers = layers
        self.parameters = parameters
        self.update_every_n_steps = update_every_n_steps
        self.export = export
        self._average = SlowWeights()
        # Optimizer steps of the current task, and the Trainer's own count at the last of them.
        self._steps = 0
        self._global_step = 0
        self._begun = False
        self._task_decay = 0.0
        self._watched: list[str] = []
        self._said_no_rows = False
        self._evaluates_checkpoint = False

    def should_update(self, step_idx: int) -> bool:
        """Whether the slow weights follow after this optimizer step; override it to update at other times.

        Args:
            step_idx: index of the optimizer step in the task, from 0.
        """
        return (step_idx + 1) % self.update_every_n_steps == 0

    def teacher(self) -> AbstractContextManager[None]:
        """A context in which the module gives the hidden states that the fast weights are pulled to: the slow weights'.

        Override it to compare with others, such as :func:`lightning_cl.weights.adapters_disabled`.
        """
        return self._average.in_module()

    def reset(self) -> None:
        """Forget the average; the next task starts with a copy of the weights that it finds."""
        self._average = SlowWeights()

    def slow_weights(self) -> dict[str, Tensor]:
        """The slow weights, whole, float32, on the CPU, by parameter name. A collective call, kept on rank 0 alone."""
        return self._average.whole()

    # --------------------------------------------------------------- the task's start

    @override
    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the parameters and ask for the slow forward on replay rows."""
        self._begun = False
        self._average.bind(pl_module, averaged_parameters(pl_module, self.parameters))
        if self.export is not None and anatomy.peft_model(pl_module) is None:
            raise MisconfigurationException(
                f"`LoRAInterpolator(export={self.export!r})` writes PEFT adapter folders, and"
                f" `{type(pl_module).__name__}` holds no `PeftModel`. Wrap the network with `peft.get_peft_model`, or set"
                " `export=None` and take the weights from the checkpoint."
            )
        if self.consistency_weight == 0:
            return
        if not replay_mixers(trainer):
            self._say_no_rows()
            return
        self._watched = self._layer_names(pl_module)
        for name in self._watched:
            self.attachment.watch(self, name)
        self.attachment.add_reference(self, "slow", self.teacher)
        self.attachment.add_loss(self, "consistency", self._consistency)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the average, or go on with it after a restart."""
        resumed = self._clock.in_task
        self._begin(trainer, pl_module)
        super().on_train_start(trainer, pl_module)
        if not resumed:
            self._steps, self._global_step = 0, trainer.global_step
            self._task_decay = self._decay_of_task(trainer)
        if trainer.global_step > self._global_step:
            # The checkpoint was written between an optimizer step and its update.
            self._step_ended(trainer)
        self._global_step = trainer.global_step

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take in parameters that have started to train."""
        chosen = averaged_parameters(pl_module, self.parameters)
        self._average.join({n: p for n, p in chosen.items() if n not in self._average.parameters})

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let the slow weights follow, if the optimizer has stepped (it does not in each batch of an accumulation)."""
        if trainer.global_step > self._global_step:
            self._step_ended(trainer)

    # ------------------------------------------------------- evaluation and the task's end

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Within a fit, put the slow weights in."""
        if trainer.state.fn != "fit":
            self._evaluate_checkpoint(trainer, pl_module)
            return
        # The check of validation before training comes before `on_train_start`.
        self._begin(trainer, pl_module)
        if self.evaluate_with == "slow":
            self._average.hold()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the fast weights back, before any checkpoint callback saves."""
        self._average.let_go()

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate the slow weights of a checkpoint that holds both sets."""
        self._evaluate_checkpoint(trainer, pl_module)

    on_predict_start = on_test_start
    on_test_end = on_predict_end = on_validation_end

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Put the fast weights back, whatever happened in validation."""
        self._average.let_go()
        super().on_exception(trainer, pl_module, exception)

    @override
    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the set in the module that ``evaluate_with`` names."""
        self._begin(trainer, pl_module)
        self._take_best(trainer)
        if self.export is not None:
            name = f"task_{self.task_index}" + (f"_{self.task_name}" if self.task_name else "")
            folder = Path(trainer.log_dir or trainer.default_root_dir) / "adapters" / name
            self.save_adapter(pl_module, folder, self.export)
        if self.evaluate_with == "slow":
            self._average.write()

    def save_adapter(
        self, pl_module: pl.LightningModule, folder: str | Path, which: Literal["slow", "fast"] = "slow"
    ) -> None:
        """Write one set as a standard PEFT adapter folder, which ``PeftModel.from_pretrained`` loads. Collective.

        Args:
            pl_module: the module of the fit.
            folder: where to write; created.
            which: ``"slow"`` or ``"fast"``.
        """
        from lightning_cl.strategies.export import export_adapter

        active = anatomy.adapter_layers(pl_module)[0].active_adapters[0]
        export_adapter(pl_module, folder, active, state=self.slow_weights() if which == "slow" else None)

    # --------------------------------------------------------------------------- checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        """Both counters and the slow weights, whole. A collective call under sharding."""
        return {
            **super().state_dict(),
            **self._average.state_dict(),
            "decay": self._task_decay,
            "steps": self._steps,
            "global_step": self._global_step,
            "evaluate_with": self.evaluate_with,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint stood. One that was written without this callback starts the average anew."""
        super().load_state_dict(state_dict)
        if "slow" not in state_dict:
            return
        self._average.load_state_dict(state_dict)
        self._steps, self._global_step = state_dict["steps"], state_dict["global_step"]
        # Of the whole task: while a run is led back into the middle of it, the Trainer does not know its length.
        self._task_decay = state_dict["decay"]

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """In the middle of a validation, still save the fast weights as the model's."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if not self._average.held or "state_dict" not in checkpoint:
            return
        self._average.let_go()
        state = trainer.strategy.lightning_module_state_dict()
        # What a state dict holds may be the parameters' own memory, and the slow weights go in again.
        checkpoint["state_dict"] = {
            key: value.clone()
            if isinstance(value, Tensor) and weights.clean_name(key) in self._average.parameters
            else value
            for key, value in state.items()
        }
        self._average.hold()

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note that the module was given the fast weights of a checkpoint, though the slow ones may be evaluated."""
        self._evaluates_checkpoint = trainer.state.fn != "fit"

    # ----------------------------------------------------------------------------- private

    def _layer_names(self, pl_module: pl.LightningModule) -> list[str]:
        if self.layers == "last":
            return [anatomy.find_final_norm(pl_module)]
        if self.layers == "all":
            return [*anatomy.find_blocks(pl_module)[:-1], anatomy.find_final_norm(pl_module)]
        return [layer if isinstance(layer, str) else self._block_name(pl_module, layer) for layer in self.layers]

    def _block_name(self, pl_module: pl.LightningModule, index: int) -> str:
        blocks = anatomy.find_blocks(pl_module)
        if not -len(blocks) <= index < len(blocks):
            raise MisconfigurationException(
                f"`LoRAInterpolator(layers={self.layers})` names block {index}, and the model has {len(blocks)}. Use"
                f" indices from 0 to {len(blocks) - 1}, or module names."
            )
        return blocks[index]

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring the slow weights and the parameters together, once a task, when all that is restored is restored."""
        if self._begun:
            return
        self._begun = True
        weights.reshard(pl_module)
        if self.evaluate_with == "slow" and not self._clock.in_task:
            self._average.restart_where_changed(trainer.strategy.reduce_boolean_decision)
        self._average.start()

    def _take_best(self, trainer: pl.Trainer) -> None:
        """If ``fit_stream`` has put the fast weights of its best checkpoint in, take the slow ones of that checkpoint."""
        best = getattr(trainer.datamodule, "best_loaded", "") if hasattr(trainer, "datamodule") else ""
        if not best:
            return
        path = Path(best, "meta.pt") if Path(best).is_dir() else Path(best)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["callbacks"].get(self.state_key)
        if state is not None:
            self._average.load_state_dict(state)
            self._average.start()

    def _decay_of_task(self, trainer: pl.Trainer) -> float:
        steps = trainer.estimated_stepping_batches
        known = 0 < steps < float("inf")
        updates = max(1, int(steps) // self.update_every_n_steps) if known else 0
        if self.decay is None:
            if not known:
                raise MisconfigurationException(
                    f"`LoRAInterpolator(half_life={self.half_life})` is a fraction of the task's steps, and their number"
                    " is unknown (a loader without length, or `max_epochs=-1`). Set `decay`, or `max_steps` of the"
                    " Trainer."
                )
            assert self.half_life is not None
            decay = half_life_to_decay(self.half_life, updates)
        else:
            decay = self.decay
        if known:
            done = min(self._average.updates[n] for n in self._average.parameters) if self.warmup else None
            share = remaining_share(decay, updates, done)
            if share > _LARGEST_SHARE_OF_BEFORE:
                knob = f"decay={self.decay}" if self.decay is not None else f"half_life={self.half_life}"
                rank_zero_warn(
                    f"`LoRAInterpolator({knob})`: after the {updates} updates of this task its slow weights keep"
                    f" {share:.0%} of the weights of before, so they cover {1 - share:.0%} of the task. Set"
                    " `half_life=0.1` (a tenth of the task), or a lower `decay`."
                )
        return decay

    def _step_ended(self, trainer: pl.Trainer) -> None:
        step_idx = self._steps
        self._steps += 1
        self._global_step = trainer.global_step
        if self.should_update(step_idx):
            self._average.update(self._task_decay, self.warmup)

    def _consistency(self, step: Step) -> Tensor | None:
        if not step.replay.count:
            return None
        total: Tensor | None = None
        for name in self._watched:
            fast, slow = step.activations[name], step.reference["slow"][name]
            # A module may give one vector a row, to which no token mask applies.
            mask = step.replay.token_mask if fast.ndim > 2 and not step.replay.full else None
            loss = consistency_loss(fast, slow, mask, self.consistency)
            total = loss if total is None else total + loss
        assert total is not None
        return total * (self.consistency_weight / len(self._watched))

    def _evaluate_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Outside of a fit the module holds the right set, unless a checkpoint of the middle of a task was loaded."""
        if not self._evaluates_checkpoint:
            return
        self._evaluates_checkpoint = False
        if self.evaluate_with == "slow" and self._clock.in_task and self._average.whole():
            self._average.bind_all(pl_module)
            self._average.start()
            self._average.hold()

    def _say_no_rows(self) -> None:
        if not self._said_no_rows:
            self._said_no_rows = True
            rank_zero_warn(
                f"`LoRAInterpolator(consistency_weight={self.consistency_weight})` has no replay rows to compare the slow"
                " and fast weights on, so it only averages. Add `ReplayMixer(EpisodicMemory(500))` to the callbacks, or"
                " set `consistency_weight=0`."
            )


def _check_arguments(
    half_life: float | None,
    decay: float | None,
    consistency_weight: float,
    layers: Any,
    parameters: str,
    update_every_n_steps: int,
) -> None:
    infinity = float("inf")
    for wrong, found, why in (
        (
            decay is None and half_life is None,
            "half_life=None, decay=None",
            "does not say how fast the slow weights follow. Set one of them.",
        ),
        (
            decay is None and half_life is not None and not 0 < half_life < infinity,
            f"half_life={half_life}",
            "must be above 0: it is the fraction of a task's steps after which a weight counts half. Use 0.1, or set"
            " `decay`.",
        ),
        (
            decay is not None and not 0 <= decay < 1,
            f"decay={decay}",
            "must be in [0, 1): at 1 the slow weights would never move. Use 0.99, or `half_life`.",
        ),
        (
            not 0 <= consistency_weight < infinity,
            f"consistency_weight={consistency_weight}",
            "must be 0 or above. Use 0 for the average alone.",
        ),
        (
            layers not in ("last", "all") and (isinstance(layers, str) or not layers),
            f"layers={layers!r}",
            'must be "last", "all", or a list of block indices and module names that is not empty.',
        ),
        (
            not parameters,
            'parameters=""',
            'names nothing. Use "auto", "lora", "trainable", or a pattern of names.',
        ),
        (
            update_every_n_steps < 1,
            f"update_every_n_steps={update_every_n_steps}",
            "must be at least 1 optimizer step.",
        ),
    ):
        if wrong:
            raise MisconfigurationException(f"`LoRAInterpolator({found})` {why}")
