# SPDX-License-Identifier: Apache-2.0
"""What :class:`~lightning_cl.replay.SelfGenerated` refuses before anything is generated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

if TYPE_CHECKING:
    import lightning.pytorch as pl


def refuse_strategy(trainer: pl.Trainer) -> None:
    """Refuse strategies whose weights cannot be gathered once for a whole generation.

    Raises:
        MisconfigurationException: with the ways out.
    """
    from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy

    strategy = trainer.strategy
    mesh = getattr(strategy, "_device_mesh", None)
    names = getattr(mesh, "mesh_dim_names", None) or ()
    tensor_parallel = mesh["tensor_parallel"].size() if mesh is not None and "tensor_parallel" in names else 1
    if isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy)):
        problem = f"`{type(strategy).__name__}` cannot gather the weights once for a whole generation"
    elif tensor_parallel > 1:
        problem = f"with `tensor_parallel_size={tensor_parallel}` the ranks cannot generate different rows"
    else:
        return
    raise MisconfigurationException(
        f"`SelfGenerated`: {problem}. Use `strategy=cl_fsdp` (FSDP2) or DDP, or make the rows beforehand with"
        " `lightning-cl generate-replay --model ... --out samples.jsonl` and replay them with"
        ' `GeneralSamples("samples.jsonl")`.'
    )


def check_arguments(
    pool_size: int,
    length: int,
    refresh: str,
    prompts: Any,
    anchor: str,
    on_eos: str | None,
    temperature: float,
    reuse: int | None,
    every_n_steps: int | None,
) -> None:
    """Refuse values out of range and options that contradict each other.

    Raises:
        ValueError: with the values.
    """
    allowed = {
        "refresh": (refresh, ("per_task", "once", "per_step", "every_n_steps")),
        "anchor": (anchor, ("auto", "initial", "previous_task")),
        "on_eos": (on_eos, ("continue", "stop", None)),
    }
    for name, (value, choices) in allowed.items():
        if value not in choices:
            raise ValueError(f"`SelfGenerated({name}={value!r})`: use one of {', '.join(map(repr, choices))}.")
    lowest = {
        "pool_size": (pool_size, 1),
        "length": (length, 2),
        "reuse": (reuse, 1),
        "every_n_steps": (every_n_steps, 1),
    }
    for name, (number, least) in lowest.items():
        if number is not None and number < least:
            raise ValueError(f"`SelfGenerated({name}={number})`: must be at least {least}.")
    if not temperature > 0:
        raise ValueError(
            f"`SelfGenerated(temperature={temperature})`: logits are divided by it, so it must be > 0. The model's own"
            " distribution, which replay is to hold, is at 1.0."
        )
    if isinstance(prompts, str) and prompts not in ("bos", "past_tasks"):
        raise ValueError(
            f'`SelfGenerated(prompts={prompts!r})`: use "bos", "past_tasks", or a list of texts ([{prompts!r}]) or of lists'
            " of token ids."
        )
    if not isinstance(prompts, str) and not (prompts and all(len(p) > 0 for p in prompts)):
        raise ValueError(
            f"`SelfGenerated(prompts={prompts!r})`: a row begins with at least one token. Give prompts that are not empty,"
            ' or "bos".'
        )
    if (refresh == "every_n_steps") != (every_n_steps is not None):
        raise ValueError(
            f"`SelfGenerated(refresh={refresh!r}, every_n_steps={every_n_steps})`: `every_n_steps` and"
            ' `refresh="every_n_steps"` belong together. Give both or neither.'
        )
    if reuse is not None and refresh in ("once", "per_step") and not (refresh == "per_step" and reuse == 1):
        why = "one pool serves for good" if refresh == "once" else "each row is used once"
        raise ValueError(
            f"`SelfGenerated(refresh={refresh!r}, reuse={reuse})`: with that `refresh` {why}. Leave `reuse` out, or use"
            ' `refresh="per_task"`.'
        )
    if prompts == "past_tasks" and anchor == "initial":
        raise ValueError(
            '`SelfGenerated(prompts="past_tasks", anchor="initial")`: the initial model never learnt the past tasks. Use'
            ' `anchor="previous_task"` or "auto".'
        )
    if prompts == "past_tasks" and refresh == "once":
        raise ValueError(
            '`SelfGenerated(prompts="past_tasks", refresh="once")`: at the first task there is no past one, and later ones'
            ' would never be replayed. Use `refresh="per_task"`.'
        )
    if prompts == "past_tasks" and on_eos == "continue":
        raise ValueError(
            '`SelfGenerated(prompts="past_tasks", on_eos="continue")`: a row of a task is over at its end token, and what'
            ' would follow is no part of it. Leave `on_eos` out, or use "stop".'
        )
