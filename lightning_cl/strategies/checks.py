# SPDX-License-Identifier: Apache-2.0
"""Configuration checks of the strategies, gathered over the ranks and raised together."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_cl.distributed import gather_objects
from lightning_cl.strategies.config import QuantizationConfig
from lightning_cl.strategies.record import record_of

_COMPUTE = {"bf16": torch.bfloat16, "16": torch.float16, "32": torch.float32, "64": torch.float64}


def compute_dtype(precision_plugin: Any) -> torch.dtype:
    """The dtype that matrix products run in under a precision plugin.

    >>> from lightning.pytorch.plugins import HalfPrecision
    >>> compute_dtype(HalfPrecision("bf16-true"))
    torch.bfloat16
    """
    return _COMPUTE.get(str(precision_plugin.precision).split("-")[0], torch.float32)


def host_memory(cpu_offload: bool) -> list[str]:
    """Problems of the process group with shards in host memory, once there is one."""
    if not (cpu_offload and dist.is_initialized()) or "cpu:" in dist.get_backend_config():
        return []
    return [
        f"`cpu_offload=True` needs a backend for tensors in host memory, and this process already has a process group"
        f" without one ({dist.get_backend_config()}), from an earlier fit. Run the fit with `cpu_offload` first, in a"
        " process of its own, or after `torch.distributed.destroy_process_group()`."
    ]


def precision(strategy: Any, quantization: QuantizationConfig | None) -> list[str]:
    """Problems of the Trainer's precision with the device and with 4 bits."""
    problems = []
    device, dtype = strategy.root_device, compute_dtype(strategy.precision_plugin)
    name = strategy.precision_plugin.precision
    if dtype is torch.float16 and device.type == "cpu":
        problems.append(
            f"`precision={name!r}` computes in float16, which has no usable kernels on the CPU. Use `precision='bf16-true'`,"
            " `'bf16-mixed'` or `'32-true'`."
        )
    if (
        dtype is torch.bfloat16
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        problems.append(
            f"`precision={name!r}` computes in bfloat16, which {torch.cuda.get_device_name(device)} does not have. Use"
            " `precision='16-mixed'` or `'32-true'`."
        )
    if quantization is None:
        return problems
    if device.type not in ("cuda", "cpu"):
        problems.append(
            f"4-bit layers were asked for on `{device.type}`, but bitsandbytes has kernels for `cuda` and `cpu` only. Use"
            " `accelerator='gpu'` with CUDA, `accelerator='cpu'`, or a strategy without `_4bit`."
        )
    if dtype is torch.float64:
        problems.append(
            f"`precision={name!r}` with 4-bit layers: bitsandbytes computes in float32 at most. Use"
            " `precision='32-true'` or `'bf16-true'`."
        )
    return problems


def single_device(module: nn.Module) -> list[str]:
    """Problems of a module's history with a strategy on one device."""
    if record_of(module).sharded is not None:
        return [
            f"This `{type(module).__name__}` was sharded by `cl_fsdp` in an earlier fit and holds only a part of its"
            " weights. Go on with `strategy='cl_fsdp'`, or load its checkpoint into a new module."
        ]
    return frozen_in_4bit(module)


def frozen_in_4bit(module: nn.Module) -> list[str]:
    """Problems with layers that were quantized and are to be trained now."""
    quantized = record_of(module).quantized
    thawed = [n for n in quantized if any(p.requires_grad for p in module.get_submodule(n).parameters())]
    if thawed:
        return [
            f"{len(thawed)} layers held in 4 bits were made trainable (first: {thawed[0]}), but 4-bit weights cannot be"
            " trained. Leave them frozen, or put them into `skip` of the `QuantizationConfig` from the first fit on."
        ]
    return []


def raise_together(problems: list[str]) -> None:
    """Raise all ranks' problems as one exception on every rank, so that none waits for the others.

    Args:
        problems: this rank's problems.

    Raises:
        MisconfigurationException: if any rank has a problem.

    >>> raise_together(["a", "b"])
    Traceback (most recent call last):
    ...
    lightning.fabric.utilities.exceptions.MisconfigurationException: a
    b
    """
    everyone = gather_objects(problems)
    ranks: dict[str, list[int]] = {}
    for rank, found in enumerate(everyone):
        for problem in found:
            ranks.setdefault(problem, []).append(rank)
    if ranks:
        lines = [
            problem if len(where) == len(everyone) else f"[rank {', '.join(map(str, where))}] {problem}"
            for problem, where in ranks.items()
        ]
        raise MisconfigurationException("\n".join(lines))


def fsdp(module: nn.Module, precision_name: str, wanted: dict[str, Any]) -> list[str]:
    """Problems of a module with sharding, in the form in which it arrives at ``setup``.

    Args:
        module: the LightningModule.
        precision_name: the Trainer's precision.
        wanted: how the strategy would shard (plain values).
    """
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    problems = []
    if precision_name not in ("32-true", "bf16-mixed", "bf16-true", "16-true"):
        problems.append(
            f"`precision={precision_name!r}` cannot be used with `cl_fsdp`: loss scaling does not see overflows in other"
            " ranks' shards. Use `'bf16-mixed'`, `'bf16-true'` or `'32-true'`."
        )
    if any(isinstance(m, FullyShardedDataParallel) for m in module.modules()):
        problems.append(
            f"`{type(module).__name__}` wraps submodules with FSDP1 (`FullyShardedDataParallel`), which FSDP2 cannot shard"
            " again. Remove the wrapping: `cl_fsdp` shards by itself."
        )
    sharded = record_of(module).sharded
    if sharded is None:
        if any(isinstance(p, DTensor) for p in module.parameters()):
            problems.append(
                f"`{type(module).__name__}` already has parameters sharded by someone else (DTensor). Remove `fully_shard`"
                " from `configure_model`, or use Lightning's `ModelParallelStrategy`."
            )
        if uint8 := _uint8_layers(module):
            problems.append(
                f"{len(uint8)} 4-bit layers are stored as uint8 (first: {uint8[0]}), which FSDP cannot shard without"
                " corrupting them. Load the model with `bnb_4bit_quant_storage=torch.bfloat16`, or load it unquantized and"
                " let the strategy quantize it (`quantization='nf4'`)."
            )
        return problems
    differences = [f"{k}: {sharded[k]!r}, now {v!r}" for k, v in wanted.items() if sharded[k] != v]
    if differences:
        problems.append(
            f"This `{type(module).__name__}` was sharded in an earlier fit with other settings ({'; '.join(differences)})."
            " Use the same strategy arguments and precision for all fits of a module, or load its checkpoint into a new"
            " module."
        )
    added = [n for n, p in module.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
    if added:
        problems.append(
            f"{len(added)} trainable parameters were added after the module was sharded (first: {added[0]}); their"
            " gradients would not be averaged over the ranks. Add all adapters before the first fit, or start the new task"
            " with a new module from the last checkpoint."
        )
    return problems + frozen_in_4bit(module)


def _uint8_layers(module: nn.Module) -> list[str]:
    return [n for n, p in module.named_parameters() if p.dtype is torch.uint8]


def groups(module: nn.Module, blocks: list[str], converted: bool) -> list[str]:
    """Problems of the parameters with the groups that they would be sharded in.

    Args:
        module: the LightningModule.
        blocks: names of its blocks.
        converted: whether the precision converts all parameters to one dtype.
    """
    problems = []
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in module.parameters() if p.requires_grad})
    if len(dtypes) > 1 and not converted:
        problems.append(
            f"The trainable parameters have several dtypes ({', '.join(dtypes)}), but FSDP averages a block's gradients in"
            " one. Use `precision='bf16-true'`, or convert the module's parameters to one dtype."
        )
    if scalars := [n for n, p in module.named_parameters() if p.dim() == 0 and p.requires_grad]:
        problems.append(
            f"{len(scalars)} trainable parameters are scalars (first: {scalars[0]}), which FSDP cannot shard. Give them the"
            " shape `[1]`, or freeze them."
        )
    places: dict[int, dict[str, str]] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        block = next((b for b in blocks if name.startswith(f"{b}.")), "")
        places.setdefault(id(p), {}).setdefault(block, name)
    for place in places.values():
        if len(place) > 1:
            problems.append(
                f"One parameter is shared between blocks that FSDP gathers separately ({', '.join(place.values())}). Name"
                " a `blocks` that holds all of its users, or untie it."
            )
    return problems
