# SPDX-License-Identifier: Apache-2.0
"""Float32 averages of trained weights: this rank's shards, bound to the parameters of one task after another."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_cl import anatomy, weights
from lightning_cl.functional.interpolation import update_average_, warmup_decay

Parameters = Mapping[str, nn.Parameter]


def averaged_parameters(module: nn.Module, chosen: str) -> dict[str, nn.Parameter]:
    """The trained parameters that are averaged, by name.

    Args:
        module: the user's module.
        chosen: ``"auto"``, ``"lora"``, ``"trainable"`` or a pattern of names, as in ``LoRAInterpolator(parameters=...)``.

    Raises:
        MisconfigurationException: if there are none.
    """
    weights.reshard(module)
    trained = weights.trainable(module)
    kind = type(module).__name__
    if chosen in ("auto", "lora") and not anatomy.has_lora(module):
        raise MisconfigurationException(
            f"`LoRAInterpolator(parameters={chosen!r})` found no PEFT adapter layer in `{kind}`, and a slow copy of all its"
            f" trained weights takes {4 * sum(p.numel() for p in trained.values()) / 2**30:.2f} GiB. Add LoRA layers with"
            ' PEFT, or set `parameters="trainable"` or a pattern such as "*.mlp.*".'
        )
    if chosen in ("auto", "trainable"):
        found = trained
    elif chosen == "lora":
        found = {n: p for n, p in trained.items() if "lora_" in n}
    else:
        found = {n: p for n, p in trained.items() if fnmatch.fnmatchcase(n, chosen)}
    if not found:
        raise MisconfigurationException(
            f"`LoRAInterpolator(parameters={chosen!r})` fits none of the {len(trained)} trained parameters of `{kind}`"
            f' ({", ".join(list(trained)[:3]) or "all are frozen"}). Set `parameters="trainable"`, or a pattern that'
            " fits their names."
        )
    return found


class SlowWeights:
    """One float32 average for each of a set of parameters, by name.

    It costs 4 bytes for each element that this rank holds. Nothing but :meth:`whole` communicates.

    Attributes:
        parameters: the parameters that are averaged now.
        shards: their averages, float32, on their devices; averages of other parameters wait on the CPU.
        updates: updates of each in its whole life, which warm-up counts.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.zeros_(net.weight)
        >>> average = SlowWeights()
        >>> average.bind(net, dict(net.named_parameters()))
        >>> average.start()
        >>> _ = nn.init.ones_(net.weight)
        >>> average.update(decay=0.75)
        >>> average.whole()["weight"]
        tensor([[0.2500]])
    """

    def __init__(self) -> None:
        self.parameters: dict[str, nn.Parameter] = {}
        self.shards: dict[str, Tensor] = {}
        self.updates: dict[str, int] = {}
        self._module: nn.Module | None = None
        self._groups: list[weights.ShardingGroup] = []
        # Whole tensors of a checkpoint, until the parameters whose shards they become are known.
        self._loaded: dict[str, Tensor] | None = None
        self._held: ExitStack | None = None

    def bind(self, module: nn.Module, parameters: Parameters) -> None:
        """Average these parameters of this module from now on; :meth:`start` follows when they hold their values."""
        self._module = module
        self._groups = weights.sharding_groups(module)
        self.parameters = dict(parameters)

    def bind_all(self, module: nn.Module) -> None:
        """Bind to every parameter of the module that there is an average of, whether it trains or not.

        Raises:
            MisconfigurationException: if the module lacks one of them.
        """
        weights.reshard(module)
        named = {weights.clean_name(name): p for name, p in module.named_parameters()}
        names = self._loaded or self.shards
        lost = [name for name in names if name not in named]
        if lost:
            raise MisconfigurationException(
                f"The checkpoint holds slow weights of {lost[0]!r} and {len(lost) - 1} more, which"
                f" `{type(module).__name__}` does not have. Build the model as it was in training, with its adapters, or"
                ' set `evaluate_with="fast"`.'
            )
        self.bind(module, {name: named[name] for name in names})

    def start(self) -> None:
        """Bring averages and parameters together: parameters without an average get a copy of their values.

        Raises:
            MisconfigurationException: if an average has another shape than its parameter's shard on this rank.
        """
        # A tensor made in inference mode (validation before training) could never be updated.
        with torch.inference_mode(False):
            if self._loaded is not None:
                here = {n: t for n, t in self._loaded.items() if n in self.parameters}
                others = {n: t for n, t in self._loaded.items() if n not in here}
                assert self._module is not None
                self.shards = others | weights.scatter(self._module, here, self.parameters)
                self._loaded = None
            for name, shard in self.shards.items():
                parameter = self.parameters.get(name)
                self.shards[name] = shard.cpu() if parameter is None else _fitting(name, shard, parameter)
            self.join({n: p for n, p in self.parameters.items() if n not in self.shards})

    def join(self, parameters: Parameters) -> None:
        """Average these parameters too, starting with a copy of their values."""
        self.parameters |= parameters
        for name, parameter in parameters.items():
            self.shards[name] = weights.local(parameter).to(torch.float32, copy=True)
            self.updates[name] = 0

    def restart_where_changed(self, agree: Callable[[bool], bool]) -> None:
        """Drop averages that the parameters no longer hold: they were loaded or changed, and are the new start.

        Averages of other parameters are dropped as well: those hold their own average.

        Args:
            agree: whether all ranks hold their averages, from whether this one does.
        """
        names = [n for n in (self._loaded or self.shards) if n in self.parameters]
        if self._loaded is not None:
            self._loaded = {n: self._loaded[n] for n in names}
            assert self._module is not None
            self.shards = weights.scatter(self._module, self._loaded, self.parameters)
            self._loaded = None
        self.shards = {n: self.shards[n] for n in names}
        if names and not agree(all(self._holds(n) for n in names)):
            rank_zero_info("The weights were changed since the last task ended: their average starts from them.")
            self.shards = {}

    def update(self, decay: float, warmup: bool = False) -> None:
        """One step of the average: ``slow <- decay * slow + (1 - decay) * fast``, in one fused operation."""
        # Parameters that joined later are in an earlier phase of the warm-up; as a rule there is one group.
        groups: dict[int, list[str]] = {}
        for name in self.parameters:
            groups.setdefault(self.updates[name], []).append(name)
        for done, names in groups.items():
            fast = [weights.local(self.parameters[name]) for name in names]
            factor = warmup_decay(decay, done + 1) if warmup else decay
            update_average_([self.shards[name] for name in names], fast, factor)
            self.updates.update(dict.fromkeys(names, done + 1))

    def in_module(self) -> AbstractContextManager[None]:
        """A context in which the parameters hold the averages."""
        assert self._module is not None
        here = {name: self.shards[name] for name in self.parameters}
        return weights.swapped(self._module, here, self.parameters, self._groups)

    @property
    def held(self) -> bool:
        """Whether the parameters hold the averages now, by :meth:`hold`."""
        return self._held is not None

    def hold(self) -> None:
        """Put the averages into the parameters until :meth:`let_go`."""
        self._held = ExitStack()
        self._held.enter_context(_outside_inference_mode(self.in_module()))

    def let_go(self) -> None:
        """Put the parameters' own values back, if the averages are held."""
        held, self._held = self._held, None
        if held is not None:
            held.close()

    def write(self) -> None:
        """Leave the averages in the parameters."""
        assert self._module is not None
        weights.reshard(self._module)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                weights.local(parameter).copy_(self.shards[name])

    def whole(self, copy: bool = True) -> dict[str, Tensor]:
        """The averages, whole. A collective call under sharding, where rank 0 alone keeps the result.

        Args:
            copy: on the CPU in any case; otherwise those that are not sharded are given as they are.
        """
        if self._loaded is not None:
            return dict(self._loaded)
        here = {name: shard for name, shard in self.shards.items() if name in self.parameters}
        gathered = {} if self._module is None else weights.gather(self._module, here, self.parameters, copy=copy)
        return gathered | {name: shard for name, shard in self.shards.items() if name not in here}

    def state_dict(self) -> dict[str, Any]:
        """The averages, whole, and how often each was updated."""
        return {"slow": self.whole(copy=False), "updates": dict(self.updates)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take :meth:`state_dict` back, for any number of ranks."""
        self._loaded = dict(state["slow"])
        self.shards = {}
        self.updates = dict(state["updates"])

    def _holds(self, name: str) -> bool:
        """Whether the parameter is its average, as far as its precision can tell."""
        here, shard = weights.local(self.parameters[name]), self.shards[name]
        return here.shape == shard.shape and torch.equal(here, shard.to(here.device, here.dtype))


@contextmanager
def _outside_inference_mode(context: AbstractContextManager[None]) -> Iterator[None]:
    """Enter and leave ``context`` with inference mode off: what it makes must be usable in training."""
    with torch.inference_mode(False):
        context.__enter__()
    try:
        yield
    finally:
        with torch.inference_mode(False):
            context.__exit__(None, None, None)


def _fitting(name: str, shard: Tensor, parameter: nn.Parameter) -> Tensor:
    here = weights.local(parameter)
    if shard.shape != here.shape:
        raise MisconfigurationException(
            f"The slow weights of {name!r} were kept with shape {tuple(shard.shape)} on this rank, and the parameter has"
            f" {tuple(here.shape)} now: the module, or the way it is sharded, has changed between two tasks. Resume from"
            " a checkpoint, which holds them whole, or call `reset()` of the callback to start a new average."
        )
    return shard.to(here.device)
