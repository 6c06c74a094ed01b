# SPDX-License-Identifier: Apache-2.0
"""The reference of the margin regularizer: taken once, kept in memory or in a file, and refused to anything else."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_cl import anatomy, weights
from lightning_cl.distributed import gather_objects, raise_together
from lightning_cl.replay.anchor import WeightAnchor
from lightning_cl.replay.collecting import ActivationCollector
from lightning_cl.replay.identity import row_key, rows_digest, weights_fingerprint
from lightning_cl.replay.rows import Row
from lightning_cl.replay.state_store import StateStore


@dataclass(frozen=True)
class ReferenceOptions:
    """How the reference is taken; the arguments of the callback by the same names.

    Attributes:
        objective: ``"margin"``, ``"l1"`` or ``"l2"``.
        reference: ``"stored"`` or ``"recompute"``.
        anchor: ``"initial"`` or ``"previous_task"``.
        num_std: half width of the neutral interval in standard deviations.
        skip_first_token: leave the first token of each row out.
        store: file of the states, or None for memory.
        allow_other_model: accept a file of other weights.
        batch_size: rows of one forward pass.
    """

    objective: Literal["margin", "l1", "l2"]
    reference: Literal["stored", "recompute"]
    anchor: Literal["initial", "previous_task"]
    num_std: float
    skip_first_token: bool
    store: str | None
    allow_other_model: bool
    batch_size: int


class ReferenceStates:
    """What a run knows of its reference model: states (or activations) of fixed rows, thresholds, a copy of weights.

    Attributes:
        states: the stored states; None with ``reference="recompute"``, or before :meth:`take`.
    """

    def __init__(self, options: ReferenceOptions) -> None:
        self.options = options
        self.states: StateStore | None = None
        # What was taken, and of what: plain values, as checkpoints hold them.
        self._taken: dict[str, Any] | None = None
        self._thresholds: dict[str, Tensor] = {}
        # The reference's weights, for `reference="recompute"`, and the task that they were copied in.
        self._copy = WeightAnchor(options.anchor)
        self._copied_at = -1
        self._module: pl.LightningModule | None = None
        # Thresholds where the activations are.
        self._limits: dict[str, tuple[Tensor, Tensor]] = {}
        self._check_tokens = TokenCheck()

    def bind(self, module: pl.LightningModule) -> Callable[[], Any]:
        """Belong to this module from now on; gives the context that holds the reference's weights in it."""
        self._module = module
        self._copy.rebind()
        self._forget_device()
        return lambda: self._copy.inside(module)

    def thresholds(self, layer: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Lower and upper threshold of each dimension, ``[D]`` float32 each."""
        if layer not in self._limits:
            kept = self._thresholds[layer] if self.states is None else self.states.layers[layer].thresholds
            lower, upper = kept.to(device)
            self._limits[layer] = (lower, upper)
        return self._limits[layer]

    def batch(self, layer: str, keys: Sequence[str], mask: Tensor | None, device: torch.device) -> Tensor:
        """The stored states (or activations) of some rows, each beside its token: ``[R, T, W]``, or ``[R, W]``.

        Args:
            layer: name of the layer.
            keys: ids of the rows.
            mask: bool ``[R, T]``, True at real tokens; None for rows that have one activation each.
            device: where the rows are wanted; nothing waits for the copy.

        Raises:
            MisconfigurationException: if the rows have other tokens than when the states were taken.
        """
        states = self.states
        assert states is not None
        width = 1 if mask is None else mask.shape[1]
        self._check_tokens(keys, [states.tokens(key) for key in keys], width, mask)
        on_gpu = device.type == "cuda"
        rows = states.batch(layer, keys, width, pin_memory=on_gpu).to(device, non_blocking=True)
        return rows[:, 0] if mask is None else rows

    def take(
        self,
        trainer: pl.Trainer,
        layers: Sequence[str],
        rows: Sequence[Row],
        pad_values: Mapping[str, float],
        task_index: int,
    ) -> None:
        """Take the reference with the weights that the model has now, unless the run has one already. Collective.

        Args:
            trainer: the Trainer of the fit.
            layers: dotted names of the submodules to record.
            rows: the fixed rows.
            pad_values: fill by key, for keys of variable length outside the usual ones.
            task_index: the task that begins or goes on.

        Raises:
            StoreError: if the file belongs to something else, or is damaged.
            MisconfigurationException: if settings or rows are not those of then, or the states are gone.
        """
        new_task = self.options.anchor == "previous_task" and self._copied_at != task_index
        if self.options.reference == "recompute" and (new_task or not self._copy.taken):
            self._warn_of_late_start(trainer, task_index)
            assert self._module is not None
            self._copy.take(self._module)
            self._copied_at = task_index
        if self.options.reference == "stored" or self.options.objective == "margin":
            self._take(trainer, list(layers), rows, pad_values, task_index)

    def _take(
        self,
        trainer: pl.Trainer,
        layers: list[str],
        rows: Sequence[Row],
        pad_values: Mapping[str, float],
        task_index: int,
    ) -> None:
        module, options = self._module, self.options
        assert module is not None
        digest = rows_digest(rows)
        settings = self._settings(layers)
        stored = options.reference == "stored"
        if self._taken is not None and (options.anchor == "initial" or self._taken["task"] == task_index):
            self._check_settings(settings)
            if self._taken["rows"] == digest:
                if stored and self.states is None:
                    self._open()
                return
            if stored and not self._adapters_off:
                raise MisconfigurationException(
                    f"The fixed replay rows are not those whose states were stored ({len(rows)} rows, hash {digest[:12]};"
                    f" stored: {self._taken['count']} rows, hash {self._taken['rows'][:12]}): other texts, another"
                    " tokenizer, or truncated differently (`max_tokens`). The reference model is gone, so theirs cannot"
                    ' be taken. Use the same rows, `anchor="previous_task"`, or `reference="recompute"`.'
                )
        elif stored:
            self._warn_of_late_start(trainer, task_index)
        held = weights.adapters_disabled(module) if self._adapters_off else nullcontext()
        with held if stored else self._copy.inside(module):
            manifest = {**settings, **self._manifest(trainer, digest, layers[0])}
            self.states = self._reusable(manifest) if options.store else None
            if self.states is None:
                collector = ActivationCollector(
                    trainer, module, layers, pad_values, options.batch_size, options.skip_first_token
                )
                self._collect(trainer, collector, rows, manifest)
        self._forget_device()
        self._taken = {"task": task_index, "rows": digest, "count": len(rows), "settings": settings}
        self._taken["digest"] = None if self.states is None else self.states.digest

    @property
    def _adapters_off(self) -> bool:
        """Whether the reference is the model with its adapters off: then it never goes away."""
        module = self._module
        if module is None or self.options.anchor != "initial" or not anatomy.has_lora(module):
            return False
        return not self._copy.names(module)

    def _settings(self, layers: list[str]) -> dict[str, Any]:
        """What the states depend on, apart from weights, rows and tokenizer."""
        return {
            "layers": layers,
            "objective": self.options.objective,
            "num_std": self.options.num_std if self.options.objective == "margin" else None,
            "skip_first_token": self.options.skip_first_token,
            "anchor": self.options.anchor,
        }

    def _manifest(self, trainer: pl.Trainer, rows: str, layer: str) -> dict[str, Any]:
        from lightning_cl import __version__

        assert self._module is not None
        network = anatomy.find_backbone(self._module, layer)[1]
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in network.parameters()})
        return {
            "weights": weights_fingerprint(network, adapters=not self._adapters_off),
            "tokenizer": _tokenizer_name(trainer, self._module),
            "rows": rows,
            "dtype": f"{'+'.join(dtypes)}, precision {trainer.precision}",
            "version": __version__,
        }

    def _collect(
        self, trainer: pl.Trainer, collector: ActivationCollector, rows: Sequence[Row], manifest: dict[str, Any]
    ) -> None:
        start = time.perf_counter()
        keep: Any = {"margin": "states", "l1": "values", "l2": "values"}[self.options.objective]
        stored = self.options.reference == "stored"
        found = collector.collect(rows, self.options.num_std, keep if stored else None, manifest)
        if found.store is None:
            self._thresholds = found.thresholds
            return
        self.states = found.store
        path = self.options.store
        if path:
            self._write(trainer, path)
        tokens = sum(self.states.tokens(row) for row in self.states.rows)
        rank_zero_info(
            f"Reference activations of {len(rows)} rows, {tokens} tokens: {self.states.nbytes() / 2**20:.1f} MiB in"
            f" {time.perf_counter() - start:.1f} s ({path or 'in memory'})."
        )

    def _write(self, trainer: pl.Trainer, path: str) -> None:
        """One process of each node writes, and all of them read: folders may or may not be shared."""
        error: Exception | None = None
        try:
            if trainer.local_rank == 0:
                assert self.states is not None
                self.states.write(path)
        except Exception as found:
            error = found
        raise_together(error)
        self.states = StateStore.open(path)

    def _reusable(self, manifest: dict[str, Any]) -> StateStore | None:
        """The states in the file at ``store``, if there are any and they are what this run would take now."""
        path = str(self.options.store)
        error: Exception | None = None
        found: StateStore | None = None
        try:
            if Path(path).is_file():
                found = StateStore.open(path)
                if self._taken is not None and self._taken["digest"] == found.digest:
                    # This run's reference of an earlier task, which the new one replaces.
                    found = None
                else:
                    found.require(
                        {k: v for k, v in manifest.items() if k != "weights" or not self.options.allow_other_model},
                        f"Delete {path} to take them anew from the model as it is, pass another `store=`, or (for other"
                        " weights, on purpose) `allow_other_model=True`.",
                    )
        except Exception as raised:
            error = raised
        raise_together(error)
        return found if all(gather_objects(found is not None)) else None

    def _open(self) -> None:
        """After a restart: the states that the checkpoint names."""
        assert self._taken is not None
        path, digest = self.options.store, self._taken["digest"]
        error: Exception | None = None
        try:
            if path is None or not Path(path).is_file():
                raise MisconfigurationException(
                    f"The checkpoint refers to stored activation states ({digest[:12]}) that are not at `store={path!r}`."
                    " Put their file there; the model that they were taken of is gone."
                )
            self.states = StateStore.open(path)
            if self.states.digest != digest:
                raise MisconfigurationException(
                    f"{path} holds other activation states ({self.states.digest[:12]}) than the checkpoint refers to"
                    f" ({digest[:12]}). Put the file of this run there."
                )
        except Exception as raised:
            error = raised
        raise_together(error)

    def _check_settings(self, new: dict[str, Any]) -> None:
        assert self._taken is not None
        old = self._taken["settings"]
        different = [f"{key}: then {old[key]!r}, now {new[key]!r}" for key in new if old[key] != new[key]]
        if different:
            raise MisconfigurationException(
                f"The reference of this run was taken with other settings ({'; '.join(different)}). Use those of then; a"
                " reference with new settings needs a new run from the initial model."
            )

    def _warn_of_late_start(self, trainer: pl.Trainer, task_index: int) -> None:
        if self.options.anchor == "initial" and not self._adapters_off and (task_index > 0 or trainer.global_step > 0):
            rank_zero_warn(
                f'`ActivationMarginRegularizer(anchor="initial")` begins in task {task_index} at step'
                f" {trainer.global_step} without a reference from before: it takes the model as it is now."
            )

    def state_dict(self) -> dict[str, Any]:
        """The states (or the hash of their file), thresholds, and the copied weights, whole. Collective if sharded."""
        in_memory = self.states if self.options.store is None else None
        return {
            "taken": self._taken,
            "states": None if in_memory is None else in_memory.state_dict(),
            "thresholds": dict(self._thresholds),
            "copy": self._copy.state_dict(self._module),
            "copied_at": self._copied_at,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take all of it back."""
        self._taken = state["taken"]
        self.states = None if state["states"] is None else StateStore.from_state_dict(state["states"])
        self._thresholds = dict(state["thresholds"])
        self._copy.load_state_dict(state["copy"])
        self._copied_at = state["copied_at"]
        self._forget_device()

    def _forget_device(self) -> None:
        self._limits.clear()
        self._check_tokens = TokenCheck()


def cut_differently(found: str) -> MisconfigurationException:
    """Tokens and states that cannot be matched; ``found`` says what the watched modules saw."""
    return MisconfigurationException(
        f"The watched modules saw {found}: replay rows are cut differently than when the states were taken, so tokens and"
        " states cannot be matched. Cut rows in the data (`GeneralSamples(max_tokens=...)`) and not in `training_step`,"
        " and keep the setting."
    )


class TokenCheck:
    """Refuses replay rows whose tokens do not lie in the batch as they did when their states were taken."""

    def __init__(self) -> None:
        self._compared = False

    def __call__(self, keys: Sequence[str], lengths: Sequence[int], width: int, mask: Tensor | None) -> None:
        """Compare a batch's rows. On a GPU the mask is looked at in the first call only: that waits for the device.

        Args:
            keys: ids of the rows.
            lengths: tokens of each row then.
            width: tokens of a row in the batch, padding included.
            mask: bool ``[R, width]``, True at real tokens; None for rows without a token axis.

        Raises:
            MisconfigurationException: for another number of tokens, or padding before them.
        """
        if max(lengths) > width:
            raise cut_differently(f"{width} tokens a row, and rows whose stored states have {max(lengths)}")
        if mask is None or (mask.is_cuda and self._compared):
            return
        self._compared = True
        mask = mask.cpu()
        if not torch.equal(mask, torch.arange(width) < torch.tensor(lengths)[:, None]):
            key, new, old = next(
                ((k, int(n), m) for k, n, m in zip(keys, mask.sum(1), lengths, strict=True) if n != m),
                (keys[0], "padding before the", "it behind them"),
            )
            raise cut_differently(f"{new} tokens in row {key!r}, whose stored states have {old}")


def fixed_rows(sources: list[Any]) -> list[Row]:
    """The rows of the sources that have the same ones in the whole task, in order; other sources have none.

    Raises:
        MisconfigurationException: if two different rows have one id.
    """
    rows: dict[str, Row] = {}
    for source in sources:
        found = source.fixed_rows() if hasattr(source, "fixed_rows") else []
        if hasattr(source, "row"):
            found = [source.row(index) for index in range(source.available())]
        for row in found:
            other = rows.setdefault(row_key(row), row)
            if other is not row and rows_digest([other]) != rows_digest([row]):
                raise MisconfigurationException(
                    f"Two rows of the replay sources {[s.name for s in sources]} have the id {row_key(row)!r}, so their"
                    " states cannot be told apart. Give one `GeneralSamples` all of the data."
                )
    return list(rows.values())


def _tokenizer_name(trainer: pl.Trainer, module: pl.LightningModule) -> str:
    """What is known of the tokenizer; what it made of the texts is in the rows' hash."""
    for owner in (module, getattr(trainer, "datamodule", None)):
        tokenizer = getattr(owner, "tokenizer", None)
        if tokenizer is not None:
            size = f", {len(tokenizer)} tokens" if hasattr(tokenizer, "__len__") else ""
            return type(tokenizer).__name__ + size
    return "none"
