# SPDX-License-Identifier: Apache-2.0
"""FSDP2 around any LightningModule: blocks as groups, everything else as one group that steps and modules gather."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_cl import weights
from lightning_cl.strategies.record import record_of


def shard_module(
    module: nn.Module,
    blocks: list[str],
    before_block: Callable[[str], None],
    reshard_after_forward: bool,
    prefetch: int,
    **options: Any,
) -> None:
    """Shard ``module`` in place.

    Each block is a group of its own, gathered for its forward and its backward pass. All other parameters (embeddings,
    final norm, head, whatever the module owns itself) form one root group on the LightningModule, which stays gathered
    from step to step while all of it is frozen. A LightningModule's
    ``forward`` need not be what a step calls, so the root's FSDP hooks are taken off, and :func:`in_root` drives them
    around each step; outside of steps a hook on each owner of such a parameter gathers the group when it is called.

    Args:
        module: the LightningModule, in full or 4-bit form, on any device.
        blocks: names of the blocks.
        before_block: called with each block's name before it is sharded (and with ``""`` before the root).
        reshard_after_forward: free a block's gathered parameters after its forward pass.
        prefetch: how many blocks ahead are gathered in the forward and the backward pass, 0 for FSDP's own order.
        **options: of ``torch.distributed.fsdp.fully_shard`` (mesh, policies).
    """
    from torch.distributed.fsdp import fully_shard

    def whole(part: nn.Module) -> set[nn.Parameter]:
        # A scalar cannot be sharded; the frozen ones stay whole on every rank, and so do 4-bit weights in bitsandbytes' own
        # form.
        return {p for p in part.parameters() if p.dim() == 0 or hasattr(p, "quant_state")}

    inside: set[int] = set()
    for name in blocks:
        block = module.get_submodule(name)
        before_block(name)
        fully_shard(block, reshard_after_forward=reshard_after_forward, ignored_params=whole(block), **options)
        inside.update(id(part) for part in block.modules())
    before_block("")
    owners = [
        part
        for part in module.modules()
        if id(part) not in inside and (part is module or any(True for _ in part.parameters(recurse=False)))
    ]
    fully_shard(module, reshard_after_forward=False, ignored_params=whole(module), **options)
    state = fsdp_state(module)
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()
    for owner in owners:
        owner.register_forward_pre_hook(_Gather(module))
    if prefetch > 0:
        _set_prefetch([module.get_submodule(name) for name in blocks], prefetch)
    # The first state that runs declares itself the root; a callback that calls a block before the first step would make
    # it one.
    state._lazy_init()
    record_of(module).root = module
    _keep_frozen_root(module)


def is_sharded(module: nn.Module) -> bool:
    """Whether ``module`` is an FSDP2 group."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def fsdp_state(module: Any) -> Any:
    """FSDP2's state of a group. There is no public way to run a root's hooks around something else than ``forward``."""
    return module._get_fsdp_state()


def param_groups(module: nn.Module) -> list[Any]:
    """The parameter groups of one FSDP module (newer torch versions allow several)."""
    state = fsdp_state(module)
    groups = getattr(state, "_fsdp_param_groups", None)
    return list(groups) if groups is not None else [g for g in [state._fsdp_param_group] if g is not None]


def refresh(module: nn.Module) -> None:
    """Before a further fit: free gathered parameters and let every group look again at what is trainable."""
    weights.reshard(module)
    for part in module.modules():
        if is_sharded(part):
            for group in param_groups(part):
                group._init_mp_dtypes()
    _keep_frozen_root(module)


def in_root(module: nn.Module, call: Callable[[], Any]) -> Any:
    """Run ``call`` (a step of the LightningModule) as the root group's forward pass."""
    state = fsdp_state(module)
    # On GPUs torch 2.11 moves the arguments to the device, and takes for granted that there is one.
    state._pre_forward(module, (None,), {})
    try:
        output = call()
    except BaseException:
        reset(module)
        raise
    return state._post_forward(module, (), output)


@contextmanager
def gathered(module: nn.Module, name: str) -> Iterator[None]:
    """Hold the parameters of the submodule ``name`` gathered while the context lasts."""
    holder: Any = module
    current: Any = module
    for part in name.split(".") if name else []:
        current = getattr(current, part)
        if is_sharded(current):
            holder = current
    holder.unshard()
    try:
        yield
    finally:
        holder.reshard()


def reset(module: nn.Module) -> None:
    """Make the next step possible after one that raised."""
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    if hasattr(module, "reset_iter_state"):
        module.reset_iter_state()  # type: ignore[operator]
        return
    for part in module.modules():
        if is_sharded(part):
            state = fsdp_state(part)
            state._training_state = TrainingState.IDLE
            state._state_ctx.iter_forward_root = None
            state._state_ctx.post_backward_final_callback_queued = False
            for group in param_groups(part):
                group._training_state = TrainingState.IDLE
            part.reshard()  # type: ignore[operator]


def _keep_frozen_root(module: Any) -> None:
    # From a step's first to its last pass the root group is gathered whole. What no optimizer changes can stay so until
    # the next step: the peak is the same, and no step waits for embeddings and head.
    trained = any(p.sharded_param.requires_grad for group in param_groups(module) for p in group.fsdp_params)
    module.set_reshard_after_backward(trained, recurse=False)


class _Gather:
    """A forward pre-hook that gathers the root group where a step has not done so."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not all(group.is_unsharded for group in param_groups(self.root)):
            self.root.unshard()  # type: ignore[operator]


def _set_prefetch(blocks: list[Any], distance: int) -> None:
    for i, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(blocks[i + 1 : i + 1 + distance])
        block.set_modules_to_backward_prefetch(blocks[max(0, i - distance) : i][::-1])
