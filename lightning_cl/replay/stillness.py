# SPDX-License-Identifier: Apache-2.0
"""Hold a model still while something else than training runs it: evaluation mode, and sharded weights whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode while the context lasts; then every submodule's own mode again."""
    before = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in before:
            part.training = training


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Under FSDP2: every group's weights whole and its hooks at rest while the context lasts; otherwise nothing.

    Without it each forward pass gathers each block, which for a decode step is all cost and no work, and no pass could
    be recorded: a collective in a recording would have to be in every rank's.
    """
    from torch.distributed.fsdp import FSDPModule

    groups = [part for part in module.modules() if isinstance(part, FSDPModule)]
    if not groups:
        yield
        return
    # Which group is the root is settled by the first forward pass; one through an inner module would settle it wrongly.
    groups[0]._get_fsdp_state()._lazy_init()
    resting: list[tuple[dict[int, Any], int, Any]] = []
    for group in groups:
        group.unshard()
        state = group._get_fsdp_state()
        for hooks in (group._forward_pre_hooks, group._forward_hooks):
            for key, hook in list(hooks.items()):
                if getattr(hook, "__self__", None) is state:
                    resting.append((hooks, key, hook))
    saved = [(hooks, list(hooks.items())) for hooks in {id(h): h for h, _, _ in resting}.values()]
    for hooks, key, _ in resting:
        del hooks[key]
    try:
        yield
    finally:
        for hooks, items in saved:
            # In the old order: FSDP's hook must stay the first of the pre-hooks.
            hooks.clear()
            hooks.update(items)
        for group in groups:
            group.reshard()
