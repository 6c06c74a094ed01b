# SPDX-License-Identifier: Apache-2.0
"""The one place that touches a user's LightningModule: rows in, losses in, activations and reference passes out.

Lightning lets no callback replace a batch or a loss, so the attachment wraps four methods of the module *instance*
(``on_after_batch_transfer``, ``training_step``, ``manual_backward``, and ``per_row_loss`` where a module has one) and
hooks the network, for the duration of a fit; when the last callback lets go, the module is exactly what it was.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_cl import anatomy
from lightning_cl.finite import FiniteGuard
from lightning_cl.replay.joining import Added, Joiner, RowProvider
from lightning_cl.step import ReplayRows, Step
from lightning_cl.strategies.blocks import caches_ignored, is_compiled, run_uncompiled

__all__ = ["Attachment", "Step", "replay_rows"]

Term = Callable[[Step], "Tensor | None"]
Swap = Callable[[], AbstractContextManager[Any]]

_attached: weakref.WeakKeyDictionary[nn.Module, Attachment] = weakref.WeakKeyDictionary()
_running: Attachment | None = None


def replay_rows(batch: Any) -> Tensor:
    """Which rows of a training batch are replay rows: bool ``[rows]``, True at replay rows.

    Call it in ``training_step``, on the batch that it was given. Everywhere else, and without a
    :class:`~lightning_cl.callbacks.ReplayMixer`, no row is one. For a packed batch, the rows are its segments. Where the
    replay rows have a pass of their own (``layout="separate"``), all rows of its batch are.

    Args:
        batch: the argument of ``training_step``.

    Returns:
        One entry a row, on the CPU. Replay rows are always the last ones.

    Example:
        >>> replay_rows({"input_ids": torch.zeros(3, 5, dtype=torch.long)})
        tensor([False, False, False])
    """
    from lightning_cl.replay.rows import layout_of

    mask = torch.zeros(layout_of(batch).rows, dtype=torch.bool)
    step = _running.step if _running is not None else None
    if step is None or not step.replay.count:
        return mask
    if batch is step.replay_batch:
        return ~mask
    if batch is step.batch and step.replay.layout == "joined":
        mask[-step.replay.count :] = True
    return mask


class Attachment:
    """What the callbacks of one fit ask of one LightningModule.

    Callbacks register in ``on_task_start`` with the methods below; :meth:`install` then changes only what somebody
    asked for, so that an attachment nobody uses costs nothing.

    Attributes:
        module: the LightningModule.
        step: the running training step, None outside of ``training_step``.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.trainer = trainer
        self.module = module
        self.step: Step | None = None
        self._owners: list[Any] = []
        self._terms: list[tuple[Any, str, Term]] = []
        self._watched: dict[str, nn.Module] = {}
        self._references: dict[Hashable, Swap] = {}
        self._joiner = Joiner(trainer, module)
        self._pending: Added | None = None
        self._sink: dict[str, Any] | None = None
        self._in_reference = False
        self._row_losses: Tensor | None = None
        self._backwards = 0
        self._checked_hooks = False
        self._traced = False
        self._undo: list[Callable[[], None]] = []
        self._installed = False
        self._finite = FiniteGuard()
        # Numbers as they were last logged, and in which epoch.
        self._logged: dict[str, tuple[float, int]] = {}

    # ------------------------------------------------------------------ life

    @classmethod
    def attach(cls, trainer: pl.Trainer, module: pl.LightningModule, owner: Any) -> Attachment:
        """The module's attachment, made on first use; every caller is an owner until it calls :meth:`release`."""
        attachment = _attached.get(module)
        if attachment is None:
            attachment = _attached[module] = cls(trainer, module)
        attachment._owners.append(owner)
        return attachment

    def release(self, owner: Any) -> None:
        """Let go; when nobody holds on any more, the module is as it was before the fit."""
        self._owners = [other for other in self._owners if other is not owner]
        if self._owners:
            return
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        _attached.pop(self.module, None)

    def install(self) -> None:
        """Put in place what was asked for. Called when training starts; later calls do nothing."""
        if self._installed:
            return
        self._installed = True
        if not (self._terms or self._joiner.providers):
            return
        self._refuse_dataloader_iter()
        self._joiner.check()
        compiled = is_compiled(self.module)
        # Of compiled code, blocks that a strategy prepared leave the rest of the network in Python, and their own hooks.
        self._traced = is_compiled(self.module, but_prepared=True)
        # Dynamo traces hooks into the compiled graph; ours must run in Python, at every step.
        outside_graph = torch._dynamo.disable if compiled else (lambda hook: hook)
        if self._joiner.providers:
            self._wrap(self._batch_hook_owner(), "on_after_batch_transfer", self._after_batch_transfer)
        self._wrap(self.module, "training_step", self._training_step)
        if not self.module.automatic_optimization:
            self._wrap(self.module, "manual_backward", self._manual_backward)
        if self._joiner.needs_row_losses:
            self._wrap(self.module, "per_row_loss", self._per_row_loss)
        for name, part in self._watched.items():
            handle = part.register_forward_hook(outside_graph(functools.partial(self._capture, name)))
            self._undo.append(handle.remove)
        for network in self._reference_networks() if self._references else ():
            # First of all pre-hooks, also before FSDP gathers the parameters for the real call.
            handle = network.register_forward_pre_hook(
                outside_graph(self._run_references), prepend=True, with_kwargs=True
            )
            self._undo.append(handle.remove)
        self._undo.append(run_uncompiled(self.module, self._watched.values()))
        if self._traced:
            # Compiled code that predates a hook would silently go on without it, and without it afterwards.
            torch.compiler.reset()
            self._undo.append(torch.compiler.reset)

    # --------------------------------------------------- what callbacks ask for

    def add_loss(self, owner: Any, name: str, term: Term) -> None:
        """Add a term to the training loss.

        Args:
            owner: the callback.
            name: the term is logged as ``cl/NAME``, and its ratio to the module's own loss as ``cl/NAME_ratio``.
            term: gives a scalar with a graph, or None for nothing at this step. It runs after the module's forward, in
                the order of the callbacks.
        """
        self._terms.append((owner, name, term))

    def watch(self, owner: Any, module_name: str) -> None:
        """Record the output of a submodule on the replay rows, in the running forward and in reference passes.

        Raises:
            MisconfigurationException: if there is no such submodule, with the closest names.
        """
        self._watched[module_name] = anatomy.get_submodule(self.module, module_name)

    def add_reference(self, owner: Any, key: Hashable, swap: Swap) -> None:
        """Run the replay rows once more in each step, without gradients, under ``swap()``, before the real forward.

        Args:
            owner: the callback.
            key: callbacks that need the same reference give the same key and share one pass.
            swap: makes a context manager that puts the reference's weights in and takes them out.
        """
        self._references.setdefault(key, swap)

    def add_rows(self, owner: Any, provider: RowProvider) -> None:
        """Append replay rows to every training batch; several providers append in the order of the callbacks."""
        self._joiner.providers.append(provider)

    def drop_replay_labels(self, owner: Any, sources: Iterable[str] | None = None) -> None:
        """Replay rows (of these sources; default: all) carry no labels, so that the module's own loss ignores them."""
        self._joiner.unlabelled_sources.append(None if sources is None else frozenset(sources))

    def draw_ahead(self, owner: Any) -> None:
        """Draw the replay rows of a whole optimizer step at its first batch, and show them as ``step.replay.window``.

        A mean over all replay rows of an accumulated step needs their number before the first of its backward passes.
        Amounts that depend on the batch (``ratio``, ``token_ratio``) follow the step's first batch.
        """
        self._joiner.draws_ahead = True

    @functools.cached_property
    def network_name(self) -> str:
        """Dotted name of :attr:`network` inside the module."""
        return anatomy.find_backbone(self.module)[0]

    @functools.cached_property
    def network(self) -> nn.Module:
        """The network: for Hugging Face models the backbone, so that a reference pass computes no logits."""
        return anatomy.find_backbone(self.module)[1]

    def _reference_networks(self) -> list[nn.Module]:
        """The modules at whose call the reference passes may run; the first one called on the batch runs them.

        A Hugging Face model's backbone; in any other module whatever encloses the watched modules, since only
        ``training_step`` knows which of them it calls.
        """
        if self._pretrained:
            return [self.network]
        names = {name[:i] for name in self._watched for i, c in enumerate(name + ".") if c == "."} | {""}
        return [self.module.get_submodule(name) for name in sorted(names)]

    @functools.cached_property
    def _pretrained(self) -> bool:
        return anatomy.pretrained_model(self.module) is not None

    @functools.cached_property
    def _all_modules(self) -> list[nn.Module]:
        return list(self.module.modules())

    def check_finite(self) -> None:
        """Raise now if a term of an earlier step was not finite (on a GPU that is known one step late)."""
        self._finite.check()

    # ------------------------------------------------------------------ rows in

    def _batch_hook_owner(self) -> Any:
        """The object whose ``on_after_batch_transfer`` Lightning calls: the data module's if it overrides the hook."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is not None and is_overridden("on_after_batch_transfer", datamodule):
            return datamodule
        return self.module

    def _after_batch_transfer(self, original: Callable[..., Any], batch: Any, dataloader_idx: int) -> Any:
        batch = original(batch, dataloader_idx)
        if not self.trainer.training:
            return batch
        self._pending = self._joiner.add(batch)
        return self._pending.batch

    # ---------------------------------------------------------------- losses in

    def _training_step(self, original: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
        global _running
        if not self.trainer.training:
            # A module may call its own `training_step` while it validates.
            return original(batch, *args, **kwargs)
        self._finite.check()
        # Not told by identity: DDP and FSDP1 rebuild the batch on its way. Kept for the step's further closures (LBFGS).
        added = self._pending or Added(batch)
        batch_idx = args[0] if args else kwargs.get("batch_idx", 0)
        step = self.step = Step(batch, batch_idx, added.replay, replay_batch=added.separate)
        self._row_losses, self._backwards = None, 0
        _running = self
        try:
            raw: dict[str, Any] = {}
            with self._recording(raw if added.separate is None else None):
                output = original(batch, *args, **kwargs)
            if not self.module.automatic_optimization:
                self._check_manual()
                return output
            loss = output["loss"] if isinstance(output, Mapping) else output
            if loss is None:
                raise MisconfigurationException(
                    f"`training_step` returned None at batch {batch_idx} under automatic optimization, so there is no"
                    " loss for the callbacks' terms and replay rows. Return the loss, or use manual optimization."
                )
            loss = self._with_replay_loss(loss, added, raw, original, args, kwargs)
            loss = self._with_terms(loss, step, raw)
            return {**output, "loss": loss} if isinstance(output, Mapping) else loss
        finally:
            self.step, self._sink, _running = None, None, None

    def _with_replay_loss(
        self,
        loss: Tensor,
        added: Added,
        raw: dict[str, Any],
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """The module's loss on task and replay rows, weighted as asked."""
        if added.separate is not None:
            with self._recording(raw), _silent(self.module):
                output = original(added.separate, *args, **kwargs)
            replay_loss = output["loss"] if isinstance(output, Mapping) else output
            if added.replay_loss_counts:
                weight = added.task_weight
                loss = loss * weight + replay_loss * (1 - weight)
        elif self._joiner.needs_row_losses and added.replay.count:
            loss = added.weigh(self._row_losses)
        if added.replay.count:
            self._log("replay_rows", added.replay.count)
            self._log("replay_separate", added.separate is not None)
            if added.task_weight is not None:
                self._log("task_weight", added.task_weight)
        return loss

    def _log(self, name: str, value: Tensor | float) -> None:
        if not isinstance(value, Tensor):
            # Once, until it changes: what was logged stays until the epoch ends. As a tensor, since Lightning waits for
            # the device when it is given a number.
            if self._logged.get(name) == (value, self.trainer.current_epoch):
                return
            self._logged[name] = (value, self.trainer.current_epoch)
            value = torch.tensor(float(value)).to(self.module.device, non_blocking=True)
        self.module.log(f"cl/{name}", value, batch_size=1)

    def _with_terms(self, loss: Tensor, step: Step, raw: dict[str, Any], loss_index: int | None = None) -> Tensor:
        step.task_loss = loss.detach()
        step.activations = self._selected(step.replay, raw)
        self._check_hooks_fired(step)
        values: dict[str, Tensor] = {}
        for owner, name, term in self._terms:
            if loss_index is not None and getattr(owner, "loss_index", 0) != loss_index:
                continue
            value = term(step)
            if value is None:
                continue
            values[name] = value.detach()
            loss = loss + value
        for name, value in values.items():
            self._log(name, value)
            self._log(f"{name}_ratio", value / step.task_loss)
        self._finite.watch(values, step)
        return loss

    def _manual_backward(self, original: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.step is not None:
            # Once per training_step: a second backward through the added terms would find their graph gone.
            loss = self._with_terms(loss, self.step, self._sink or {}, loss_index=self._backwards)
            self._backwards += 1
        return original(loss, *args, **kwargs)

    def _check_manual(self) -> None:
        for owner, name, _ in self._terms:
            index = getattr(owner, "loss_index", 0)
            if index >= self._backwards:
                raise MisconfigurationException(
                    f"`training_step` called `self.manual_backward` {self._backwards} times, so the term {name!r} with"
                    f" `loss_index={index}` was never added. Set `loss_index` of `{type(owner).__name__}` to the"
                    " `manual_backward` call (counted from 0) whose loss it belongs to."
                )

    def _per_row_loss(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        self._row_losses = original(*args, **kwargs)
        return self._row_losses

    # -------------------------------------------- activations and reference passes

    @contextmanager
    def _recording(self, sink: dict[str, Any] | None) -> Any:
        self._sink = sink
        try:
            yield
        finally:
            # Manual optimization goes back here within the step; recomputed blocks in backward must not be recorded.
            self._sink = None

    def _capture(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._sink is None or self.step is None:
            return
        value = output[0] if isinstance(output, (tuple, list)) else getattr(output, "last_hidden_state", output)
        rows = self.step.replay.alone() if self._in_reference else self.step.replay
        # The first call that sees the whole batch counts: a module may run its network on other inputs as well.
        if name not in self._sink and rows.count and rows.fits(value):
            self._sink[name] = value
        elif name not in self._sink:
            self._sink.setdefault(f"unfit {name}", value)

    def _selected(self, rows: ReplayRows, raw: Mapping[str, Any]) -> dict[str, Tensor]:
        return {name: rows.select(raw[name]) for name in self._watched if name in raw} if rows.count else {}

    def _run_references(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        step, outer = self.step, self._sink
        if step is None or outer is None or self._in_reference or not step.replay.count or step.reference:
            return
        reduced = step.replay.arguments(args, kwargs)
        if reduced is None:
            return
        if step.replay.full and self._pretrained and not self._traced:
            _without_mask(reduced[1])
        self._in_reference = True
        # Through `__dict__`, since `nn.Module.__setattr__` on a thousand modules would cost more than the hooks.
        modules = [part for part in self._all_modules if part.training]
        try:
            for part in modules:
                part.__dict__["training"] = False
            for key, swap in self._references.items():
                raw: dict[str, Any] = {}
                self._sink = raw
                # Autocast keeps low-precision copies of weights: those of one set must not serve the other.
                torch.clear_autocast_cache()
                with swap(), torch.no_grad(), caches_ignored():
                    network(*reduced[0], **reduced[1])
                torch.clear_autocast_cache()
                step.reference[key] = self._selected(step.replay.alone(), raw)
        finally:
            for part in modules:
                part.__dict__["training"] = True
            self._in_reference = False
            self._sink = outer

    def _check_hooks_fired(self, step: Step) -> None:
        if self._checked_hooks or not step.replay.count:
            return
        self._checked_hooks = True
        silent = [name for name in self._watched if name not in step.activations]
        if silent:
            raise MisconfigurationException(
                f"The watched submodule(s) {silent} gave no tensor with one entry for each of the"
                f" {step.replay.total} rows (`[rows, tokens, D]` or `[rows, D]`) in the first training step: either"
                " `training_step` does not call them, or their output has another shape. Name a module that runs once on"
                " the whole batch."
            )
        missing = [str(key) for key in self._references if not step.reference.get(key) and self._watched]
        if missing:
            raise MisconfigurationException(
                f"The reference pass(es) {missing} did not run: `training_step` called none of"
                f" {[type(part).__name__ for part in self._reference_networks()]} on the batch. Call the network as a"
                " module (not its `forward` directly), with tensors that have one entry a row."
            )

    # ------------------------------------------------------------------ wrapping

    def _wrap(self, obj: Any, name: str, replacement: Callable[..., Any]) -> None:
        """Put ``replacement(original, ...)`` in the place of a method of one object, until the attachment ends."""
        own = vars(obj).get(name)
        original = getattr(obj, name)

        # Lightning reads the signatures of these methods, and asks whether they are overridden: `wraps` answers both.
        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return replacement(original, *args, **kwargs)

        object.__setattr__(obj, name, wrapper)

        def undo() -> None:
            if own is None:
                object.__delattr__(obj, name)
            else:
                object.__setattr__(obj, name, own)

        self._undo.append(undo)

    def _refuse_dataloader_iter(self) -> None:
        if "dataloader_iter" in inspect.signature(self.module.training_step).parameters:
            raise MisconfigurationException(
                f"`{type(self.module).__name__}.training_step` takes `dataloader_iter`, which bypasses the batch hooks, so"
                " no callback can add replay rows. Take `batch` and `batch_idx` instead."
            )


def _without_mask(arguments: dict[str, Any]) -> None:
    """Take the padding mask out of a transformers backbone's arguments, for rows that have no padding.

    Given a mask, transformers asks the device whether it masks anything; given none and no cache, whether the rows are
    packed. Either stops the host until all work of the last step is done, and then this pass's many small kernels are
    launched slower than they run. With a cache, which costs a copy of the keys and values, it asks nothing. A compiled
    network never asks, and a cache would compile it anew.
    """
    mask = arguments.get("attention_mask")
    if "use_cache" in arguments and isinstance(mask, Tensor) and mask.ndim == 2:
        arguments["attention_mask"], arguments["use_cache"] = None, True


@contextmanager
def _silent(module: pl.LightningModule) -> Any:
    """Drop what the module logs: a second pass in one step must not be counted in its metrics."""
    saved = {name: vars(module).get(name) for name in ("log", "log_dict")}
    for name in saved:
        object.__setattr__(module, name, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        for name, own in saved.items():
            if own is None:
                object.__delattr__(module, name)
            else:
                object.__setattr__(module, name, own)
