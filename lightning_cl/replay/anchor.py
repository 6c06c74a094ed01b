# SPDX-License-Identifier: Apache-2.0
"""The model as it was at one moment, without a second model: adapters off, and a copy of what else is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_cl import weights


class WeightAnchor:
    """A state of the weights that can be put back into the model for a while.

    ``"initial"`` is the model before the first task. Adapters need no copy for that, they are switched off; only other
    trained parameters (all of them in full fine-tuning; a head, a norm or an embedding beside LoRA) are kept.
    ``"previous_task"`` is a copy of everything trained, as it stood when it was taken. Copies are local shards, so
    under FSDP each rank holds its part.

    Args:
        kind: which state.
        offload: Keep the copies on the CPU (pinned, if there is an accelerator) instead of beside the parameters.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> anchor = WeightAnchor("previous_task")
        >>> anchor.take(net)
        >>> before = net.weight.detach().clone()
        >>> _ = net.weight.data.add_(1.0)
        >>> with anchor.inside(net):
        ...     bool((net.weight == before).all())
        True
    """

    def __init__(self, kind: Literal["initial", "previous_task"], offload: bool = False) -> None:
        self.kind = kind
        self.offload = offload
        self._shards: dict[str, Tensor] | None = None
        # Whole tensors of a checkpoint, until the parameters whose shards they become are known.
        self._whole: dict[str, Tensor] | None = None
        self._parameters: dict[str, nn.Parameter] = {}
        self._switches: list[nn.Module] | None = None

    @property
    def taken(self) -> bool:
        """Whether a state is held."""
        return self._shards is not None or self._whole is not None

    def names(self, module: nn.Module) -> list[str]:
        """The parameters that need a copy: those whose old values switching adapters off does not bring back."""
        trained = weights.trainable(module)
        if self.kind == "previous_task":
            return list(trained)
        switched = {id(p) for p in _switched_off(module)}
        return [name for name, p in trained.items() if id(p) not in switched]

    def take(self, module: nn.Module, values: Mapping[str, Tensor] | None = None) -> None:
        """Keep the present values.

        Args:
            module: the module; with the weights sharded, where they are (call it outside of forward).
            values: Whole tensors by parameter name to keep instead, from a frozen copy.

        Raises:
            MisconfigurationException: if ``values`` lacks a trained parameter.
        """
        weights.reshard(module)
        # What a checkpoint brought is older than the present values, and must not settle over them later.
        self._whole = None
        trained = weights.trainable(module)
        self._parameters = {name: trained[name] for name in self.names(module)}
        if values is None:
            self._shards = {name: self._kept(weights.local(p)) for name, p in self._parameters.items()}
            return
        missing = [name for name in self._parameters if name not in values]
        if missing:
            raise MisconfigurationException(
                f"The reference has no parameter {missing[0]!r} ({len(missing)} of {len(self._parameters)} trained ones"
                " are missing), so it is not a copy of this model. Pass a copy of the same architecture, or use"
                ' `anchor="initial"`.'
            )
        chosen = {name: values[name] for name in self._parameters}
        shards = weights.scatter(module, chosen, self._parameters)
        self._shards = {name: self._kept(shard) for name, shard in shards.items()}

    @contextmanager
    def inside(self, module: nn.Module) -> Iterator[None]:
        """Hold this state in ``module`` while the context lasts."""
        self._settle(module)
        with ExitStack() as stack:
            if self.kind == "initial":
                if self._switches is None:
                    self._switches = weights.adapter_switches(module)
                stack.enter_context(weights.adapters_disabled(module, self._switches))
            if self._shards:
                stack.enter_context(weights.swapped(module, self._shards, self._parameters))
            yield

    def state_dict(self, module: nn.Module | None) -> dict[str, Tensor] | None:
        """The copies as whole tensors (on rank 0 alone, if sharded), None if nothing was taken. Collective."""
        if self._shards is None or module is None:
            return self._whole
        if not self._parameters:
            return {}
        weights.reshard(module)
        return weights.gather(module, self._shards, self._parameters, copy=False)

    def load_state_dict(self, state: Mapping[str, Tensor] | None) -> None:
        """Hold what a checkpoint held; becomes shards at the next use."""
        self._whole = None if state is None else dict(state)
        self._shards = None

    def _settle(self, module: nn.Module) -> None:
        if self._whole is not None:
            whole, self._whole = self._whole, None
            self.take(module, values=whole)
        elif not self._parameters and self._shards:
            self._parameters = {n: p for n, p in weights.trainable(module).items() if n in self._shards}

    def rebind(self) -> None:
        """Forget the module's parts: a new fit may have new ones under the same names."""
        self._parameters, self._switches = {}, None

    def _kept(self, shard: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            if not self.offload or shard.device.type == "cpu":
                return shard.detach().clone()
            copy = torch.empty(shard.shape, dtype=shard.dtype, pin_memory=torch.cuda.is_available())
            return copy.copy_(shard)


def _switched_off(module: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters that do not act while adapters are off: of adapter layers, without the layers that they wrap."""
    for part in module.modules():
        if not isinstance(getattr(part, "_disable_adapters", None), bool):
            continue
        wrapped = [getattr(part, name, None) for name in ("base_layer", "original_module")]
        inner = {id(p) for m in wrapped if isinstance(m, nn.Module) for p in m.parameters()}
        yield from (p for p in part.parameters() if id(p) not in inner)
