# SPDX-License-Identifier: Apache-2.0
"""The callbacks: each decides when its mathematics runs, and nothing else."""

import importlib
from typing import Any

# One public class a file; resolved on first use, so that a callback's own dependencies load only with it.
_PUBLIC = {
    "ActivationMarginRegularizer": "activation_margin_regularizer",
    "ContinualCallback": "base",
    "ForgettingMonitor": "forgetting_monitor",
    "LoRAInterpolator": "lora_interpolator",
    "RLSRouterFitter": "rls_router_fitter",
    "ReplayDistillation": "replay_distillation",
    "ReplayMixer": "replay_mixer",
}

__all__ = [
    "ActivationMarginRegularizer",
    "ContinualCallback",
    "ForgettingMonitor",
    "LoRAInterpolator",
    "RLSRouterFitter",
    "ReplayDistillation",
    "ReplayMixer",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"lightning_cl.callbacks.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'lightning_cl.callbacks' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
