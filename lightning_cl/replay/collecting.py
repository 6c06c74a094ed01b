# SPDX-License-Identifier: Apache-2.0
"""One evaluation pass of the reference model over a fixed set of rows: thresholds, and the states of every token."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_cl import anatomy, weights
from lightning_cl.distributed import gather_objects, rank, world_size
from lightning_cl.functional.margin import ActivationMoments, encode_activation_states
from lightning_cl.replay.identity import row_key
from lightning_cl.replay.rows import BatchLayout, Row, collate_rows
from lightning_cl.replay.state_store import LayerShape, StateStore

# Share of a GPU's free memory that activations may wait in until the thresholds are known; else they wait on the CPU.
_DEVICE_SHARE = 0.25

# Copies from the device that may be under way at once.
_COPIES = 2


@dataclass
class Collected:
    """What a pass over the rows gave, the same on every rank.

    Attributes:
        thresholds: ``[2, D]`` float32 on the CPU by layer: lower, upper.
        store: the states (or activations) of all rows; None if only thresholds were asked for.
    """

    thresholds: dict[str, Tensor]
    store: StateStore | None


@dataclass
class _Held:
    """A batch of this rank that waits for the thresholds: ``[tokens, D]`` by layer, without padding."""

    keys: list[str]
    lengths: list[int]
    activations: dict[str, Tensor]


class ActivationCollector:
    """Runs rows through the module's network in evaluation mode and records what chosen submodules put out.

    Every rank takes its share of the rows, all in batches of similar length; the ranks make the same number of passes,
    as sharded weights need. Activations wait on the device (or on the CPU if they are too many) until the thresholds
    are known, so that the network runs once over each row and no more.

    Hugging Face models that hold the chosen submodules are called with the inputs that they know (and asked for the
    logits of one token only); any other module runs its own ``training_step``, whose logging is dropped, or under manual
    optimization its network.

    Args:
        trainer: the running Trainer.
        module: the LightningModule, on its device and sharded.
        layers: dotted names of the submodules to record.
        pad_values: fill by key, for keys of variable length outside the usual ones.
        batch_size: rows of one forward pass.
        skip_first_token: leave the first token of each row out of the thresholds.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        layers: Sequence[str],
        pad_values: Mapping[str, float],
        batch_size: int,
        skip_first_token: bool,
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._layers = {name: anatomy.get_submodule(module, name) for name in layers}
        self._pad_values = pad_values
        self._batch_size = batch_size
        self._skip_first = skip_first_token
        self._moments: dict[str, ActivationMoments] = {}

    def collect(
        self,
        rows: Sequence[Row],
        num_std: float,
        keep: Literal["states", "values"] | None,
        manifest: Mapping[str, Any],
    ) -> Collected:
        """Make the pass.

        Args:
            rows: the rows, the same on every rank.
            num_std: half width of the neutral interval in standard deviations.
            keep: 2-bit ``"states"``, bfloat16 ``"values"``, or None for the thresholds alone.
            manifest: what the store shall say that its states belong to.

        Raises:
            MisconfigurationException: if a watched module does not run, or puts out another shape.
        """
        store: StateStore | None = None
        held: list[_Held] = []
        tokens = {row_key(row): row.length for row in rows} if all("input_ids" in row.content for row in rows) else {}
        room = _device_room(self._trainer.strategy.root_device)
        with self._evaluation():
            for batch, real in self._batches(rows):
                found = self._run(batch, real)
                if not keep:
                    continue
                held.append(found)
                for name, flat in found.activations.items():
                    room -= flat.numel() * flat.element_size()
                    found.activations[name] = flat if room > 0 else flat.cpu()
                if store is None and [tokens.get(key) for key in found.keys] == found.lengths:
                    # Here, since the device has work to do meanwhile.
                    store = StateStore.empty(manifest, tokens, self._shapes(keep))
        thresholds = self._thresholds(num_std)
        if keep:
            shares = gather_objects([(batch.keys, batch.lengths) for batch in held])
            if store is None:
                found_tokens = {
                    key: n for share in shares for keys, ns in share for key, n in zip(keys, ns, strict=True)
                }
                tokens = {row_key(row): found_tokens[row_key(row)] for row in rows}
                store = StateStore.empty(manifest, tokens, self._shapes(keep))
            self._fill(store, held, shares, thresholds, keep)
        return Collected({name: limits.cpu() for name, limits in thresholds.items()}, store)

    def each(self, rows: Sequence[Row], take: Callable[[str, list[str], Sequence[Tensor]], None]) -> None:
        """Make the pass for the activations alone, and hand them over batch by batch.

        Args:
            rows: the rows, the same on every rank.
            take: called on every rank as ``take(layer, keys, activations)`` with everybody's rows: ``[tokens, D]`` on the
                CPU for each, in the dtype that the module puts out.

        Raises:
            MisconfigurationException: if a watched module does not run, or puts out another shape.
        """
        with self._evaluation():
            for batch, real in self._batches(rows):
                recorded = self._forward(batch)
                lengths = self._lengths(batch[:real], recorded)
                shares = gather_objects(([row_key(row) for row in batch[:real]], lengths))
                for name, hidden in recorded.items():
                    hidden = hidden if hidden.ndim == 3 else hidden[:, None]
                    flat = hidden.flatten(0, 1).index_select(0, _places(lengths, hidden))
                    pieces = self._everyones(flat, [sum(tokens) for _, tokens in shares])
                    for piece, (keys, tokens) in zip(pieces, shares, strict=True):
                        take(name, keys, piece.cpu().split(tokens))

    def _run(self, batch: Sequence[Row], real: int) -> _Held:
        """One forward pass: its activations join the moments. Rows after the first ``real`` ones count nowhere."""
        recorded = self._forward(batch)
        lengths = self._lengths(batch[:real], recorded)
        activations: dict[str, Tensor] = {}
        for name, hidden in recorded.items():
            hidden = hidden if hidden.ndim == 3 else hidden[:, None]
            moments = self._moments.setdefault(name, ActivationMoments(hidden.shape[-1], hidden.device))
            flat = hidden.flatten(0, 1)
            activations[name] = flat.index_select(0, _places(lengths, hidden))
            counted = flat.index_select(0, _places(lengths, hidden, first=1)) if self._skip_first else activations[name]
            moments.update(counted)
        return _Held([row_key(row) for row in batch[:real]], lengths, activations)

    def _thresholds(self, num_std: float) -> dict[str, Tensor]:
        """``[2, D]`` by layer, on the device, from everybody's moments."""
        limits = {}
        for name, moments in self._moments.items():
            merged = ActivationMoments(len(moments.count), moments.count.device)
            for state in gather_objects(moments.state_dict()):
                other = ActivationMoments(len(moments.count), moments.count.device)
                other.load_state_dict(state)
                merged.merge(other)
            limits[name] = torch.stack(merged.thresholds(num_std))
        return limits

    def _shapes(self, keep: Literal["states", "values"]) -> dict[str, LayerShape]:
        dims = {name: len(moments.count) for name, moments in self._moments.items()}
        if keep == "values":
            return {name: LayerShape(torch.bfloat16, dim, dim) for name, dim in dims.items()}
        return {name: LayerShape(torch.uint8, -(-dim // 4), dim) for name, dim in dims.items()}

    def _fill(
        self,
        store: StateStore,
        held: list[_Held],
        shares: list[list[tuple[list[str], list[int]]]],
        thresholds: Mapping[str, Tensor],
        keep: Literal["states", "values"],
    ) -> None:
        """Write everybody's states into the store; the activations are let go one by one."""
        for name, limits in thresholds.items():
            store.layers[name].thresholds.copy_(limits)

            def write(packed: Tensor, keys: list[str], lengths: list[int], name: str = name) -> None:
                for key, piece in zip(keys, packed.split(lengths), strict=True):
                    store.put(name, key, piece)

            copies = _Copies(write)
            for index, batch in enumerate(held):
                flat = batch.activations.pop(name)
                packed = encode_activation_states(flat, *limits) if keep == "states" else flat.bfloat16()
                theirs = [share[index] for share in shares]
                pieces = self._everyones(packed, [sum(lengths) for _, lengths in theirs])
                for piece, (keys, lengths) in zip(pieces, theirs, strict=True):
                    copies.add(piece, keys, lengths)
            copies.finish()
        store.seal()

    def _everyones(self, packed: Tensor, counts: list[int]) -> list[Tensor]:
        """The ranks' ``packed`` tensors, of ``counts`` entries."""
        if len(counts) == 1:
            return [packed]
        mine = packed.to(self._trainer.strategy.root_device).view(torch.uint8)
        padded = mine.new_zeros(max(counts), mine.shape[1])
        padded[: len(mine)] = mine
        pieces = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(pieces, padded)
        return [piece[:count].view(packed.dtype) for piece, count in zip(pieces, counts, strict=True)]

    def _batches(self, rows: Sequence[Row]) -> Iterator[tuple[Sequence[Row], int]]:
        """This rank's batches and how many rows of each are its own; the rest fills up to the other ranks' sizes."""
        # Longest first: rows of like length share a batch, and a batch that does not fit in memory fails at once.
        order = sorted(range(len(rows)), key=lambda i: -rows[i].length)
        span = self._batch_size * world_size()
        starts = range(0, len(order), span)
        shown = rank() == 0 and self._trainer.progress_bar_callback is not None
        for start in tqdm(starts, desc="Reference activations", unit="batch", disable=not shown, leave=False):
            share = order[start : start + span]
            mine = share[rank() :: world_size()]
            filler = [share[0]] * (-(-len(share) // world_size()) - len(mine))
            yield [rows[i] for i in [*mine, *filler]], len(mine)

    def _forward(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        first = {path: torch.as_tensor(v)[None] if _numeric(v) else [v] for path, v in rows[0].content.items()}
        layout = BatchLayout(None, first, 1, list(first))
        columns = collate_rows(rows, layout, self._pad_values)
        if "input_ids" in columns and "attention_mask" not in columns:
            lengths = torch.tensor([row.length for row in rows])
            columns["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        columns = self._trainer.precision_plugin.convert_input(columns)
        # Not through the module's transfer hooks: replay rows join a batch after them.
        columns = move_data_to_device(columns, self._trainer.strategy.root_device)
        recorded: dict[str, Any] = {}
        handles = [
            part.register_forward_hook(lambda _m, _a, out, name=name: recorded.setdefault(name, out))
            for name, part in self._layers.items()
        ]
        try:
            self._call(columns)
        finally:
            for handle in handles:
                handle.remove()
        return {name: self._checked(name, recorded.get(name), len(rows)) for name in self._layers}

    def _call(self, columns: dict[str, Any]) -> None:
        network = self._network()
        if network is not None:
            known = inspect.signature(anatomy.pretrained_model(self._module).forward).parameters  # type: ignore[union-attr]
            inputs = {key: value for key, value in columns.items() if key in known and key != "labels"}
            inputs |= {key: value for key, value in {"use_cache": False, "logits_to_keep": 1}.items() if key in known}
            network(**inputs)
        elif self._module.automatic_optimization:
            self._module.training_step(_nest(columns), 0)
        else:
            # Its training_step would step the optimizers; inputs come first in every batch.
            anatomy.find_backbone(self._module, next(iter(self._layers)))[1](next(iter(columns.values())))

    def _network(self) -> nn.Module | None:
        """The module to call on token ids: the FSDP2 root around the language model if there is one, else the model.

        None if there is no language model, or a watched module is not a part of it.
        """
        model = anatomy.pretrained_model(self._module)
        if model is None or "input_ids" not in inspect.signature(model.forward).parameters:
            return None
        if not set(self._layers.values()) <= set(model.modules()):
            return None
        for name, part in self._module.named_modules():
            if name and hasattr(part, "_get_fsdp_state") and any(inner is model for inner in part.modules()):
                return part
        return model

    def _checked(self, name: str, output: Any, rows: int) -> Tensor:
        value = output[0] if isinstance(output, (tuple, list)) else getattr(output, "last_hidden_state", output)
        fits = isinstance(value, Tensor) and value.ndim in (2, 3) and len(value) == rows and value.is_floating_point()
        if not fits:
            if output is None:
                shown = "nothing: it did not run"
            elif isinstance(value, Tensor):
                shown = f"a {str(value.dtype).removeprefix('torch.')} tensor {list(value.shape)}"
            else:
                shown = f"a `{type(value).__name__}`"
            raise MisconfigurationException(
                f"The watched module {name!r} put out {shown} for {rows} rows, but states are kept per row (and token) and"
                " hidden dimension: it must give `[rows, tokens, D]` or `[rows, D]`. Name another module in `layers=`."
            )
        return value.detach()

    def _lengths(self, rows: Sequence[Row], recorded: Mapping[str, Tensor]) -> list[int]:
        """Real tokens of each row; what has no token axis of its own has whatever the modules make of it."""
        widths = {name: hidden.shape[1] if hidden.ndim == 3 else 0 for name, hidden in recorded.items()}
        width = min(widths.values())
        lengths = [row.length if width and "input_ids" in row.content else max(width, 1) for row in rows]
        if len(set(widths.values())) > 1 or max(lengths, default=0) > max(width, 1):
            raise MisconfigurationException(
                f"The watched modules put out {widths} tokens a row for rows of up to {max(lengths, default=0)}, so tokens"
                " and states cannot be matched. Name modules in `layers=` that keep the network's tokens."
            )
        return lengths

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        training = [part for part in self._module.modules() if part.training]
        precision = self._trainer.precision_plugin
        logs = {name: vars(self._module).get(name) for name in ("log", "log_dict")}
        for part in training:
            part.training = False
        for name in logs:
            object.__setattr__(self._module, name, lambda *args, **kwargs: None)
        try:
            # Eager, also for a compiled network: compiled code knows nothing of the hooks that are set here.
            with torch.compiler.set_stance("force_eager"), torch.no_grad(), precision.forward_context():
                yield
        finally:
            for name, own in logs.items():
                if own is None:
                    object.__delattr__(self._module, name)
                else:
                    object.__setattr__(self._module, name, own)
            for part in training:
                part.training = True
            weights.reshard(self._module)


class _Copies:
    """Copies tensors from the device to the CPU, and writes each where it belongs while the next ones are under way."""

    def __init__(self, write: Callable[..., None]) -> None:
        self._write = write
        self._under_way: deque[tuple[Tensor, torch.cuda.Event | None, tuple[Any, ...]]] = deque()

    def add(self, tensor: Tensor, *args: Any) -> None:
        """Begin with a tensor; ``write(copy, *args)`` follows."""
        arrived = None
        if tensor.is_cuda:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            tensor = copy.copy_(tensor, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._under_way.append((tensor, arrived, args))
        if len(self._under_way) > _COPIES:
            self._end_one()

    def finish(self) -> None:
        """Write what is left."""
        while self._under_way:
            self._end_one()

    def _end_one(self) -> None:
        tensor, arrived, args = self._under_way.popleft()
        if arrived is not None:
            arrived.synchronize()
        self._write(tensor, *args)


def without_first_token(mask: Tensor) -> Tensor:
    """The token mask ``[R, T]`` without each row's first real token, on whichever side the padding is."""
    return mask & (mask.cumsum(-1) > 1)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The CPU tensor on ``device``, without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _places(lengths: list[int], hidden: Tensor, first: int = 0) -> Tensor:
    """Places of the rows' real tokens, from their ``first`` one on, in ``hidden.flatten(0, 1)``."""
    places = [torch.arange(first, n) + i * hidden.shape[1] for i, n in enumerate(lengths)]
    return to_device(torch.cat(places) if places else torch.zeros(0, dtype=torch.long), hidden.device)


def _device_room(device: torch.device) -> float:
    if device.type != "cuda":
        return float("inf")
    return torch.cuda.mem_get_info(device)[0] * _DEVICE_SHARE


def _numeric(value: Any) -> bool:
    return isinstance(value, (Tensor, int, float, bool))


def _nest(columns: Mapping[str, Any]) -> Any:
    """A batch from its leaves: containers as the default collation makes them."""
    if list(columns) == [""]:
        return columns[""]
    groups: dict[str, dict[str, Any]] = {}
    for path, value in columns.items():
        head, _, tail = path.partition(".")
        groups.setdefault(head, {})[tail] = value
    nested = {head: _nest(inner) for head, inner in groups.items()}
    return list(nested.values()) if all(head.isdigit() for head in nested) else nested
