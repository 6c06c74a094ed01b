# SPDX-License-Identifier: Apache-2.0
"""What a strategy has done to a module (trained, quantized, sharded), kept on the module for the next fit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cl.anatomy import adapter_layers
from lightning_cl.weights import clean_name

_ATTRIBUTE = "_lightning_cl_record"


@dataclass
class ModuleRecord:
    """One module's history with our strategies.

    It lives on the module and not in the strategy, because a task stream may use a new Trainer, and with it a new
    strategy object, for each task, while the module keeps its shards and its 4-bit layers.

    Attributes:
        trained: names of all parameters that were trainable in any fit so far.
        fingerprint: digest of each parameter that belongs to the base, by name (see ``base_fingerprint``).
        quantized: names of the layers held in 4 bits.
        sharded: how the module was sharded (plain values, for comparison), or None.
        root: the FSDP2 root module, or None.
    """

    trained: set[str] = field(default_factory=set)
    fingerprint: dict[str, str] | None = None
    quantized: list[str] = field(default_factory=list)
    sharded: dict[str, Any] | None = None
    root: nn.Module | None = None


def record_of(module: nn.Module) -> ModuleRecord:
    """The record of ``module``, empty on first use.

    >>> record_of(nn.Linear(1, 1)).trained
    set()
    """
    record = module.__dict__.get(_ATTRIBUTE)
    if record is None:
        record = ModuleRecord()
        # `__dict__` and not setattr: `root` may be the module itself, which nn.Module would register as its own child.
        module.__dict__[_ATTRIBUTE] = record
    return record


def named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters by clean name, each shared one once."""
    return {clean_name(name): parameter for name, parameter in module.named_parameters()}


def saved_names(module: nn.Module) -> list[str]:
    """Names of the parameters that a checkpoint must hold: all that ever trained, and every adapter.

    An adapter that trained in an earlier task may be frozen by now, yet it is not part of the base.
    """
    parameters = named_parameters(module)
    adapters = {id(p) for layer in adapter_layers(module) for p in _adapter_parameters(layer)}
    trained = record_of(module).trained
    return [n for n, p in parameters.items() if p.requires_grad or n in trained or id(p) in adapters]


def note_trainable(module: nn.Module) -> None:
    """Remember which parameters train in the fit that begins."""
    record_of(module).trained.update(n for n, p in named_parameters(module).items() if p.requires_grad)


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that a state dict would hold, by clean name."""
    found = {}
    for prefix, part in module.named_modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                found[clean_name(f"{prefix}.{name}" if prefix else name)] = buffer
    return found


def extra_states(module: nn.Module) -> dict[str, nn.Module]:
    """The submodules that define ``get_extra_state``, by the key their state has in a state dict."""
    return {
        clean_name(f"{prefix}.{torch.nn.modules.module._EXTRA_STATE_KEY_SUFFIX}".lstrip(".")): part
        for prefix, part in module.named_modules()
        if type(part).get_extra_state is not nn.Module.get_extra_state
    }


def _adapter_parameters(layer: Any) -> list[nn.Parameter]:
    base = {id(p) for p in layer.get_base_layer().parameters()}
    return [p for p in layer.parameters() if id(p) not in base]
