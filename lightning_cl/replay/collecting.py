# SPDX-License-Identifier: Apache-2.0
"""One evaluation pass of the reference model over a fixed set of rows: thresholds, and the states of every token."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_cl import anatomy, weights
from lightning_cl.distributed import gather_objects, rank, world_size
from lightning_cl.functional.fingerprint import tensor_fingerprint
from lightning_cl.functional.margin import ActivationMoments, encode_activation_states
from lightning_cl.replay.rows import BatchLayout, Row, collate_rows

# Share of a GPU's free memory that activations may wait in until the thresholds are known; else they wait on the CPU.
_DEVICE_SHARE = 0.25

# Batches whose states the ranks exchange at once.
_EXCHANGE = 16


@dataclass
class Collected:
    """What a pass over the rows gave, the same on every rank.

    Attributes:
        thresholds: ``[2, D]`` float32 on the CPU by layer: lower, upper.
        states: ``[tokens of all rows, W]`` on the CPU by layer, in the rows' order; empty if nothing was kept.
        tokens: tokens of each row by row id.
    """

    thresholds: dict[str, Tensor]
    states: dict[str, Tensor]
    tokens: dict[str, int]


def row_key(row: Row) -> str:
    """The row's id as ``step.replay.ids`` shows it."""
    return f"{row.source}:{row.id}"


def rows_digest(rows: Sequence[Row]) -> str:
    """A hash of ids and inputs of all rows, in order: what the network would read, whatever made it."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row_key(row).encode())
        for path, value in sorted(row.content.items()):
            if path == "labels":
                continue
            digest.update(path.encode())
            if isinstance(value, Tensor):
                digest.update(str((value.dtype, tuple(value.shape))).encode())
                digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            else:
                digest.update(repr(value).encode())
    return digest.hexdigest()


def weights_fingerprint(module: nn.Module, adapters: bool = True) -> str:
    """A hash of every bit of a network's parameters and persistent buffers, independent of how they are sharded.

    Args:
        module: the network.
        adapters: whether PEFT adapter weights count. Without them, a LoRA model has its base's fingerprint.

    Returns:
        64 hexadecimal digits. Collective for a sharded module.
    """
    skipped: set[int] = set()
    for layer in anatomy.adapter_layers(module):
        base = {id(p) for p in layer.get_base_layer().parameters()}
        skipped |= {id(p) for p in layer.parameters() if id(p) not in base}
    if adapters:
        skipped.clear()
    sharded = weights.is_sharded(module)
    names, marks = [], []
    for name, tensor in _persistent(module):
        if id(tensor) in skipped:
            continue
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if sharded and whole is tensor and isinstance(tensor, nn.Parameter):
            whole = weights.gather(module, {name: weights.local(tensor)}, {name: tensor}, everywhere=True)[name]
        shape = tuple(whole.shape)
        names.append(f"{weights.clean_name(name).replace('_orig_mod.', '').replace('base_layer.', '')}{shape}")
        marks.append(tensor_fingerprint(whole))
    # one transfer for all of them
    device = marks[0].device if marks else torch.device("cpu")
    values = torch.stack([mark.to(device) for mark in marks]).tolist() if marks else []
    text = ";".join(sorted(f"{name}={value}" for name, value in zip(names, values, strict=True)))
    return hashlib.sha256(text.encode()).hexdigest()


def _persistent(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from module.named_parameters(remove_duplicate=True)
    for prefix, part in module.named_modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


class ActivationCollector:
    """Runs rows through the module's network in evaluation mode and records what chosen submodules put out.

    Every rank takes its share of the rows, all in batches of similar length; the ranks make the same number of passes,
    as sharded weights need. Activations wait on the device (or on the CPU if they are too many) until the thresholds
    are known, so that the network runs once over each row and no more.

    Hugging Face models are called with the inputs that they know (and asked for the logits of one token only); any
    other module runs its own ``training_step``, whose logging is dropped, or under manual optimization its network.

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

    def collect(self, rows: Sequence[Row], num_std: float, keep: Literal["states", "values"] | None) -> Collected:
        """Make the pass.

        Args:
            rows: the rows, the same on every rank.
            num_std: half width of the neutral interval in standard deviations.
            keep: 2-bit ``"states"``, bfloat16 ``"values"``, or None for the thresholds alone.

        Raises:
            MisconfigurationException: if a watched module does not run, or puts out another shape.
        """
        held: list[tuple[list[str], list[int], dict[str, Tensor]]] = []
        room = _device_room(self._trainer.strategy.root_device)
        with self._evaluation():
            for batch, real in self._batches(rows):
                recorded = self._forward(batch)
                lengths = self._lengths(batch[:real], recorded)
                # rows that only fill the batch up count nowhere
                mask = _mask([*lengths, *[0] * (len(batch) - real)], next(iter(recorded.values())))
                kept: dict[str, Tensor] = {}
                for name, hidden in recorded.items():
                    moments = self._moments.setdefault(name, ActivationMoments(hidden.shape[-1], hidden.device))
                    moments.update(hidden, without_first_token(mask) if self._skip_first else mask)
                    if keep:
                        flat = hidden.flatten(0, 1).index_select(0, _real_tokens(lengths, hidden))
                        room -= flat.numel() * flat.element_size()
                        kept[name] = flat if room > 0 else flat.cpu()
                held.append(([row_key(row) for row in batch[:real]], lengths, kept))
        for name, moments in self._moments.items():
            merged = ActivationMoments(len(moments.count), moments.count.device)
            for state in gather_objects(moments.state_dict()):
                other = ActivationMoments(len(moments.count), moments.count.device)
                other.load_state_dict(state)
                merged.merge(other)
            self._moments[name] = merged
        limits = {name: moments.thresholds(num_std) for name, moments in self._moments.items()}
        thresholds = {name: torch.stack(pair).cpu() for name, pair in limits.items()}
        shares = gather_objects([(keys, lengths) for keys, lengths, _ in held])
        tokens = {key: n for share in shares for key, n in _pairs(share)}
        states = self._exchange(rows, held, limits, keep) if keep else {}
        return Collected(thresholds, states, {row_key(row): tokens[row_key(row)] for row in rows})

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
        """The module to call on token ids: the FSDP2 root around the language model if there is one, else the model."""
        model = anatomy.pretrained_model(self._module)
        if model is None or "input_ids" not in inspect.signature(model.forward).parameters:
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
        value = value.detach()
        return value if value.ndim == 3 else value[:, None]

    def _lengths(self, rows: Sequence[Row], recorded: Mapping[str, Tensor]) -> list[int]:
        """Real tokens of each row; data without a token axis of its own has whatever the modules make of it."""
        widths = {name: hidden.shape[1] for name, hidden in recorded.items()}
        width = min(widths.values())
        lengths = [row.length if "input_ids" in row.content else width for row in rows]
        if len(set(widths.values())) > 1 or max(lengths, default=0) > width:
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

    def _exchange(
        self,
        rows: Sequence[Row],
        held: list[tuple[list[str], list[int], dict[str, Tensor]]],
        limits: Mapping[str, tuple[Tensor, Tensor]],
        keep: Literal["states", "values"],
    ) -> dict[str, Tensor]:
        """Everybody's states in the order of the rows."""
        pieces: dict[str, dict[str, Tensor]] = {name: {} for name in limits}
        for start in range(0, len(held), _EXCHANGE):
            mine: list[tuple[str, list[str], list[int], Tensor]] = []
            for keys, lengths, activations in held[start : start + _EXCHANGE]:
                for name, flat in activations.items():
                    packed = encode_activation_states(flat, *limits[name]) if keep == "states" else flat.bfloat16()
                    mine.append((name, keys, lengths, packed.cpu()))
                activations.clear()
            for theirs in gather_objects(mine):
                for name, keys, lengths, packed in theirs:
                    pieces[name] |= zip(keys, packed.split(lengths), strict=True)
        return {name: torch.cat([found[row_key(row)] for row in rows]) for name, found in pieces.items()}


def without_first_token(mask: Tensor) -> Tensor:
    """The token mask ``[R, T]`` without each row's first real token, on whichever side the padding is."""
    return mask & (mask.cumsum(-1) > 1)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The CPU tensor on ``device``, without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _mask(lengths: list[int], hidden: Tensor) -> Tensor:
    mask = torch.arange(hidden.shape[1])[None] < torch.tensor(lengths)[:, None]
    return to_device(mask, hidden.device)


def _real_tokens(lengths: list[int], hidden: Tensor) -> Tensor:
    """Places of the rows' real tokens in ``hidden.flatten(0, 1)``."""
    places = [torch.arange(n) + i * hidden.shape[1] for i, n in enumerate(lengths)]
    return to_device(torch.cat(places) if places else torch.zeros(0, dtype=torch.long), hidden.device)


def _pairs(batches: Sequence[tuple[list[str], list[int]]]) -> Iterator[tuple[str, int]]:
    for keys, lengths in batches:
        yield from zip(keys, lengths, strict=True)


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
