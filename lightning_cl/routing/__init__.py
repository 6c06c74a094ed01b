# SPDX-License-Identifier: Apache-2.0
"""Analytic routing: features of the shallow layers choose, in closed form and per sample, the adapter of the deep ones."""

import importlib
from typing import Any

_PUBLIC = {
    "AdapterBank": "adapters",
    "AnalyticRouter": "router",
    "Expansion": "features",
    "RoutedForward": "forward",
    "Routes": "router",
    "load_routed": "serving",
    "save_routed": "serving",
    "save_routed_state": "serving",
}

__all__ = [
    "AdapterBank",
    "AnalyticRouter",
    "Expansion",
    "RoutedForward",
    "Routes",
    "load_routed",
    "save_routed",
    "save_routed_state",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"lightning_cl.routing.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'lightning_cl.routing' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
