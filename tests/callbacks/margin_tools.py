# SPDX-License-Identifier: Apache-2.0
"""Small runs with the margin regularizer, and the paper's loss written naively."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_cl.callbacks import ActivationMarginRegularizer, ReplayMixer
from lightning_cl.replay import GeneralSamples
from tests.helpers import models

ROWS = models.TokenRows(6, length=11, seed=5, ragged=True).rows


class Recorder(ActivationMarginRegularizer):
    """Keeps what each step's term was given and gave."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps: list[dict[str, Any]] = []

    def _term(self, step: Any) -> Tensor | None:
        value = super()._term(step)
        hidden = {name: h.detach().clone() for name, h in step.activations.items()}
        if step.replay.count:
            self.steps.append(
                {"ids": step.replay.ids, "hidden": hidden, "mask": step.replay.token_mask, "value": value}
            )
        return value


def source(rows: Any = ROWS, **kwargs: Any) -> GeneralSamples:
    return GeneralSamples(rows, num_samples=len(rows), **kwargs)


def module(lora: bool = False, seed: int = 0, **kwargs: Any) -> models.PlainLM:
    network = models.tiny_llama(seed)
    return models.PlainLM(models.lora(network) if lora else network, **{"lr": 0.5, **kwargs})


def fit(
    folder: Any,
    callback: Callback,
    net: pl.LightningModule | None = None,
    mixer: ReplayMixer | None = None,
    data: Any = None,
    ckpt: Any = None,
    more: tuple[Callback, ...] = (),
    **kwargs: Any,
) -> pl.LightningModule:
    net = net or module()
    mixer = mixer or ReplayMixer(source(), rows_per_batch=2)
    trainer = models.trainer(folder, callbacks=[mixer, callback, *more], **kwargs)
    trainer.fit(net, data or models.loader(), ckpt_path=ckpt, weights_only=True if ckpt else None)
    return net


def references(network: Any, layer: str = "norm") -> dict[str, Tensor]:
    """Each row's float32 activations, one unpadded row at a time."""
    found: dict[str, Tensor] = {}
    backbone = network.get_base_model().model if hasattr(network, "get_base_model") else network.model
    part = backbone.get_submodule(layer)
    chosen = torch.randperm(len(ROWS), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        for i in chosen:
            outputs: list[Any] = []
            handle = part.register_forward_hook(lambda _m, _a, out, o=outputs: o.append(out))
            backbone.eval()(ROWS[i]["input_ids"][None])
            handle.remove()
            out = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
            found[f"GeneralSamples:{i}"] = out.reshape(-1, out.shape[-1])
    return found


def naive(
    step: dict[str, Any], layer: str, h0: dict[str, Tensor], objective: str, reduction: str, skip: bool
) -> Tensor:
    """The term as the paper writes it, row by row and token by token, in float64."""
    tokens = torch.cat([h[1:] if skip else h for h in h0.values()]).double()
    mean, sd = tokens.mean(0), tokens.std(0, correction=0)
    lower, upper = (mean - sd).float().double(), (mean + sd).float().double()
    parts = []
    for row, key in enumerate(step["ids"]):
        n = len(h0[key])
        assert int(step["mask"][row].sum()) == n
        h, r = step["hidden"][layer][row, :n].double(), h0[key].double()
        if objective == "l1":
            m = (h - r).abs()
        elif objective == "l2":
            m = (h - r) ** 2
        else:
            inside = (h - upper).clamp_min(0) + (lower - h).clamp_min(0)
            m = torch.where(r <= lower, (h - lower).clamp_min(0), inside)
            m = torch.where(r >= upper, (upper - h).clamp_min(0), m)
        parts.append(m[1:] if skip else m)
    entries = torch.cat(parts)
    return entries.sum() / ((entries != 0).sum() + 1e-8 if reduction == "violations" else entries.numel())


def stateful(seed: int) -> Any:
    """A loader that resumes in the middle of an epoch."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(models.TokenRows(16, seed=seed), batch_size=4, collate_fn=models.collate)


def logged(folder: Path, callback: ActivationMarginRegularizer, **kwargs: Any) -> dict[str, list[float]]:
    class Keep(Callback):
        values: dict[str, list[float]] = {}  # noqa: RUF012

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            for key, value in trainer.callback_metrics.items():
                self.values.setdefault(key, []).append(float(value))

    keep = Keep()
    keep.values = {}
    fit(folder, callback, more=(keep,), **kwargs)
    return keep.values


def refused(folder: Path, message: str, callback: Callback, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        fit(folder, callback, *args, **kwargs)


class Pairs(torch.utils.data.Dataset):
    def __init__(self, n: int, shape: tuple[int, ...], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(n, *shape, generator=generator)
        self.y = torch.randint(0, 3, (n,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i], self.y[i]
