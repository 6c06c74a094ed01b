# SPDX-License-Identifier: Apache-2.0
"""Where replay rows come from: general samples, episodic memory, the model's own samples."""

import importlib
from typing import Any

_PUBLIC = {
    "EpisodicMemory": "episodic_memory",
    "GeneralSamples": "general_samples",
    "ReplaySource": "source",
    "Row": "rows",
    "SelfGenerated": "self_generated",
    "WeightAnchor": "anchor",
}

__all__ = ["EpisodicMemory", "GeneralSamples", "ReplaySource", "Row", "SelfGenerated", "WeightAnchor"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"lightning_cl.replay.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'lightning_cl.replay' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
