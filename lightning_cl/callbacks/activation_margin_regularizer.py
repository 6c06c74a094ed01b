# SPDX-License-Identifier: Apache-2.0
"""GeRe: hold the activations of replay rows in the states that the reference model gave them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_cl import anatomy, weights
from lightning_cl.callbacks.base import ContinualCallback
from lightning_cl.distributed import world_size
from lightning_cl.functional.margin import (
    activation_margin_loss,
    check_num_std,
    encode_activation_states,
    feature_imitation_loss,
)
from lightning_cl.replay.collecting import to_device, without_first_token
from lightning_cl.replay.identity import row_key
from lightning_cl.replay.reference_states import ReferenceOptions, ReferenceStates, cut_differently, fixed_rows
from lightning_cl.replay.source import replay_pad_values, replay_sources
from lightning_cl.step import Step
from lightning_cl.term_weight import TermWeight

_Objective = Literal["margin", "l1", "l2"]
_Reference = Literal["stored", "recompute"]
_Anchor = Literal["initial", "previous_task"]
_Reduction = Literal["violations", "mean"]


class ActivationMarginRegularizer(ContinualCallback):
    """Holds each activation of the replay rows in the state (negative, neutral, positive) that it had in the reference.

    GeRe, Zhang et al., arXiv 2508.04676: before the first task, the final norm's output on a fixed set of general texts
    is parted by two thresholds per hidden dimension (mean -+ ``num_std`` standard deviations). While the model learns,
    the same texts are replayed, and each activation pays its distance from the interval of its first state. The loss
    depends on the reference only through its state, so 2 bits an entry are kept, not 32, and give the same loss and
    gradients bit for bit. It uses the forward pass that replays the rows anyway; only the rows of sources with a fixed
    set (:class:`~lightning_cl.replay.GeneralSamples`) carry states.

    The reference is taken once, in the evaluation mode of the model that the run starts with, and belongs to the run:
    later tasks, new Trainers and resumed runs use the same. With LoRA it is the model with its adapters off.

    Args:
        weight: factor of the loss, >= 0; or ``"dynamic"``: the module's own loss over this one, at every step (GeRe's
            dynamic weight), at most ``max_weight``. With ``target``, the first weight.
        num_std: half width of the neutral interval in standard deviations, > 0.
        layers: dotted name(s) of the submodules to hold, inside the LightningModule; ``"final_norm"`` finds the norm
            before the head. Several layers: the mean of their losses.
        objective: ``"margin"``, or feature imitation, the paper's baselines: ``"l1"`` or ``"l2"`` distance from the
            reference activations themselves (kept in bfloat16, 8x the memory of the states).
        reference: ``"stored"``, or ``"recompute"``: one more pass of the replay rows per step without gradients, with
            the reference's weights (with LoRA: adapters off), shared with other callbacks that need it; no store.
        anchor: ``"initial"``: the model before the first task; ``"previous_task"``: as it stood when this task began.
        reduction: ``"violations"``, the paper's: per forward pass, the mean over the entries that are off their
            interval. Their number is known only after the forward pass, so the loss of an accumulated or distributed
            step is a mean of such means. ``"mean"``: over all entries of the optimizer step, exactly the same whatever
            the accumulation and the number of ranks. Feature imitation is always ``"mean"``.
        target: hold the loss at this value (> 0) instead of giving its weight: the weight adapts by dual ascent
            (:class:`~lightning_cl.functional.DualWeight`), at most ``max_weight``.
        max_weight: largest weight that ``"dynamic"`` or ``target`` may reach. 100 is the paper's largest fixed one.
        store: file of the stored states. None keeps them in memory and in every checkpoint; with a file a checkpoint
            holds only their content hash. A file of another model, tokenizer, set of rows or setting is refused.
        allow_other_model: use a ``store`` that was taken with other weights: an earlier run's reference, on purpose.
        skip_first_token: leave the first token of each row out: in many models it is an attention sink whose
            activations are hundreds of times the others' and widen every neutral interval.
        collect_batch_size: rows of one forward pass while the reference is taken.

    Logged: ``cl/activation_margin`` (times its weight) and ``cl/activation_margin_ratio``; ``cl/activation_margin_loss``
    and ``cl/activation_margin_weight`` where the weight adapts. (``activation_l1`` and ``activation_l2`` alike.)

    Note:
        Memory: tokens x D / 4 bytes a layer for ``"margin"`` (1,000 texts of 563 tokens, D = 4096: 0.58 GB), 2 x tokens
        x D for imitation. FSDP2 is supported, FSDP1 is not: its weights exist only inside a training step.

    Raises:
        ValueError: for values out of their range.
        MisconfigurationException: before the first step, if there are no replay rows or none that keep, no such layer,
            a layer whose output has no hidden dimension per row or token, or a store that belongs to something else.

    Example:
        >>> ActivationMarginRegularizer(weight="dynamic", num_std=1.0).objective
        'margin'

        In YAML::

            trainer:
              callbacks+:
                - class_path: lightning_cl.callbacks.ReplayMixer
                  init_args:
                    sources:
                      class_path: lightning_cl.replay.GeneralSamples
                      init_args: {data: general.jsonl}
                    rows_per_batch: 4
                - class_path: lightning_cl.callbacks.ActivationMarginRegularizer
    """

    def __init__(
        self,
        weight: float | Literal["dynamic"] = 1.0,
        num_std: float = 1.0,
        layers: str | list[str] = "final_norm",
        objective: _Objective = "margin",
        reference: _Reference = "stored",
        anchor: _Anchor = "initial",
        reduction: _Reduction = "violations",
        target: float | None = None,
        max_weight: float = 100.0,
        store: str | None = None,
        allow_other_model: bool = False,
        skip_first_token: bool = False,
        collect_batch_size: int = 16,
    ) -> None:
        super().__init__()
        for name, value, choices in (
            ("objective", objective, get_args(_Objective)),
            ("reference", reference, get_args(_Reference)),
            ("anchor", anchor, get_args(_Anchor)),
            ("reduction", reduction, get_args(_Reduction)),
        ):
            if value not in choices:
                raise ValueError(f"`ActivationMarginRegularizer({name}={value!r})`: use one of {list(choices)}.")
        if weight != "dynamic" and not (isinstance(weight, (int, float)) and 0 <= weight < math.inf):
            raise ValueError(
                f"`ActivationMarginRegularizer(weight={weight!r})`: the factor of a loss must be a finite number >= 0, or"
                ' "dynamic". Use 1.0, or `target=` to have it found.'
            )
        if target is not None and weight == "dynamic":
            raise ValueError(
                f'`ActivationMarginRegularizer(weight="dynamic", target={target})`: both set the weight. Keep one of them.'
            )
        if not 0 < max_weight < math.inf:
            raise ValueError(
                f"`ActivationMarginRegularizer(max_weight={max_weight})`: the bound of the weight must be a finite number"
                " > 0. Use the paper's largest weight, 100."
            )
        if target is not None and not 0 < float(weight) <= max_weight:
            raise ValueError(
                f"`ActivationMarginRegularizer(target={target}, weight={weight}, max_weight={max_weight})`: the first"
                " weight must lie above 0 and at most at the bound, since it moves by factors. Leave `weight` at 1.0."
            )
        check_num_std(num_std)
        self.layers = [layers] if isinstance(layers, str) else list(layers)
        if not self.layers:
            raise ValueError('`ActivationMarginRegularizer(layers=[])`: name at least one layer, or use "final_norm".')
        if collect_batch_size < 1:
            raise ValueError(f"`ActivationMarginRegularizer(collect_batch_size={collect_batch_size})`: at least 1.")
        if store is not None and reference == "recompute":
            raise ValueError(
                f'`ActivationMarginRegularizer(store={store!r}, reference="recompute")`: a reference that is recomputed in'
                ' each step is not stored. Leave `store` out, or use `reference="stored"`.'
            )
        self.weight = weight
        self.num_std = num_std
        self.objective = objective
        self.reference = reference
        self.anchor = anchor
        self.reduction = reduction
        self.target = target
        self.max_weight = max_weight
        self.store = store
        self.allow_other_model = allow_other_model
        self.skip_first_token = skip_first_token
        self.collect_batch_size = collect_batch_size
        self._weight = TermWeight(weight, target, max_weight)
        self._reference = ReferenceStates(
            ReferenceOptions(
                objective,
                reference,
                anchor,
                num_std,
                skip_first_token,
                store,
                allow_other_model,
                collect_batch_size,
            )
        )
        self._watched: list[str] = []
        self._sources: set[str] = set()
        # Tokens of an optimizer step, by its number.
        self._counted: tuple[int, Tensor] = (-1, torch.zeros(()))
        self._fused: Callable[..., Tensor] | None = None

    @property
    def term(self) -> str:
        """Name of the loss term in the logs."""
        return f"activation_{self.objective}"

    @property
    def _is_exact(self) -> bool:
        """Whether the loss is a mean over the entries of the whole optimizer step."""
        return self.reduction == "mean" or self.objective != "margin"

    @staticmethod
    def _accumulated(trainer: pl.Trainer, pl_module: pl.LightningModule) -> int:
        """Batches of an optimizer step: what Lightning divides each loss by."""
        return trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1

    # --------------------------------------------------------------- the task's start

    @override
    def prepare_task(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a run that has no replay rows."""
        self.require_replay_rows(trainer)

    @override
    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the layers, and ask for their activations on the replay rows."""
        if weights.sharding_root(pl_module) is not pl_module:
            raise MisconfigurationException(
                "`ActivationMarginRegularizer` runs the network before training, and under"
                f" `{type(trainer.strategy).__name__}` (FSDP1) the weights exist only inside a training step. Use FSDP2:"
                ' `strategy="cl_fsdp"` or `ModelParallelStrategy`.'
            )
        names = [
            anatomy.find_final_norm(pl_module) if name == "final_norm" else _full_name(pl_module, name)
            for name in self.layers
        ]
        self._watched = list(dict.fromkeys(names))
        for name in self._watched:
            self.attachment.watch(self, name)
        swap = self._reference.bind(pl_module)
        if self.reference == "recompute":
            self.attachment.add_reference(self, self.anchor, swap)
        self.attachment.add_loss(self, self.term, self._term)
        if self._is_exact and self._accumulated(trainer, pl_module) > 1:
            self.attachment.draw_ahead(self)
        # A new Trainer counts its steps from 0 again.
        self._weight.restart()
        self._counted = (-1, torch.zeros(()))

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the reference, unless the run has one; only now has everything of a checkpoint been restored."""
        sources = replay_sources(trainer)
        self._sources = self._covered_sources(sources)
        rows = [row for row in fixed_rows(sources) if row.source in self._sources]
        if not rows and (self.reference == "stored" or self.objective == "margin"):
            raise MisconfigurationException(
                f"`ActivationMarginRegularizer(reference={self.reference!r})` takes its reference on a fixed set of rows,"
                f" and none of the replay sources {[source.name for source in sources]} has one. Add `GeneralSamples(...)`"
                " to `ReplayMixer`'s sources"
                + (', or use `reference="recompute"`.' if self.objective != "margin" else ".")
            )
        self._reference.take(trainer, self._watched, rows, replay_pad_values(trainer), self.task_index)
        super().on_train_start(trainer, pl_module)

    # ----------------------------------------------------------------- the reference

    def _covered_sources(self, sources: list[Any]) -> set[str]:
        """Sources whose rows the term holds: the initial model has never learnt what a memory of past tasks keeps."""
        return {s.name for s in sources if self.anchor == "previous_task" or not s.holds_past_tasks}

    # ---------------------------------------------------------------------- the step

    def _term(self, step: Step) -> Tensor | None:
        replay = step.replay
        if not replay.count:
            return None
        covered = [i for i in range(replay.count) if self._covers(replay.ids[i], replay.sources[i])]
        hidden = {name: step.activations[name] for name in self._watched}
        masks = {name: self._mask(replay.token_mask, value, covered, replay.count) for name, value in hidden.items()}
        tokens = None
        if self._is_exact:
            first = self._watched[0]
            width = hidden[first].shape[1] if hidden[first].ndim == 3 else 0
            tokens = self._total_tokens(step, covered, masks[first], width)
        losses = []
        for name in self._watched if covered else ():
            reference = None
            if self.reference == "recompute":
                reference = _rows_of(step.reference[self.anchor][name], covered, replay.count)
            rows = _rows_of(hidden[name], covered, replay.count)
            losses.append(
                self._layer_loss(name, rows, masks[name], [replay.ids[i] for i in covered], reference, tokens)
            )
        loss = None if not losses else losses[0] if len(losses) == 1 else torch.stack(losses).mean()
        module = self.attachment.module
        factor, measured = self._weight.factor(loss, step.task_loss, module.global_step)  # type: ignore[arg-type]
        if measured is not None:
            module.log(f"cl/{self.term}_loss", measured, batch_size=1)
            module.log(f"cl/{self.term}_weight", factor, batch_size=1)
        return None if loss is None else factor * loss

    def _covers(self, key: str, source: str) -> bool:
        states = self._reference.states
        return key in states if states is not None else source in self._sources

    def _layer_loss(
        self,
        name: str,
        hidden: Tensor,
        mask: Tensor | None,
        keys: list[str],
        reference: Tensor | None,
        tokens: Tensor | None,
    ) -> Tensor:
        if self.objective != "margin":
            if reference is None:
                reference = self._reference.batch(name, keys, mask, hidden.device)
            total = feature_imitation_loss(hidden, reference, self._held(mask), self.objective, "sum")
        else:
            lower, upper = self._reference.thresholds(name, hidden.device)
            if reference is None:
                states = self._reference.batch(name, keys, mask, hidden.device)
            else:
                states = encode_activation_states(reference, lower, upper)
            reduction = "violations" if tokens is None else "sum"
            total = self._margin_loss(hidden, states, lower, upper, self._held(mask), reduction)
        return total if tokens is None else total / (tokens * hidden.shape[-1])

    def _margin_loss(self, hidden: Tensor, *args: Any) -> Tensor:
        if not hidden.is_cuda:
            return activation_margin_loss(hidden, *args)
        if self._fused is None:
            self._fused = torch.compile(activation_margin_loss, dynamic=True)
            try:
                return self._fused(hidden, *args)
            except Exception as error:
                # An accelerator without a working compiler: the same values, more memory traffic.
                rank_zero_warn(f"The margin loss runs unfused, since compiling it failed: {error}")
                self._fused = activation_margin_loss
        return self._fused(hidden, *args)

    def _held(self, mask: Tensor | None) -> Tensor | None:
        """The tokens that count."""
        return without_first_token(mask) if self.skip_first_token and mask is not None else mask

    def _mask(self, token_mask: Tensor | None, hidden: Tensor, covered: list[int], count: int) -> Tensor | None:
        if hidden.ndim not in (2, 3):
            raise MisconfigurationException(
                f"A watched module put out {list(hidden.shape)} on {count} replay rows; it must give `[rows, tokens, D]` or"
                " `[rows, D]`. Name another module in `layers=`."
            )
        if hidden.ndim == 2:
            return None
        if token_mask is None:
            return torch.ones(len(covered), hidden.shape[1], dtype=torch.bool, device=hidden.device)
        if token_mask.shape[1] != hidden.shape[1]:
            raise cut_differently(f"{hidden.shape[1]} tokens a row, the batch {token_mask.shape[1]}")
        return _rows_of(token_mask, covered, count)

    def _total_tokens(self, step: Step, covered: list[int], mask: Tensor | None, width: int) -> Tensor:
        """Tokens that count in the whole optimizer step, over the factors that Lightning and the ranks divide by."""
        trainer = self.attachment.trainer
        accumulated = self._accumulated(trainer, self.attachment.module)
        if self._counted[0] != trainer.global_step or accumulated == 1:
            device = step.task_loss.device  # type: ignore[union-attr]
            if accumulated > 1:
                skipped = int(self.skip_first_token and width > 0)
                rows = [row for row in step.replay.window or () if self._covers(row_key(row), row.source)]
                lengths = [row.length if width and "input_ids" in row.content else max(width, 1) for row in rows]
                count = torch.full((), float(sum(max(n - skipped, 0) for n in lengths)), device=device)
            else:
                held = self._held(mask)
                count = torch.full((), float(len(covered)), device=device) if held is None else held.sum().float()
            if world_size() > 1:
                dist.all_reduce(count)
            self._counted = (trainer.global_step, count)
        return self._counted[1].clamp_min(1.0) / (world_size() * accumulated)

    @override
    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say whether the target was met."""
        if self._weight.dual is not None:
            met, average, factor = self._weight.dual.status()
            if not met:
                rank_zero_warn(
                    f"`ActivationMarginRegularizer(target={self.target})` was not met: the loss ended at {average:.4g} with"
                    f" a weight of {factor:.4g} (`max_weight={self.max_weight}`). Raise either, or lower the learning rate."
                )

    # ------------------------------------------------------------------- checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        """The reference (its states, or the hash of their file) and the weight's controller. Collective if sharded."""
        return {
            **super().state_dict(),
            "reference": self._reference.state_dict(),
            "dual": self._weight.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take all of it back; a checkpoint that was written without this callback changes nothing."""
        super().load_state_dict(state_dict)
        if "reference" not in state_dict:
            return
        self._reference.load_state_dict(state_dict["reference"])
        self._weight.load_state_dict(state_dict["dual"])


def _full_name(module: pl.LightningModule, name: str) -> str:
    return anatomy.name_of(module, anatomy.get_submodule(module, name))


def _rows_of(tensor: Tensor, chosen: list[int], count: int) -> Tensor:
    """Some of the ``count`` replay rows; as a rule all, and then without a copy."""
    if len(chosen) == count:
        return tensor
    return tensor.index_select(0, to_device(torch.tensor(chosen, dtype=torch.long), tensor.device))
