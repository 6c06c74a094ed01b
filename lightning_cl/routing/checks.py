# SPDX-License-Identifier: Apache-2.0
"""What `RLSRouterFitter` refuses, and what it warns of, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_cl.replay.source import replay_sources
from lightning_cl.routing.features import shallow_modules

if TYPE_CHECKING:
    from lightning_cl.routing.adapters import AdapterBank

__all__ = ["check_arguments", "check_features", "check_finite", "check_run", "warn_of_shared_weights"]

_CALLBACK = "RLSRouterFitter"


def check_arguments(expansion_dim: int, ridge: float | str, min_margin: float | None, max_tasks: int | None) -> None:
    """Refuse values out of range.

    Raises:
        MisconfigurationException: With the range.
    """
    if expansion_dim < 1:
        raise MisconfigurationException(
            f"`expansion_dim={expansion_dim}` of `{_CALLBACK}` leaves no features. Use some thousands, such as 4096."
        )
    if ridge != "auto" and (isinstance(ridge, str) or not 0 < ridge < float("inf")):
        raise MisconfigurationException(
            f"`ridge={ridge!r}` of `{_CALLBACK}`: the router's system needs a ridge above 0. Use a positive number, or"
            " 'auto' to choose it by leave-one-out error."
        )
    if min_margin is not None and min_margin < 0:
        raise MisconfigurationException(
            f"`min_margin={min_margin}` of `{_CALLBACK}` can never be undercut: a margin is at least 0. Use a number"
            " from 0 to 1, or None to always route."
        )
    if max_tasks is not None and max_tasks < 1:
        raise MisconfigurationException(
            f"`max_tasks={max_tasks}` of `{_CALLBACK}` allocates no adapter. Use the number of tasks, or None."
        )


def check_run(trainer: pl.Trainer, adapters: bool, general_class: bool) -> None:
    """Refuse what cannot run beside the router.

    Args:
        trainer: The Trainer.
        adapters: Whether the module has LoRA layers, one adapter a task.
        general_class: Whether the router learns a general class.

    Raises:
        MisconfigurationException: For a memory of other tasks, slow weights that come too late, FSDP1, or no general
            samples to learn from.
    """
    sources = {type(source).__name__ for source in replay_sources(trainer)}
    if general_class and "GeneralSamples" not in sources:
        raise MisconfigurationException(
            f"`general_class=True` of `{_CALLBACK}` learns from replayed general samples, and none are replayed."
            " Add `ReplayMixer(GeneralSamples(...))` to the callbacks, or use `general_class=False`."
        )
    if not adapters:
        return
    if "EpisodicMemory" in sources:
        raise MisconfigurationException(
            "`EpisodicMemory` would train each task's adapter on the rows of other tasks, which the router never sends"
            " to it. Leave the memory out (adapters of earlier tasks are not changed, so nothing of them is"
            f" forgotten), or use a shared adapter without `{_CALLBACK}`."
        )
    if isinstance(trainer.strategy, FSDPStrategy):
        raise MisconfigurationException(
            "`FSDPStrategy` flattens all adapters of a block into one parameter, of which one task's part cannot train"
            " alone. Use `strategy='cl_fsdp'` (or `ModelParallelStrategy`)."
        )
    names = [type(callback).__name__ for callback in getattr(trainer, "callbacks", [])]
    if "LoRAInterpolator" in names[names.index(_CALLBACK) + 1 if _CALLBACK in names else 0 :]:
        raise MisconfigurationException(
            f"`LoRAInterpolator` comes after `{_CALLBACK}` in the callbacks, so the router would store a task's"
            " adapter before the slow weights are put into it. Put `LoRAInterpolator` first."
        )


def check_features(pl_module: pl.LightningModule, feature_layer: str, adapters: bool) -> None:
    """Refuse (with adapters) or warn of (without) weights below the feature layer that are trained.

    Raises:
        MisconfigurationException: With the first of them.
    """
    below = shallow_modules(pl_module, feature_layer)
    trained = [
        name
        for name, part in pl_module.named_modules()
        if name in below and not _in_adapter(name) and any(p.requires_grad for p in part.parameters(recurse=False))
    ]
    if not trained:
        return
    if adapters:
        raise MisconfigurationException(
            f"{trained[0]!r} is at or below the feature layer {feature_layer!r} and is trained, so the router's features"
            " would move from task to task. Freeze it (`requires_grad_(False)`), or choose a lower `feature_layer`."
        )
    rank_zero_warn(
        f"`{_CALLBACK}`: {trained[0]!r} and {len(trained) - 1} other modules at or below the feature layer"
        f" {feature_layer!r} are trained, so the features of earlier tasks move on after they were fitted. Freeze them"
        " for a router that does not forget."
    )


def check_finite(name: str, whole: Mapping[str, Tensor]) -> None:
    """Refuse an adapter that has diverged: its samples would get no answer, and a batch that mixes adapters neither.

    Raises:
        ValueError: With the first of its weights that is not finite.
    """
    bad = [full for full, weight in whole.items() if not bool(torch.isfinite(weight).all())]
    if bad:
        raise ValueError(
            f"After its task the adapter {name!r} holds NaN or infinity in {len(bad)} of {len(whole)} weights (first:"
            f" {bad[0]!r}): it would answer nothing, and spoil the batches it shares. Lower the learning rate, or clip the"
            " gradients (`gradient_clip_val`)."
        )


def warn_of_shared_weights(bank: AdapterBank) -> None:
    """Say which trained weights all tasks share, and that a trained template is not used."""
    shared = [n for n, p in bank.module.named_parameters() if p.requires_grad and not _in_adapter(n)]
    if shared:
        rank_zero_warn(
            f"`{_CALLBACK}`: {len(shared)} parameters outside the adapters are trained (first: {shared[0]!r})."
            " All tasks share them, so they can forget. Freeze them to train adapters alone."
        )
    if bank.template is not None and not bank.untrained(bank.template):
        rank_zero_warn(
            f"`{_CALLBACK}`: the adapter {bank.template!r} is not in its initial state. It is the pattern for the"
            " tasks' adapters and is itself not used: merge it into the model (`merge_and_unload`) to keep what it"
            " learnt."
        )


def _in_adapter(name: str) -> bool:
    return "lora_" in name
