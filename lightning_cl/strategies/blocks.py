# SPDX-License-Identifier: Apache-2.0
"""The repeated blocks of a network: found, recomputed in the backward pass, compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_cl.anatomy import pretrained_model

_FLAG = "_lightning_cl_checkpointed"


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


def enable_activation_checkpointing(module: nn.Module) -> None:
    """Recompute each block's activations in the backward pass (once per module, however often it is asked)."""
    if module.__dict__.get(_FLAG):
        return
    model = pretrained_model(module)
    if model is not None and getattr(model, "supports_gradient_checkpointing", False):
        # Its own switch also turns off the cache of keys and values, which a second pass would fill twice.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        for name in find_shard_blocks(module):
            block = module.get_submodule(name)
            block.forward = _recomputed(block, block.forward)
    module.__dict__[_FLAG] = True


def compile_blocks(module: nn.Module) -> None:
    """``torch.compile`` each block's ``forward`` in place (names stay; equal blocks are compiled once).

    The hooks of FSDP and of callbacks on a block run around the compiled forward, in Python.
    """
    for name in find_shard_blocks(module):
        block = module.get_submodule(name)
        if not hasattr(block.forward, "_torchdynamo_orig_callable"):
            block.forward = torch.compile(block.forward)


def _recomputed(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    from torch.utils.checkpoint import checkpoint

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if block.training and torch.is_grad_enabled():
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        return forward(*args, **kwargs)

    return wrapped


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
