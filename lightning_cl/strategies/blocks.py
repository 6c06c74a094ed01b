# SPDX-License-Identifier: Apache-2.0
"""The repeated blocks of a network: found, recomputed in the backward pass, compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_cl.anatomy import CACHE_NAMES, pretrained_model

_FLAG = "_lightning_cl_prepared"
#: Attribute of the linear layers of a block whose activations are computed again in the backward pass: 4-bit ones, which may
#: take a layer's place after its block was prepared, need to know that for their own product.
RECOMPUTED = "_lightning_cl_recomputed"
_UNCOMPILED = "_lightning_cl_uncompiled"
_VARIANTS = 64
_ignoring_caches = ContextVar("ignoring_caches", default=False)


def find_shard_blocks(
    module: nn.Module, names: list[str] | None = None, min_parameters: int | None = None
) -> list[str]:
    """Names of the submodules that FSDP gathers as one, in the order of the module tree.

    Args:
        module: any module.
        names: class names or dotted names; they decide if given.
        min_parameters: else, the smallest submodules with at least this many parameters.

    Without either: the classes that a Hugging Face model must not split, else the elements of the
    ``nn.ModuleList`` or ``nn.Sequential`` of equal classes that holds most weights.

    Raises:
        MisconfigurationException: if a given name fits nothing.

    >>> net = nn.Sequential(*[nn.Linear(2, 2) for _ in range(3)])
    >>> find_shard_blocks(nn.ModuleDict({"net": net}))
    ['net.0', 'net.1', 'net.2']
    """
    parts = dict(module.named_modules())
    if names is not None:
        found = [n for n, p in parts.items() if n and (n in names or type(p).__name__ in names)]
        known = {type(parts[n]).__name__ for n in found} | set(found)
        unknown = [n for n in names if n not in known]
        if unknown:
            classes = sorted({type(p).__name__ for p in parts.values() if any(True for _ in p.children())})
            raise MisconfigurationException(
                f"`blocks` names {', '.join(map(repr, unknown))}, which is neither a class nor a submodule of"
                f" `{type(module).__name__}` (classes with children: {', '.join(classes[:8])}). Correct the name, or leave"
                " `blocks` out to have them found."
            )
        return _outermost(found)
    if min_parameters is not None:
        big = [n for n, p in parts.items() if n and _size(p) >= min_parameters and _callable(p)]
        return [n for n in big if not any(other.startswith(f"{n}.") for other in big)]
    model = pretrained_model(module)
    if model is not None:
        unsplit = set(getattr(model, "_no_split_modules", None) or ())
        found = [n for n, p in parts.items() if type(p).__name__ in unsplit and _size(p)]
        if found:
            return _outermost(found)
    return _biggest_list(parts)


def prepare_blocks(module: nn.Module, blocks: list[str], recompute: bool = False, compile: bool = False) -> None:
    """Replace the blocks' ``forward`` (names and hooks stay); harmless when it is asked again.

    Hooks of FSDP and of callbacks on a block run around the new forward, in Python.

    Args:
        module: any module.
        blocks: names of its blocks.
        recompute: keep only a block's input for the backward pass, which runs the block once more.
        compile: ``torch.compile`` each block; equal blocks share the code. Together with ``recompute``, what the
            backward pass does not need (a block's last product) is not computed again.
    """
    if compile:
        # torch counts the variants of one code, and all blocks share it: other shapes, with and without gradients,
        # adapters on and off. Beyond the limit it would go on uncompiled.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    for name in blocks:
        block = module.get_submodule(name)
        original, was = block.__dict__.get(_FLAG, (block.forward, (False, False)))
        if was != (recompute, compile):
            block.forward = _prepared(block, original, recompute, compile) if recompute or compile else original
            block.__dict__[_FLAG] = original, (recompute, compile)
            for part in block.modules():
                if isinstance(part, nn.Linear):
                    setattr(part, RECOMPUTED, recompute)


@contextmanager
def caches_ignored() -> Iterator[None]:
    """While it lasts, prepared blocks keep nothing in the cache that the network hands them, as in training.

    For a pass whose cache nobody will read: a compiled block runs its usual code then, and not a variant for caches.
    """
    token = _ignoring_caches.set(True)
    try:
        yield
    finally:
        _ignoring_caches.reset(token)


def run_uncompiled(module: nn.Module, parts: Iterable[nn.Module], training: bool = True) -> Callable[[], None]:
    """Let the blocks around some submodules run without compiled code, whether they are compiled now or later.

    For submodules with hooks: equal blocks share their code, which is not made anew for hooks, so that those of one block
    would run for all blocks or for none. Hooks on a block itself run around its code and need none of this.

    Args:
        module: any module.
        parts: submodules of it.
        training: in training too; else compiled code must be right without the hooks there.

    Returns:
        A function that takes it back.
    """
    wanted = {id(part) for part in parts}
    # A layer that two blocks share has two names.
    names = [name for name, part in module.named_modules(remove_duplicate=False) if id(part) in wanted]
    around = {name[:i] for name in names for i, character in enumerate(name) if character == "."}
    marks = [module.get_submodule(name).__dict__.setdefault(_UNCOMPILED, []) for name in sorted(around)]
    for mark in marks:
        mark.append(training)

    def undo() -> None:
        while marks:
            marks.pop().remove(training)

    return undo


def has_hooks_inside(block: nn.Module, training: bool) -> bool:
    """Whether :func:`run_uncompiled` has told of hooks inside a block, in training or else in evaluation."""
    told = block.__dict__.get(_UNCOMPILED, ())
    return any(told) if training else bool(told)


def is_prepared(block: nn.Module) -> bool:
    """Whether :func:`prepare_blocks` made this module's ``forward``."""
    return _FLAG in block.__dict__ and any(block.__dict__[_FLAG][1])


def is_compiled(module: nn.Module, but_prepared: bool = False) -> bool:
    """Whether a part of a network is compiled, by any of torch's ways.

    Args:
        module: any module.
        but_prepared: blocks that :func:`prepare_blocks` compiled do not count: hooks on them run in Python.
    """
    return any(
        getattr(part, "_compiled_call_impl", None) is not None
        or hasattr(part, "_orig_mod")
        or (hasattr(part.forward, "_torchdynamo_orig_callable") and not (but_prepared and is_prepared(part)))
        for part in module.modules()
    )


def _prepared(block: nn.Module, forward: Callable[..., Any], recompute: bool, compile: bool) -> Callable[..., Any]:
    uncompiled = _recomputed(forward) if recompute else forward
    train, evaluate = (torch.compile(uncompiled), torch.compile(forward)) if compile else (uncompiled, forward)

    @functools.wraps(evaluate)
    def prepared(*args: Any, **kwargs: Any) -> Any:
        training = block.training and torch.is_grad_enabled()
        # Training has no use for the cache that Hugging Face models make unasked; a second pass would fill it twice.
        useless = training or _ignoring_caches.get()
        caches = _caches(kwargs).items() if useless else ()
        empty = dict.fromkeys(name for name, cache in caches if (training and recompute) or _is_empty(cache))
        if _caches({**kwargs, **empty}):
            # Generation grows its cache layer by layer and token by token: each would be a variant of its own.
            return forward(*args, **kwargs)
        if useless:
            kwargs = {**kwargs, **empty, **({"use_cache": False} if "use_cache" in kwargs else {})}
        hooked = compile and has_hooks_inside(block, training)
        if not training:
            return (forward if hooked else evaluate)(*args, **kwargs)
        if hooked:
            return uncompiled(*args, **kwargs)
        if compile and args and isinstance(args[0], Tensor) and args[0].is_floating_point():
            # The first block's input has no gradient where the embedding is frozen: a variant for one block's sake.
            args = (args[0] if args[0].requires_grad else args[0].detach().requires_grad_(), *args[1:])
        return train(*args, **kwargs)

    return prepared


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    from torch.utils.checkpoint import checkpoint

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return recomputed


def _caches(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None}


def _is_empty(cache: Any) -> bool:
    return hasattr(cache, "get_seq_length") and cache.get_seq_length() == 0


def _biggest_list(parts: dict[str, nn.Module]) -> list[str]:
    # The stack of blocks holds most of the weights; lists inside a block (experts, heads) hold a part of them.
    best: list[str] = []
    most = 0
    for name, part in parts.items():
        if isinstance(part, nn.ModuleList | nn.Sequential):
            groups: dict[type, list[str]] = {}
            for key, child in part.named_children():
                if _size(child):
                    groups.setdefault(type(child), []).append(f"{name}.{key}" if name else key)
            for group in groups.values():
                size = sum(_size(parts[n]) for n in group)
                # One layer alone is no stack.
                if len(group) > 1 and size > most:
                    best, most = group, size
    return best


def _outermost(names: list[str]) -> list[str]:
    chosen: list[str] = []
    for name in names:
        if not any(name.startswith(f"{c}.") for c in chosen):
            chosen.append(name)
    return chosen


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _callable(module: nn.Module) -> bool:
    return not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict)
