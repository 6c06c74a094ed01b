# SPDX-License-Identifier: Apache-2.0
"""The mathematics of the methods: pure tensor functions that import torch alone."""

import importlib
from typing import Any

_PUBLIC = {
    "DualWeight": "dual_weight",
    "RecursiveLeastSquares": "recursive_least_squares",
    "activation_margin_loss": "margin",
    "activation_thresholds": "margin",
    "chunked_cross_entropy": "distillation",
    "distillation_loss": "distillation",
    "encode_activation_states": "margin",
    "interpolate_adapters": "interpolation",
}

__all__ = [
    "DualWeight",
    "RecursiveLeastSquares",
    "activation_margin_loss",
    "activation_thresholds",
    "chunked_cross_entropy",
    "distillation_loss",
    "encode_activation_states",
    "interpolate_adapters",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"lightning_cl.functional.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'lightning_cl.functional' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
