# SPDX-License-Identifier: Apache-2.0
"""Continual learning for language models as PyTorch Lightning plugins."""

import importlib
from typing import Any

import lightning_cl.strategies as strategies

__version__ = "0.1.0.dev0"

# Where each public name lives. Resolved on first use, so that importing the package costs next to nothing.
_PUBLIC = {
    "CausalLMModule": "lightning_cl.modules",
    "Task": "lightning_cl.stream",
    "TaskStream": "lightning_cl.stream",
    "fit_stream": "lightning_cl.stream",
    "replay_rows": "lightning_cl.attachment",
}
_SUBPACKAGES = (
    "callbacks",
    "connectivity",
    "data",
    "functional",
    "metrics",
    "modules",
    "replay",
    "report",
    "routing",
    "stream",
)

__all__ = ["CausalLMModule", "Task", "TaskStream", "fit_stream", "replay_rows", "strategies"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in _SUBPACKAGES:
        return importlib.import_module(f"lightning_cl.{name}")
    raise AttributeError(f"module 'lightning_cl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC, *_SUBPACKAGES])
