# SPDX-License-Identifier: Apache-2.0
"""Distillation on replay rows: the model's predictions stay where a reference had them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_cl import anatomy, weights
from lightning_cl.attachment import Step
from lightning_cl.callbacks.base import ContinualCallback
from lightning_cl.distributed import world_size
from lightning_cl.functional.distillation import chunked_cross_entropy, distillation_loss
from lightning_cl.functional.dual_weight import DualWeight
from lightning_cl.replay.anchor import WeightAnchor
from lightning_cl.replay.distillation_checks import (
    check_arguments,
    check_known_ahead,
    check_precompute,
    check_reference,
    check_sources,
)
from lightning_cl.replay.heads import check_head, head_parameters, replay_tokens
from lightning_cl.replay.reference_states import cut_differently
from lightning_cl.replay.source import replay_pad_values, replay_sources
from lightning_cl.replay.stored_reference import StoredReference

_Kind = Literal["initial", "previous_task"]
_KINDS: tuple[_Kind, _Kind] = ("initial", "previous_task")


class ReplayDistillation(ContinualCallback):
    """Keeps the model's predictions on replay rows where a reference had them, by the full KL divergence.

    On the replay rows of each batch (give a :class:`~lightning_cl.callbacks.ReplayMixer`) the term
    ``weight * mean over tokens of KL(reference || current)`` is added to the loss: the soft objective of self-generated
    replay (Marek et al., arXiv 2605.26097, section 3; their lambda is ``weight``), over the whole vocabulary, from
    float32 log-probabilities. The reference is the same model: one pass of the replay rows without gradient, with the
    adapters switched off or other weights swapped in, before the real forward pass. Both sides' logits are made in
    chunks of tokens, so no tensor of all logits ever exists. The rows carry no labels for the module's own loss.

    With ``target_kl`` the divergence is a constraint instead: the weight adapts in each step
    (:class:`~lightning_cl.functional.DualWeight`), so that the divergence stays at that many nats a token and the task
    is learnt as far as that allows. Logged: ``cl/distillation``, ``cl/distillation_kl``, ``cl/distillation_weight``.

    Memory beyond the replay rows: nothing with LoRA and ``anchor="initial"``; one copy of the trained parameters
    otherwise (sharded under FSDP), and one more while it is swapped in. The copy is part of checkpoints.

    Note:
        Single device, DDP, FSDP2; with a 4-bit base too (the head must not be quantized). A trained or tied head, norm
        or embedding belongs to the reference. A ``training_step`` that makes its labels itself, or cannot
        ignore rows without labels, needs ``ReplayMixer(layout="separate")``.

    Args:
        weight: weight of the term, >= 0; with ``target_kl`` the first weight, from 0.001 to 1000.
        target_kl: divergence to hold, in nats a token.
        objective: ``"distillation"``, or ``"labels"``: cross entropy of the replay rows' own tokens (the paper's hard
            objective, the weaker one).
        temperature: both sides' logits are divided by it.
        anchor: the reference. ``"initial"``: the model before the first task (with LoRA: the adapters off);
            ``"previous_task"``: as it stood when this task began (the paper); ``"auto"``: initial, but for
            rows of past tasks (episodic memory, past tasks' own samples) previous_task, since the initial model never
            learnt them.
        sources: class names of the replay sources whose rows are distilled, the others keep their labels; by default
            all. ``["SelfGenerated"]`` beside an ``EpisodicMemory`` leaves the memory to the task's own loss.
        reference: full fine-tuning only: a frozen copy of the LightningModule, or of its Hugging Face model, instead of
            the weights that the run starts with.
        offload_reference: keep copied weights on the CPU; each step moves them to the device and back out.
        precompute: take the reference of rows that are known ahead (``SelfGenerated``, ``GeneralSamples``) once, in
            large batches, instead of in each step. It costs ``2 * hidden size`` bytes of host memory a token in
            bfloat16, and saves the pass of each step: most of it where a row is used again, or where the model is so
            small that its kernels run faster than they are launched. Not for a trained head, nor under FSDP1.
        chunk_size: tokens whose logits exist at once; by default such that they fill 128 MiB.

    Raises:
        ValueError: for a number out of range, or options that contradict each other.
        MisconfigurationException: before training, without replay rows, for a model without a language-model head or
            one whose logits are made otherwise than by its head, and for a reference that is the model being trained.

    Example:
        >>> from lightning_cl.callbacks import ReplayMixer
        >>> from lightning_cl.replay import SelfGenerated
        >>> callbacks = [ReplayMixer(SelfGenerated(pool_size=512)), ReplayDistillation(weight=3.0)]

    In YAML::

        callbacks+:
          - class_path: lightning_cl.callbacks.ReplayDistillation
            init_args:
              target_kl: 0.005
    """

    def __init__(
        self,
        weight: float = 1.0,
        target_kl: float | None = None,
        objective: Literal["distillation", "labels"] = "distillation",
        temperature: float = 1.0,
        anchor: Literal["auto", "initial", "previous_task"] = "auto",
        sources: list[str] | None = None,
        reference: nn.Module | None = None,
        offload_reference: bool = False,
        precompute: bool = False,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        check_arguments(weight, target_kl, objective, temperature, anchor, sources, reference, precompute, chunk_size)
        self.weight = weight
        self.target_kl = target_kl
        self.objective = objective
        self.temperature = temperature
        self.anchor = anchor
        self.sources = sources
        self.offload_reference = offload_reference
        self.precompute = precompute
        self.chunk_size = chunk_size
        # In a list, so that Lightning's binding of methods and PyTorch's registration pass it by.
        self._given = [reference] if reference is not None else []
        self._dual = DualWeight(target_kl, initial=weight) if target_kl is not None else None
        self._anchors = {kind: WeightAnchor(kind, offload_reference) for kind in _KINDS}
        self._kind_of: dict[str, _Kind] = {}
        self._used: list[_Kind] = []
        self._keys: dict[_Kind, Any] = {}
        self._stored: dict[_Kind, StoredReference] = {}
        self._watched = ""
        self._head: nn.Module | None = None
        self._teacher_heads: dict[_Kind, tuple[Tensor, Tensor | None]] = {}
        self._module_ref: weakref.ref[pl.LightningModule] | None = None

    @property
    def _module(self) -> pl.LightningModule | None:
        # Weak: between two fits the callback's memory must not keep the model alive.
        return None if self._module_ref is None else self._module_ref()

    @property
    def reference(self) -> nn.Module | None:
        """The frozen copy that was given."""
        return self._given[0] if self._given else None

    # ------------------------------------------------------------------ the task's start

    @override
    def prepare_task(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what cannot work."""
        self.require_replay_rows(trainer)
        anatomy.find_head(pl_module)
        check_sources(self.sources, replay_sources(trainer))
        if self.reference is not None:
            check_reference(self.reference, pl_module)
        if self.precompute:
            check_known_ahead(self._distilled(trainer))

    @override
    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ask for the network's output on the replay rows, now and from the references."""
        self._module_ref = weakref.ref(pl_module)
        self._head = anatomy.find_head(pl_module)[1]
        self._transform = anatomy.logit_transform(pl_module)
        check_head(trainer, pl_module)
        for anchor in self._anchors.values():
            anchor.rebind()
        self._kind_of = {source.name: self._kind(source) for source in replay_sources(trainer)}
        wanted = {self._kind_of[source.name] for source in self._distilled(trainer)}
        self._used = [kind for kind in _KINDS if kind in wanted] if self.objective == "distillation" else []
        self._watched = self.attachment.network_name
        self.attachment.watch(self, self._watched)
        # A head that is trained is part of the reference, and only a pass of our own can look at it.
        trained = any(p.requires_grad for p in self._head.parameters())
        self._stored = {kind: StoredReference() for kind in self._used} if self.precompute else {}
        if self._stored:
            check_precompute(trainer, pl_module, trained)
        self._keys = {kind: (kind, f"head of {id(self)}") if trained else kind for kind in self._used}
        for kind, key in () if self._stored else self._keys.items():
            self.attachment.add_reference(self, key, partial(self._inside, kind, trained))
        self.attachment.drop_replay_labels(self, self.sources)
        self.attachment.add_loss(self, "distillation", self._term)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy the weights that the reference needs, now that everything is restored."""
        resumed = self._clock.in_task
        super().on_train_start(trainer, pl_module)
        for kind in self._used:
            anchor = self._anchors[kind]
            if anchor.taken and (kind == "initial" or resumed):
                continue
            if kind == "initial" and self.task_index > 0 and not self._given and anchor.names(pl_module):
                rank_zero_warn(
                    f"`ReplayDistillation` first sees the model at task {self.task_index}: its"
                    ' `anchor="initial"` is the model as it is now. Keep the callback object for all Trainers, or resume'
                    " from a checkpoint that has it."
                )
            anchor.take(pl_module, _named(self.reference, pl_module) if self.reference is not None else None)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Take the reference of rows that are known ahead, where they are new; the batch's own are drawn by now."""
        for kind, stored in self._stored.items():
            sources = [source for source in self._distilled(trainer) if self._kind_of[source.name] == kind]
            versions = tuple(source.version for source in sources)
            if stored.made_for != versions:
                rows = [row for source in sources for row in source.known_rows()]
                assert self._head is not None
                config: Any = anatomy.pretrained_model(pl_module).config  # type: ignore[union-attr]
                size = config.get_text_config().hidden_size * next(self._head.parameters()).element_size()
                with self._anchors[kind].inside(pl_module):
                    stored.take(
                        trainer, pl_module, self._watched, rows, replay_pad_values(trainer), size, made_for=versions
                    )

    def _distilled(self, trainer: pl.Trainer) -> list[Any]:
        sources = replay_sources(trainer)
        return [source for source in sources if self.sources is None or source.name in self.sources]

    def _kind(self, source: Any) -> _Kind:
        if self.anchor != "auto":
            return self.anchor
        past = source.holds_past_tasks
        return "previous_task" if past and self.reference is None else "initial"

    @contextmanager
    def _inside(self, kind: _Kind, keep_head: bool) -> Iterator[None]:
        assert self._module is not None
        assert self._head is not None
        with self._anchors[kind].inside(self._module):
            if keep_head:
                with torch.no_grad():
                    weight, bias = head_parameters(self._head)
                    self._teacher_heads[kind] = (weight.clone(), None if bias is None else bias.clone())
            yield

    # ------------------------------------------------------------------ the term

    def _term(self, step: Step) -> Tensor | None:
        rows = step.replay
        if rows.count == 0:
            return None
        groups: dict[_Kind, list[int]] = {}
        for i, name in enumerate(rows.sources):
            if self.sources is None or name in self.sources:
                groups.setdefault(self._kind_of[name], []).append(i)
        if self.objective == "labels" and groups:
            groups = {"initial": sorted(i for group in groups.values() for i in group)}
        total: Tensor | None = None
        tokens: Tensor | None = None
        for kind, group in groups.items():
            value, count = self._group_loss(step, kind, group)
            # Each group's mean counts by its tokens, so that the sum is the mean over all of them.
            total = value * count if total is None else total + value * count
            tokens = count if tokens is None else tokens + count
        self._teacher_heads.clear()
        loss = None if total is None or tokens is None else total / tokens.clamp_min(1)
        weight: Any = self.weight
        assert self._module is not None
        if self._dual is not None:
            weight = self._dual.update(self._mean_over_ranks(loss, step))
            self._module.log("cl/distillation_weight", weight, batch_size=1)
        if loss is None:
            return None
        if self.objective == "distillation":
            self._module.log("cl/distillation_kl", loss.detach(), batch_size=1)
        return weight * loss

    def _group_loss(self, step: Step, kind: _Kind, group: list[int]) -> tuple[Tensor, Tensor]:
        assert self._head is not None
        rows, hidden = step.replay, step.activations[self._watched]
        if hidden.ndim != 3 or rows.token_mask is None:
            raise MisconfigurationException(
                f"`ReplayDistillation` needs a prediction for each token, and the network gives a tensor of shape"
                f" {tuple(hidden.shape)} on the replay rows. Use it with a causal language model on token batches."
            )
        weight, bias = head_parameters(self._head)
        mask = _rows(rows.token_mask, group)
        hidden = _rows(hidden, group)
        if self.objective == "labels":
            targets = _rows(replay_tokens(step), group)[:, 1:]
            kept = mask[:, 1:]
            states = hidden[:, : targets.shape[1]]
            kept = kept[:, : targets.shape[1]]
            value = chunked_cross_entropy(states, targets, weight, bias, self._transform, kept, self.chunk_size)
            return value, kept.sum()
        if self._stored:
            if hidden.shape[1] != mask.shape[1]:
                raise cut_differently(f"{hidden.shape[1]} tokens a row, the batch {mask.shape[1]}")
            teacher = self._stored[kind].batch([rows.ids[i] for i in group], mask)
        else:
            teacher = _rows(step.reference[self._keys[kind]][self._watched], group)
        teacher_weight, teacher_bias = self._teacher_heads.get(kind, (None, None))
        value = distillation_loss(
            hidden,
            teacher[:, : hidden.shape[1]],
            weight,
            teacher_weight,
            bias,
            self._transform,
            None if rows.full else mask,
            self.temperature,
            self.chunk_size,
            teacher_bias,
        )
        return value, mask.sum()

    def _mean_over_ranks(self, loss: Tensor | None, step: Step) -> Tensor:
        """The measured divergence, the same on every rank: the weights of the ranks must not part."""
        device = step.activations[self._watched].device
        value = torch.zeros(2, device=device)
        if loss is not None:
            value = torch.stack([loss.detach().float(), torch.ones((), device=device)])
        if world_size() > 1:
            torch.distributed.all_reduce(value)
        # No rank has a row to distil: nan, which leaves the weight where it is.
        return value[0] / value[1]

    @override
    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say whether the target was met."""
        if self._dual is None:
            return
        met, average, weight = self._dual.status()
        if not met:
            rank_zero_warn(
                f"`ReplayDistillation(target_kl={self.target_kl})`: the target was not met. The divergence ended at"
                f" {average:.4g} nats a token with the weight at {weight:.4g}. Train longer or with a lower learning rate,"
                " give more replay rows, or raise `target_kl`."
            )

    # ------------------------------------------------------------------ state

    @override
    def state_dict(self) -> dict[str, Any]:
        """The copied weights, whole, and the controller. Collective under sharding."""
        return {
            **super().state_dict(),
            "anchors": {kind: anchor.state_dict(self._module) for kind, anchor in self._anchors.items()},
            "dual": None if self._dual is None else self._dual.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take both back; a checkpoint that was written without this callback changes nothing."""
        super().load_state_dict(state_dict)
        for kind, whole in state_dict.get("anchors", {}).items():
            self._anchors[kind].load_state_dict(whole)
        if self._dual is not None and state_dict.get("dual") is not None:
            self._dual.load_state_dict(state_dict["dual"])


def _rows(tensor: Tensor, group: list[int]) -> Tensor:
    """The rows of a group, without a copy where they follow each other (an index also makes the host wait)."""
    first, last = group[0], group[-1] + 1
    return tensor[first:last] if last - first == len(group) else tensor[torch.tensor(group, device=tensor.device)]


def _named(reference: nn.Module, pl_module: pl.LightningModule) -> dict[str, Tensor]:
    """The reference's tensors under the names that they have in the LightningModule."""
    prefix = ""
    if not isinstance(reference, pl.LightningModule):
        prefix = anatomy.name_of(pl_module, anatomy.pretrained_model(pl_module)) + "."  # type: ignore[arg-type]
    return {weights.clean_name(prefix + name): p.detach() for name, p in reference.named_parameters()}
