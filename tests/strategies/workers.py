# SPDX-License-Identifier: Apache-2.0
"""What the processes of the strategy tests do: real Trainers, tiny models, results through files."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

import lightning_cl  # noqa: F401  (registers the strategies)
from lightning_cl.strategies import CLFSDPStrategy
from tests.helpers import models, spawn

Scenario = Callable[[int, Path], Any]


def run_scenarios(rank: int, folder: Path, scenarios: list[Scenario]) -> None:
    """Run each scenario in turn (starting processes costs more than all of them) and save what it returns."""
    results = {}
    for scenario in scenarios:
        name = scenario.__name__
        here = folder / name
        here.mkdir(exist_ok=True)
        torch.manual_seed(0)
        try:
            results[name] = scenario(rank, here)
        except Exception:
            results[name] = traceback.format_exc()
    spawn.save(folder, rank, results)


def result(results: list[dict[str, Any]], name: str) -> list[Any]:
    """Each rank's result of a scenario; fails with its traceback if it raised."""
    raised = [f"rank {i}: {r[name]}" for i, r in enumerate(results) if str(r[name]).startswith("Traceback")]
    assert not raised, "\n".join(raised)
    return [found[name] for found in results]


def plain(
    lora: bool = True,
    also: tuple[str, ...] = ("lm_head", "norm", "embed_tokens"),
    optimizer: str = "adamw",
    **config: Any,
) -> Any:
    """A module whose head, final norm and embedding train as well as its LoRA layers."""
    model = models.tiny_llama(**config)
    if lora:
        model = models.lora(model)
        for name, p in model.named_parameters():
            if any(e in name for e in also) and "layers" not in name:
                p.requires_grad_(True)
    return models.PlainLM(model, lr=1e-3 if optimizer == "adamw" else 0.1, optimizer=optimizer)


def whole(module: nn.Module, trainable: bool = True) -> dict[str, Tensor]:
    """Unsharded values of a module's (trainable) parameters."""
    for part in module.modules():
        if hasattr(part, "reshard"):
            part.reshard()
    return {
        n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for n, p in module.named_parameters()
        if p.requires_grad or not trainable
    }


def strategy(**kwargs: Any) -> CLFSDPStrategy:
    """FSDP that gives up soon, so that a hang fails instead of waiting."""
    return CLFSDPStrategy(timeout=timedelta(seconds=90), **kwargs)


def trainer(folder: Path, devices: int = 2, **kwargs: Any) -> pl.Trainer:
    """A quiet Trainer on CPUs."""
    kwargs.setdefault("strategy", "cl_fsdp" if devices > 1 else "cl_single_device")
    return models.trainer(folder, **{"devices": devices, "max_epochs": 1, "max_steps": -1, **kwargs})


def rows_of_ranks(rows: int, batch: int, world: int, seed: int = 0) -> torch.utils.data.DataLoader:
    """One process's loader whose batches hold what ``world`` ranks with batches of ``batch`` see in the same step."""
    from torch.utils.data import DataLoader, DistributedSampler

    data = models.TokenRows(rows, seed=seed)
    parts = [list(DistributedSampler(data, world, r, shuffle=True, seed=0)) for r in range(world)]
    order = [i for start in range(0, len(parts[0]), batch) for part in parts for i in part[start : start + batch]]
    return DataLoader(data, batch_size=batch * world, sampler=order, collate_fn=models.collate)


@contextmanager
def without_compiler() -> Iterator[None]:
    """Let ``torch.compile`` trace and differentiate, but generate no code, which would need a C++ compiler."""
    compile = torch.compile
    torch.compile = partial(compile, backend="aot_eager")  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile  # type: ignore[assignment]
        torch.compiler.reset()


def close(first: dict[str, Tensor], second: dict[str, Tensor], atol: float = 1e-6) -> None:
    """The two hold the same values up to the order of summation."""
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=atol, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def dequantized(packed: Tensor, state: Any) -> Tensor:
    """The weight of packed 4-bit indices, one number after the other; bitsandbytes' own CPU kernel misreads some shapes."""
    import bitsandbytes.functional as bnb

    absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    pairs, scales, code = (t.tolist() for t in (packed.flatten().view(torch.uint8), absmax, state.code))
    found = []
    for i in range(state.shape.numel()):
        index = pairs[i // 2] >> 4 if i % 2 == 0 else pairs[i // 2] & 15
        found.append(code[index] * scales[i // state.blocksize])
    return torch.tensor(found).to(packed.device, state.dtype).view(state.shape)


def round_to_4_bits(module: pl.LightningModule, quant_type: str, device: str) -> None:
    """Give the frozen linear layers the full-precision weights that their 4-bit form stands for."""
    import bitsandbytes.functional as bnb

    with torch.no_grad():
        for name, layer in module.named_modules():
            if type(layer) is torch.nn.Linear and "lora" not in name and "lm_head" not in name:
                packed, state = bnb.quantize_4bit(
                    layer.weight.to(device),
                    compress_statistics=True,
                    quant_type=quant_type,
                    quant_storage=torch.float32,
                )
                layer.weight.copy_(dequantized(packed, state))
