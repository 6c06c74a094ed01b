# SPDX-License-Identifier: Apache-2.0
"""What must not make the host wait for the GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


def forbid(
    monkeypatch: pytest.MonkeyPatch,
    cls: type,
    name: str,
    after: int = 1,
    counts: Callable[[Any], bool] = lambda self: True,
) -> list[None]:
    """From its ``after + 1``-th call on, a method that waits for the device raises; the first may compile or compare.

    Args:
        monkeypatch: undoes it.
        cls: the class whose method it is.
        name: the method.
        after: calls that may wait.
        counts: whether a call counts, told by the object.

    Returns:
        A list that gets an entry with each call that counts.
    """
    calls: list[None] = []
    original = getattr(cls, name)

    def strict(self: Any, *args: Any) -> Any:
        if not counts(self):
            return original(self, *args)
        calls.append(None)
        torch.cuda.set_sync_debug_mode("error" if len(calls) > after else "default")
        try:
            return original(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(cls, name, strict)
    return calls
