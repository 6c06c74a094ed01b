# SPDX-License-Identifier: Apache-2.0
"""Trainable weights as local shards, and exact, reversible swaps of them (also under FSDP1 and FSDP2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Parts that wrappers put into parameter names; without them a run with another strategy, or uncompiled, fits.
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def clean_name(name: str) -> str:
    """The parameter's name without what FSDP1, activation checkpointing and ``torch.compile`` put into it.

    Example:
        >>> clean_name("_fsdp_wrapped_module.model._checkpoint_wrapped_module.head.weight")
        'model.head.weight'
    """
    for part in _WRAPPERS:
        name = name.replace(part, "")
    return name


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name, each shared parameter once.

    Under FSDP2 call it while the groups are sharded (in ``on_fit_start``, or after :func:`reshard`): a group that is
    gathered shows its temporary full parameters instead of the shards that the optimizer holds.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> _ = net[0].requires_grad_(False)
        >>> list(trainable(net))
        ['1.weight', '1.bias']
    """
    return {clean_name(name): p for name, p in module.named_parameters() if p.requires_grad}


def sharding_root(module: nn.Module) -> nn.Module:
    """The module that holds all parameters' shards: FSDP1 wraps a whole LightningModule in another one."""
    trainer: Any = getattr(module, "_trainer", None)
    model: Any = None if trainer is None else trainer.strategy.model
    return model if type(model).__name__ == "FullyShardedDataParallel" else module


def local(tensor: Tensor) -> Tensor:
    """The plain tensor that this rank holds: the local shard of a DTensor, or the tensor itself.

    The result shares its memory with ``tensor`` and carries no graph.
    """
    if hasattr(tensor, "to_local"):
        with torch.no_grad():
            return tensor.to_local().detach()
    return tensor.detach()


def reshard(module: nn.Module) -> None:
    """Free the gathered parameters of every FSDP group, so that the next forward gathers the shards anew.

    After a forward pass the root group stays gathered; a swap of its shards would then go unnoticed. Without FSDP
    this does nothing.
    """
    for group in sharding_groups(module):
        group.scatter()


@contextmanager
def swapped(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter] | None = None,
    groups: list[ShardingGroup] | None = None,
) -> Iterator[None]:
    """Hold other values in the named parameters while the context lasts.

    One copy of the replaced values is kept meanwhile, and put back at the end, also after an exception. A group of
    FSDP that is in the middle of its forward (the network's pre-hook runs inside the root group's forward) is
    gathered again after each exchange, so that what runs next sees the values that the shards hold now.

    Args:
        module: the module whose parameters change.
        tensors: local shards by parameter name, in any floating-point dtype; they are only read.
        parameters: the module's parameters by the same names, where the caller has them already. Walking through a
            large model takes milliseconds, which a swap in each step need not spend.
        groups: its :func:`sharding_groups`, likewise.

    Raises:
        ValueError: if a name is not a parameter of the module, or a tensor has another shape than this rank's shard.
    """
    groups = sharding_groups(module) if groups is None else groups
    running = [group for group in groups if group.running()]
    for group in groups:
        group.scatter()
    if parameters is None:
        parameters = {clean_name(name): p for name, p in module.named_parameters()}
    targets, values = [], []
    for name, value in tensors.items():
        if name not in parameters:
            raise ValueError(
                f"`swapped` got a value for {name!r}, which is no parameter of `{type(module).__name__}`. Pass names of"
                " `module.named_parameters()`."
            )
        target = local(parameters[name])
        if target.shape != value.shape:
            raise ValueError(
                f"`swapped` got a tensor of shape {tuple(value.shape)} for {name!r}, whose local shard has shape"
                f" {tuple(target.shape)}. Pass this rank's shard: `local(parameter)` shows it."
            )
        targets.append(target)
        values.append(value)
    with torch.no_grad():
        saved = [torch.empty_like(target) for target in targets]
        if targets:
            torch._foreach_copy_(saved, targets)
        _copy(targets, values)
    try:
        for group in running:
            group.gather()
        yield
    finally:
        for group in groups:
            group.scatter()
        if groups:
            # The shards of FSDP1 are views that a forward pass may have set anew: look them up again.
            targets = [local(parameters[name]) for name in tensors]
        with torch.no_grad():
            _copy(targets, saved)
    # Not after an exception: gathering is collective, and the other ranks may not be here.
    for group in running:
        group.gather()


def adapter_switches(module: nn.Module) -> list[Any]:
    """The layers whose adapters :func:`adapters_disabled` switches; finding them takes as long as a small layer runs."""
    return [m for m in module.modules() if "_disable_adapters" in m.__dict__ or hasattr(type(m), "_disable_adapters")]


@contextmanager
def adapters_disabled(module: nn.Module, switches: list[Any] | None = None) -> Iterator[None]:
    """Every PEFT adapter inside ``module`` is off while the context lasts, and then as it was.

    That includes the copies that ``modules_to_save`` trains: with them off, PEFT runs the original module.

    Args:
        module: the module.
        switches: its :func:`adapter_switches`, if they are known.
    """
    # PEFT's own `enable_adapters(False)` also clears `requires_grad` of the adapters, which would detach them from the
    # optimizer's view of the model in the middle of a step; only the flag that forward reads is touched here.
    layers = adapter_switches(module) if switches is None else switches
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, flag in zip(layers, before, strict=True):
            layer._disable_adapters = flag


def is_sharded(module: nn.Module) -> bool:
    """Whether any parameter is spread over ranks (FSDP1, FSDP2, tensor parallelism)."""
    return bool(sharding_groups(module)) or any(hasattr(p, "to_local") for p in module.parameters())


def gather(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    everywhere: bool = False,
    copy: bool = True,
) -> dict[str, Tensor]:
    """The whole tensors on the CPU, from every rank's shards, in the tensors' own dtype.

    Collective: every rank calls it, with the same names in the same order. One tensor at a time is gathered, so the
    device needs room for the largest one alone.

    Args:
        module: the module that holds the parameters.
        tensors: local shards by parameter name.
        parameters: the parameters whose layout the shards have.
        everywhere: every rank keeps the result. Otherwise sharded tensors are kept on global rank 0 alone, and the
            other ranks return without them.
        copy: False gives a tensor that is not sharded as it is, for a checkpoint that is about to be written.
    """
    flat = _flat_layouts(module)
    keep = everywhere or not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0
    whole = {}
    for name, shard in tensors.items():
        parameter = parameters[name]
        if hasattr(parameter, "to_local"):
            from torch.distributed.tensor import DTensor

            layout: Any = parameter
            full = DTensor.from_local(
                shard.to(local(parameter).device),
                layout.device_mesh,
                layout.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            ).full_tensor()
        elif id(parameter) in flat:
            full = flat[id(parameter)].whole(shard.to(local(parameter).device))
        else:
            whole[name] = shard.detach().to("cpu", copy=True) if copy else shard.detach()
            continue
        if keep:
            whole[name] = full.detach().to("cpu", copy=True)
    return whole


def scatter(
    module: nn.Module, whole: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """This rank's shards of whole tensors, on the parameters' devices, in the tensors' own dtype; no communication.

    Raises:
        ValueError: if a tensor's shape is not its parameter's.
    """
    flat = _flat_layouts(module)
    shards = {}
    for name, full in whole.items():
        parameter = parameters[name]
        layout = flat.get(id(parameter))
        shape = layout.shape if layout is not None else parameter.shape
        if full.shape != shape:
            raise ValueError(
                f"The saved tensor of {name!r} has shape {tuple(full.shape)}, the parameter {tuple(shape)}. They belong"
                " to different models: build the model as it was when the state was saved, or drop that state."
            )
        device = local(parameter).device
        if hasattr(parameter, "to_local"):
            from torch.distributed.tensor import distribute_tensor

            spread: Any = parameter
            piece = distribute_tensor(full.to(device), spread.device_mesh, spread.placements, src_data_rank=None)
            shards[name] = local(piece).clone()
        elif layout is not None:
            shards[name] = layout.part(full).to(device, copy=True)
        else:
            shards[name] = full.to(device, copy=True)
    return shards


def _copy(targets: list[Tensor], values: list[Tensor]) -> None:
    # A graph of before the swap (replay rows in a pass of their own) runs its backward when the values are back, so the
    # exchange must not count as a change. FSDP does the same with the storage of its parameters.
    if targets:
        with torch.autograd._unsafe_preserve_version_counter(tuple(targets)):
            torch._foreach_copy_(targets, values)


class ShardingGroup:
    """A set of parameters that FSDP gathers and frees together, the same for FSDP1 and FSDP2.

    The calls are private to PyTorch: the public ``reshard()`` of FSDP2 does nothing while a root group is in its
    forward, and FSDP1 has none; yet only what really frees the gathered values makes a swap visible.
    """

    def __init__(self, running: Callable[[], bool], scatter: Callable[[], None], gather: Callable[[], None]) -> None:
        self.running, self.scatter, self.gather = running, scatter, gather


def sharding_groups(module: nn.Module) -> list[ShardingGroup]:
    """The groups of parameters that FSDP1 or FSDP2 has made in ``module``; they stay the same once it is sharded."""
    groups = []
    for part in sharding_root(module).modules():
        # Asked of the class: on an instance of `nn.Module`, looking for what is not there is slow.
        if hasattr(type(part), "_get_fsdp_state") and hasattr(type(part), "unshard"):
            groups += [_fsdp2_group(part, group) for group in _fsdp2_parameter_groups(part)]
        elif type(part).__name__ == "FullyShardedDataParallel" and getattr(part, "_handle", None) is not None:
            groups.append(_fsdp1_group(part))
    return groups


def _fsdp2_parameter_groups(part: Any) -> list[Any]:
    state = part._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []  # before PyTorch 2.12


def _fsdp2_group(part: Any, group: Any) -> ShardingGroup:
    def scatter() -> None:
        # A prefetched gather that still runs would deliver the values of before the exchange: let it end first.
        if group._all_gather_result is not None:
            group.wait_for_unshard()
        group._to_sharded()

    def running() -> bool:
        return group.is_unsharded and group._training_state.name == "FORWARD"

    return ShardingGroup(running, scatter, part.unshard)


def _fsdp1_group(part: Any) -> ShardingGroup:
    from torch.distributed.fsdp import _runtime_utils

    handle = part._handle

    def running() -> bool:
        return handle._training_state.name == "FORWARD"

    def scatter() -> None:
        # Before the first forward nothing was ever gathered, and FSDP1 has not set up what resharding needs.
        if handle.uses_sharded_strategy and hasattr(handle.flat_param, "_local_shard"):
            _runtime_utils._reshard(part, handle, True)

    def gather() -> None:
        # FSDP1's full parameters are views of the flat one with a graph: in training that graph is needed.
        with torch.enable_grad():
            _runtime_utils._unshard(part, handle, part._unshard_stream, part._pre_unshard_stream)
        part._device_handle.current_stream().wait_stream(part._unshard_stream)

    return ShardingGroup(running, scatter, gather)


class _FlatLayout:
    """Where one original parameter lies in the flat parameter of FSDP1: ranks hold consecutive pieces of it."""

    def __init__(self, handle: Any, index: int) -> None:
        self.shape = torch.Size(handle.flat_param._shapes[index])
        self._group = handle.process_group
        self._info = handle.flat_param._shard_param_infos[index]

    def whole(self, shard: Tensor) -> Tensor:
        sizes: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(sizes, shard.numel(), group=self._group)
        if sum(sizes) != self.shape.numel():  # every rank holds all of it (`NO_SHARD`)
            return shard.view(self.shape)
        padded = shard.new_zeros(max(sizes))
        padded[: shard.numel()] = shard.flatten()
        pieces = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(pieces, padded, group=self._group)
        return torch.cat([piece[:size] for piece, size in zip(pieces, sizes, strict=True)]).view(self.shape)

    def part(self, full: Tensor) -> Tensor:
        if not self._info.in_shard:
            return full.new_empty(0)
        return full.flatten()[self._info.intra_param_start_idx : self._info.intra_param_end_idx + 1]


def _flat_layouts(module: nn.Module) -> dict[int, _FlatLayout]:
    layouts = {}
    for part in sharding_root(module).modules():
        handle = getattr(part, "_handle", None) if type(part).__name__ == "FullyShardedDataParallel" else None
        if handle is not None and handle.uses_sharded_strategy:
            for index, parameter in enumerate(handle.flat_param._params or ()):
                layouts[id(parameter)] = _FlatLayout(handle, index)
    return layouts
