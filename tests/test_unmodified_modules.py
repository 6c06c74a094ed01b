# SPDX-License-Identifier: Apache-2.0
"""LightningModules of other people, as they are: every callback attaches, or says why it cannot.

The table of the README is made of these cases.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel, ManualOptimBoringModel
from lightning.pytorch.demos.transformer import LightningTransformer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_cl.callbacks import (
    ActivationMarginRegularizer,
    ForgettingMonitor,
    LoRAInterpolator,
    ReplayDistillation,
    ReplayMixer,
    RLSRouterFitter,
)
from lightning_cl.replay import EpisodicMemory, GeneralSamples
from tests.helpers import models
from tests.test_attachment import CNN, Manual


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _words(seed: int) -> list[Any]:
    words = torch.randint(0, 40, (8, 2, 6), generator=_generator(seed))
    return [(pair[0], pair[1]) for pair in words]


def _vectors(width: int, seed: int) -> list[Tensor]:
    return list(torch.randn(8, width, generator=_generator(seed)))


def _images(seed: int) -> list[Any]:
    return [(image, i % 4) for i, image in enumerate(torch.randn(8, 3, 8, 8, generator=_generator(seed)))]


def _series(seed: int) -> list[dict[str, Tensor]]:
    past, future = (torch.rand(8, n, generator=_generator(seed)) + 1 for n in (12, 3))
    return [
        {"past_target": p, "future_target": f, "future_observed_values": torch.ones(3)}
        for p, f in zip(past, future, strict=True)
    ]


def _forecaster() -> pl.LightningModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from gluonts.torch.model.simple_feedforward.lightning_module import SimpleFeedForwardLightningModule
    return SimpleFeedForwardLightningModule(
        {"prediction_length": 3, "context_length": 12, "hidden_dimensions": [16, 16]}
    )


# Module, rows of a task by seed, and a layer whose output has one entry a row.
MODULES: dict[str, tuple[Any, Any, str]] = {
    "Lightning's Transformer demo": (functools.partial(LightningTransformer, vocab_size=40), _words, "model.embedding"),
    "Lightning's BoringModel": (BoringModel, functools.partial(_vectors, 32), "layer"),
    "GluonTS' feed-forward forecaster": (_forecaster, _series, "model.nn"),
    "a CNN, images and integer labels": (CNN, _images, "net.2"),
    "manual optimization, two optimizers": (Manual, functools.partial(_vectors, 4), "net"),
    "Lightning's ManualOptimBoringModel": (ManualOptimBoringModel, functools.partial(_vectors, 32), "layer"),
}
REFUSED = "refused"


def _fit(module: pl.LightningModule, tasks: list[Any], callbacks: list[pl.Callback], folder: Path) -> None:
    for rows in tasks:
        trainer = models.trainer(
            folder, max_steps=-1, max_epochs=1, callbacks=list(callbacks), limit_val_batches=0, log_every_n_steps=1
        )
        trainer.fit(module, DataLoader(rows, batch_size=4))


@pytest.fixture(params=list(MODULES))
def case(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[pl.LightningModule, list[Any], str]:
    make, rows, layer = MODULES[request.param]
    # The Transformer demo downloads its text unless the file is there.
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/wikitext-2.txt").write_text("a b c")
    torch.manual_seed(0)
    return make(), [rows(seed) for seed in range(2)], layer


def test_replay_mixer(case: Any, tmp_path: Path) -> None:
    module, tasks, _ = case
    before = dict(vars(type(module)))
    mixer = ReplayMixer(EpisodicMemory(6), rows_per_batch=2)
    _fit(module, tasks, [mixer], tmp_path)
    assert len(mixer.sources[0]) == 6  # type: ignore[arg-type]
    assert dict(vars(type(module))) == before
    assert not {"training_step", "on_after_batch_transfer", "manual_backward"} & set(vars(module))


def test_activation_margin(case: Any, tmp_path: Path) -> None:
    module, tasks, layer = case
    source = GeneralSamples(tasks[0], num_samples=8)
    callback = ActivationMarginRegularizer(layers=layer)
    seen: list[bool] = []

    class Sees(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            seen.append(any(name.startswith("cl/") and "margin" in name for name in trainer.callback_metrics))

    _fit(module, tasks, [ReplayMixer(source, rows_per_batch=2), callback, Sees()], tmp_path)
    assert all(seen)
    assert len(seen) == 4


def test_interpolator(case: Any, tmp_path: Path) -> None:
    """The average alone and with consistency on the memory's rows, for trainable weights that are not LoRA."""
    module, tasks, layer = case
    callback = LoRAInterpolator(parameters="trainable", layers=[layer])
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    _fit(module, tasks, [ReplayMixer(EpisodicMemory(6), rows_per_batch=2), callback], tmp_path)
    assert any(not torch.equal(start[name], p) for name, p in module.named_parameters())


def test_router(case: Any, tmp_path: Path) -> None:
    """Without LoRA layers the router is fitted and tells tasks apart; the module is trained as ever."""
    module, tasks, layer = case
    callback = RLSRouterFitter(feature_layer=layer, expansion_dim=32)
    _fit(module, tasks, [callback], tmp_path)
    batch = next(iter(DataLoader(tasks[1], batch_size=4)))
    assert len(callback.route(batch).names) == 4


def test_distillation_needs_a_language_model(case: Any, tmp_path: Path) -> None:
    module, tasks, _ = case
    callbacks = [ReplayMixer(EpisodicMemory(6)), ReplayDistillation()]
    with pytest.raises(MisconfigurationException, match="language-model head"):
        _fit(module, tasks, callbacks, tmp_path)


def test_monitor(tmp_path: Path) -> None:
    """The monitor needs a metric that the module logs: the modules that log one are measured, the others told."""

    class Scored(CNN):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            x, y = self.unpack(batch)
            self.log("acc", (self(x).argmax(1) == y).float().mean(), batch_size=len(x))

    monitor, module = ForgettingMonitor("acc", plots=False, dirpath=str(tmp_path)), Scored()
    loaders = [DataLoader(_images(seed), batch_size=4) for seed in range(2)]
    for loader in loaders:
        models.trainer(tmp_path, max_steps=-1, max_epochs=1, callbacks=[monitor]).fit(module, loader, loaders)
    assert set(monitor.matrix.scores()) >= {(0, "task_0"), (1, "task_0"), (1, "task_1")}
