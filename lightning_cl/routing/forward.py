# SPDX-License-Identifier: Apache-2.0
"""Routing inside the forward pass that is running anyway: features at one layer choose the adapters of the layers above."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cl import anatomy, weights
from lightning_cl.replay.rows import layout_of
from lightning_cl.routing.adapters import AdapterBank
from lightning_cl.routing.features import pool, prompt_mask
from lightning_cl.routing.mixed import MixedAdapters
from lightning_cl.routing.router import BASE, AnalyticRouter, Routes
from lightning_cl.strategies.blocks import is_compiled, run_uncompiled

__all__ = ["RoutedForward"]


@dataclass
class _Call:
    """What is known of the call of the network that runs now."""

    arguments: dict[str, Any] = field(default_factory=dict)
    depth: int = 0
    done: bool = False
    routed_tokens: int = 0

    @property
    def cache(self) -> Any:
        """The cache that the call goes on from."""
        return _cache(self.arguments.get)

    @property
    def cached_tokens(self) -> int:
        return int(self.cache.get_seq_length()) if hasattr(self.cache, "get_seq_length") else 0


class RoutedForward:
    """Hooks that route each sample of a batch to its adapter, in every forward pass and in ``generate``.

    At the feature layer the prompt's hidden states are pooled and routed; each LoRA layer above then adds the adapters
    of the routes, each to its own samples (:class:`~lightning_cl.routing.mixed.MixedAdapters`). Decode steps of a
    generation keep the routes of its prompt. It acts in evaluation mode only; in training the active adapter runs, as
    without it.

    Args:
        module: The LightningModule or network.
        feature_layer: Dotted name of the feature layer inside ``module``.
        bank: The adapters; None for a module without LoRA layers, whose routes are only reported.

    Attributes:
        router: The fitted router; None: nothing is routed.
        enabled: Whether to route in evaluation mode.
        last: Routes of the last pass that was routed.
        prompt: Prompt tokens ``[B, P]`` of the batch that an evaluation loop is about to run, so that a module which
            computes its loss or scores its options itself is routed by its prompts, too.
        on_routes: Called with the routes of each pass.
        on_hidden: Called with the feature layer's output and the arguments of the call, in every pass (training too).
    """

    def __init__(self, module: nn.Module, feature_layer: str, bank: AdapterBank | None = None) -> None:
        self.module = module
        self.feature_layer = feature_layer
        self.bank = bank
        self.router: AnalyticRouter | None = None
        self.enabled = True
        self.last: Routes | None = None
        self.prompt: Tensor | None = None
        self.on_routes: Callable[[Routes], None] | None = None
        self.on_hidden: Callable[[Tensor, dict[str, Any]], None] | None = None
        self._given: list[str] | str | None = None
        self._mixed: MixedAdapters | None = None
        self._call: _Call | None = None
        self._generating = 0
        self._reading = False
        self._kept: list[str] | None = None
        self._kept_keys: tuple[int, Tensor] | None = None
        self._undo: list[Callable[[], None]] = []

    # ------------------------------------------------------------------ life

    def attach(self) -> RoutedForward:
        """Put the hooks in place; a second call does nothing."""
        if self._undo:
            return self
        compiled = is_compiled(self.module, but_prepared=True)
        # Dynamo would trace hooks into the graph, where a Python list of routes cannot be read.
        outside: Callable[[Any], Any] = torch._dynamo.disable if compiled else (lambda hook: hook)
        backbone = anatomy.find_backbone(self.module, self.feature_layer)[1]
        callables = [anatomy.peft_model(self.module), anatomy.pretrained_model(self.module), backbone]
        for part in {id(p): p for p in callables if p is not None}.values():
            names = list(inspect.signature(part.forward).parameters)
            self._keep(part.register_forward_pre_hook(outside(functools.partial(self._enter, names)), with_kwargs=True))
            self._keep(part.register_forward_hook(outside(self._leave), always_call=True))
            if callable(getattr(part, "generate", None)):
                self._wrap_generate(part)
        layer = anatomy.get_submodule(self.module, self.feature_layer)
        self._keep(layer.register_forward_hook(outside(self._at_feature_layer)))
        self._undo.append(run_uncompiled(self.module, [layer]))
        if self.bank is not None:
            above = set(self.bank.layers)
            adapted = anatomy.adapter_layers(self.module)
            # In training these hooks do nothing and read nothing else, so that code without them is right.
            self._undo.append(run_uncompiled(self.module, adapted, training=False))
            layers = {id(layer) for layer in adapted}
            for name, part in self.bank.model.base_model.model.named_modules():
                if id(part) in layers:
                    hook = self._at_adapter_layer if name in above else self._at_shallow_layer
                    self._keep(part.register_forward_pre_hook(outside(hook), with_kwargs=True))
                    if name in above:
                        after = outside(self._after_adapter_layer)
                        self._keep(part.register_forward_hook(after, with_kwargs=True))
        if compiled:
            torch.compiler.reset()  # code compiled before the hooks would silently go on without them
        return self

    def detach(self) -> None:
        """Leave the module as it was."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    @property
    def attached(self) -> bool:
        """Whether the hooks are in place."""
        return bool(self._undo)

    @contextmanager
    def given(self, adapters: Sequence[str] | str | None) -> Iterator[None]:
        """Use these adapters instead of the router's: one name a sample, one for all, or None for the router's again.

        ``"__base__"`` is the base model.
        """
        before = self._given
        self.use(adapters)
        try:
            yield
        finally:
            self._given = before

    @property
    def adapters_given(self) -> Sequence[str] | str | None:
        """What `given` or `use` set."""
        return self._given

    def use(self, adapters: Sequence[str] | str | None) -> None:
        """As `given`, until the next call of this."""
        self._given = adapters if isinstance(adapters, str) or adapters is None else list(adapters)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No routing: the active adapter answers."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def arguments(self, batch: Any) -> tuple[Tensor, ...]:
        """The network's arguments in a batch that is not text: its first tensors, as many as ``forward`` requires."""
        network = anatomy.find_backbone(self.module, self.feature_layer)[1]
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = inspect.signature(network.forward).parameters.values()
        required = sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters)
        tensors = [leaf for leaf in layout_of(batch).leaves.values() if isinstance(leaf, Tensor)]
        return tuple(tensors[: max(1, required)])

    @torch.no_grad()
    def features(self, mask: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """Pooled hidden states ``[B, D]`` of a call of the network, which stops at the feature layer.

        A sharded network runs to its end, since every rank must gather every layer.

        Args:
            mask: bool ``[B, T]``, the prompts' tokens; None for all.
            args: Arguments of the network (the backbone, for Hugging Face models), on any device.
            kwargs: Likewise.
        """
        network = anatomy.find_backbone(self.module, self.feature_layer)[1]
        layer = anatomy.get_submodule(self.module, self.feature_layer)
        device = next(layer.parameters(), next(network.parameters())).device
        to = [a.to(device) if isinstance(a, Tensor) else a for a in args]
        named = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        stop, found = not weights.is_sharded(network), []

        def capture(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            found.append(output[0] if isinstance(output, (tuple, list)) else output)
            if stop:
                raise _Reached

        training = [part for part in self.module.modules() if part.training]
        handle = layer.register_forward_hook(capture)
        self._reading = True
        try:
            for part in training:
                part.training = False
            with self.paused():
                network(*to, **named)
        except _Reached:
            pass
        finally:
            self._reading = False
            handle.remove()
            for part in training:
                part.training = True
        hidden = found[0]
        mask = None if mask is None or hidden.ndim != 3 or mask.shape != hidden.shape[:2] else mask.to(device)
        return pool(hidden, mask)

    # ------------------------------------------------------------------ hooks

    def _enter(self, names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._call is None:
            self._call = _Call()
            self._mixed = None
        call = self._call
        call.depth += 1
        # The outer model sees the labels, the backbone the cache: the first to know a value keeps it.
        for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
            if value is not None:
                call.arguments.setdefault(name, value)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = self._call
        if call is None:
            return
        call.depth -= 1
        if call.depth <= 0:
            self._call = None
            if call.routed_tokens and not self._generating:
                keys = _last_keys(_cache(lambda name: getattr(output, name, None)), call.routed_tokens)
                self._kept_keys = None if keys is None else (call.routed_tokens, keys.clone())

    def _at_feature_layer(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hidden = output[0] if isinstance(output, (tuple, list)) else getattr(output, "last_hidden_state", output)
        call = self._call if self._call is not None else _Call()
        if self.on_hidden is not None:
            self.on_hidden(hidden, call.arguments)
        if not self.enabled or self.module.training or (call.done and self._call is not None):
            return
        call.done = True
        names = self._adapters(hidden, call)
        if names is not None and self.bank is not None:
            self._mixed = MixedAdapters(names)
            self.bank.fetch(self._mixed.used)

    def _adapters(self, hidden: Tensor, call: _Call) -> list[str] | None:
        rows = hidden.shape[0]
        if self._given is not None:
            names = [self._given] if isinstance(self._given, str) else self._given
            if not names or rows % len(names):
                raise ValueError(
                    f"{len(names)} adapters were given for a batch of {rows} samples. Give one name a sample, or one name"
                    " for all."
                )
            return _repeated(names, rows)
        if self.router is None:
            return None
        if self._kept and self._generating and rows % len(self._kept) == 0:
            return _repeated(self._kept, rows)
        if self._kept and not self._generating and call.cached_tokens > 0:
            return self._continued(rows, call.cache)
        if hidden.ndim == 3:
            call.routed_tokens = hidden.shape[1]
        self.last = self.router.route(pool(hidden, self._prompt(hidden, call.arguments)))
        self._kept = self.last.adapters
        if self.on_routes is not None:
            self.on_routes(self.last)
        return self.last.adapters

    def _prompt(self, hidden: Tensor, arguments: dict[str, Any]) -> Tensor | None:
        if hidden.ndim != 3:
            return None
        mask, labels = arguments.get("attention_mask"), arguments.get("labels")
        if not (isinstance(mask, Tensor) and mask.shape == hidden.shape[:2]):
            mask = None
        _refuse_packed(hidden, mask, arguments.get("position_ids"))
        if isinstance(labels, Tensor) and labels.shape == hidden.shape[:2]:
            return prompt_mask(mask, labels)
        known = None if self._generating else self.prompt
        if known is not None and len(known) == len(hidden) and known.shape[1] <= hidden.shape[1]:
            # Options that follow the prompts widen the call beyond the batch: they are no prompt.
            prompt = torch.nn.functional.pad(known, (0, hidden.shape[1] - known.shape[1]))
            return prompt if mask is None else prompt & mask.bool()
        return prompt_mask(mask, None)

    def _continued(self, rows: int, cache: Any) -> list[str]:
        """The routes of rows that go on from cached prompts, in whatever order and number they were taken from there."""
        assert self._kept is not None
        keys = None if self._kept_keys is None else _last_keys(cache, self._kept_keys[0])
        if keys is not None and self._kept_keys is not None and keys.shape[1:] == self._kept_keys[1].shape[1:]:
            # The deepest key of a prompt's last token has seen the whole prompt: equal keys mean the same prompt.
            same = (keys.unsqueeze(1) == self._kept_keys[1].unsqueeze(0)).all(dim=-1)
            found, index = same.max(dim=1)
            if bool(found.all()):
                return [self._kept[i] for i in index.tolist()]
        if rows == len(self._kept):
            return self._kept
        raise ValueError(
            f"{rows} rows continue from a cache, but the {len(self._kept)} prompts that were routed last are not those of"
            " the cache. Run the prompts and their continuations one batch after the other, or give the adapters"
            " (`with routed.given(names)`)."
        )

    def _at_adapter_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # A user who names adapters in the call has PEFT's own hook after this one, which wins.
        mixed = self._mixed
        if layer.training or mixed is None or not self.enabled:
            return None
        return args, {**kwargs, "adapter_names": mixed.base_names if mixed.can_add(layer) else mixed.names}

    def _after_adapter_layer(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        mixed = self._mixed
        # Adapters that are disabled as a whole stay so.
        if (
            layer.training
            or mixed is None
            or kwargs.get("adapter_names") is not mixed.base_names
            or layer.disable_adapters
        ):
            return None
        return mixed.add(layer, args[0], output)

    def _at_shallow_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # The template reaches down here: if it is active, it must not change what the router reads.
        if layer.training:
            return None
        routing = self.enabled and (self.router is not None or self._given is not None)
        if not (routing or self._reading):
            return None
        return args, {**kwargs, "adapter_names": [BASE] * len(args[0])}

    # ------------------------------------------------------------------ generation

    def _wrap_generate(self, part: Any) -> None:
        original = part.generate
        own = vars(part).get("generate")

        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            if self._generating == 0:
                self._kept = None
            self._generating += 1
            try:
                return original(*args, **kwargs)
            finally:
                self._generating -= 1

        object.__setattr__(part, "generate", generate)

        def undo() -> None:
            if own is None:
                object.__delattr__(part, "generate")
            else:
                object.__setattr__(part, "generate", own)

        self._undo.append(undo)

    def _keep(self, handle: Any) -> None:
        self._undo.append(handle.remove)


def _cache(value_of: Callable[[str], Any]) -> Any:
    """The cache among named values, whatever this release of transformers calls it."""
    return next((cache for name in anatomy.CACHE_NAMES if (cache := value_of(name)) is not None), None)


def _last_keys(cache: Any, tokens: int) -> Tensor | None:
    """The last layer's keys of token ``tokens - 1``, ``[rows, numbers]``, or None for a cache of another kind."""
    layers = getattr(cache, "layers", None)
    keys = getattr(layers[-1], "keys", None) if layers else None
    if not isinstance(keys, Tensor) or keys.ndim != 4 or keys.shape[2] < tokens:
        return None
    return keys[:, :, tokens - 1].flatten(1)


def _repeated(names: list[str], rows: int) -> list[str]:
    """One name a row, where generation made several rows (beams) of each sample, next to each other."""
    return [name for name in names for _ in range(rows // len(names))]


class _Reached(Exception):
    """Ends a pass at the feature layer."""


def _refuse_packed(hidden: Tensor, mask: Tensor | None, positions: Any) -> None:
    if not (isinstance(positions, Tensor) and hidden.shape[0] == 1 and positions.shape == hidden.shape[:2]):
        return
    starts = positions == 0 if mask is None else (positions == 0) & mask.bool()
    if int(starts.sum()) > 1:
        raise ValueError(
            "The batch packs several samples into one row (`position_ids` start again within it), and one row gets one"
            " adapter. Evaluate on padded batches: one sample a row."
        )
