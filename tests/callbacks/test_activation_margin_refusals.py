# SPDX-License-Identifier: Apache-2.0
"""What the margin regularizer refuses, and what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_cl.callbacks import ActivationMarginRegularizer, ReplayMixer
from lightning_cl.replay import EpisodicMemory, GeneralSamples
from tests.callbacks.margin_tools import (
    Pairs,
    Recorder,
    fit,
    module,
    refused,
    source,
)
from tests.helpers import models, spawn
from tests.helpers.fsdp1 import cpu_fsdp1

# ------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_std": 0}, r"`num_std=0`: the thresholds are"),
        ({"num_std": -1.0}, r"`num_std=-1.0`"),
        ({"weight": -1.0}, r"weight=-1.0\)`: the factor of a loss must be a finite number >= 0"),
        ({"weight": "auto"}, r"weight='auto'\)`"),
        ({"weight": "dynamic", "target": 0.1}, r"both set the weight"),
        ({"target": -0.1}, r"`target=-0.1`: a penalty"),
        ({"target": 0.1, "weight": 0}, r"target=0.1, weight=0, max_weight=100.0\)`: the first weight must lie above 0"),
        (
            {"target": 0.1, "weight": 200.0},
            r"weight=200.0, max_weight=100.0\)`: the first weight .* at most at the bound",
        ),
        ({"max_weight": 0.0}, r"max_weight=0.0\)`: the bound of the weight"),
        ({"max_weight": float("inf")}, r"max_weight=inf\)`: the bound of the weight"),
        ({"weight": float("nan")}, r"weight=nan\)`: the factor of a loss"),
        ({"num_std": float("nan")}, r"`num_std=nan`"),
        ({"layers": []}, r"layers=\[\]\)`: name at least one layer"),
        ({"objective": "l3"}, r"objective='l3'\)`: use one of \['margin', 'l1', 'l2'\]"),
        ({"reference": "live"}, r"reference='live'"),
        ({"anchor": "auto"}, r"anchor='auto'\)`: use one of \['initial', 'previous_task'\]"),
        ({"reduction": "sum"}, r"reduction='sum'"),
        ({"collect_batch_size": 0}, r"collect_batch_size=0\)`: at least 1"),
        ({"store": "x", "reference": "recompute"}, r"recomputed in each step is not stored"),
    ],
)
def test_bad_values(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActivationMarginRegularizer(**kwargs)


def test_no_replay_rows_in_the_run(tmp_path: Path) -> None:
    trainer = models.trainer(tmp_path, callbacks=[ActivationMarginRegularizer()])
    with pytest.raises(MisconfigurationException, match=r"no callback of this Trainer adds any. Add `ReplayMixer\("):
        trainer.fit(module(), models.loader())


def _fsdp1(rank: int, folder: Path) -> None:
    trainer = models.trainer(
        folder,
        devices=2,
        strategy=cpu_fsdp1(whole=True),
        callbacks=[ReplayMixer(source(), rows_per_batch=2), ActivationMarginRegularizer()],
    )
    with pytest.raises(MisconfigurationException, match=r"\(FSDP1\) the weights exist only inside .* Use FSDP2"):
        trainer.fit(module(), models.loader())


def test_fsdp1_is_refused(tmp_path: Path) -> None:
    spawn.run(_fsdp1, 2, tmp_path)


def test_a_layer_that_does_not_exist(tmp_path: Path) -> None:
    refused(
        tmp_path,
        r"No submodule is called 'model.norn'.*Closest names: .*norm",
        ActivationMarginRegularizer(layers="model.norn"),
    )


def test_no_source_with_fixed_rows(tmp_path: Path) -> None:
    message = r"none of the replay sources \['EpisodicMemory'\] has one. Add `GeneralSamples\(...\)`"
    refused(tmp_path, message, ActivationMarginRegularizer(), mixer=ReplayMixer(EpisodicMemory(4)))
    refused(tmp_path, message, ActivationMarginRegularizer(reference="recompute"), mixer=ReplayMixer(EpisodicMemory(4)))


def test_two_sources_with_the_same_ids(tmp_path: Path) -> None:
    other = source(models.TokenRows(6, seed=9).rows)
    refused(
        tmp_path,
        r"Two rows of the replay sources .* have the id 'GeneralSamples:\d'",
        ActivationMarginRegularizer(),
        mixer=ReplayMixer([source(), other]),
    )


class Images(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.head = nn.Linear(8, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).flatten(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            "conv",
            r"The watched module 'conv' put out a float32 tensor \[6, 2, 2, 2\] for 6 rows.*`\[rows, tokens, D\]`",
        ),
        ("unused", r"The watched module 'unused' put out nothing: it did not run"),
    ],
)
def test_a_layer_without_rows_and_hidden_dimension(tmp_path: Path, layer: str, message: str) -> None:
    data = torch.utils.data.DataLoader(Pairs(8, (1, 4, 4), 0), batch_size=4)
    mixer = ReplayMixer(GeneralSamples(Pairs(6, (1, 4, 4), 1), num_samples=6), rows_per_batch=2)
    refused(tmp_path, message, ActivationMarginRegularizer(layers=layer), Images(), mixer, data)


class Cutting(models.PlainLM):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return super().training_step({k: v[:, :5] for k, v in batch.items()}, batch_idx)


def test_rows_cut_in_training_step(tmp_path: Path) -> None:
    message = r"saw 5 tokens a row, the batch \d+: replay rows are cut differently than when the states were taken"
    refused(tmp_path, message, ActivationMarginRegularizer(), Cutting(models.tiny_llama()))


def test_rows_cut_differently_in_a_later_task(tmp_path: Path) -> None:
    callback, net = ActivationMarginRegularizer(), module()
    fit(tmp_path, callback, net)
    message = r"not those whose states were stored .*truncated differently \(`max_tokens`\).*Use the same rows"
    refused(tmp_path, message, callback, net, ReplayMixer(source(max_tokens=6)))


def test_rows_cut_differently_are_taken_anew_where_the_initial_model_is_at_hand(tmp_path: Path) -> None:
    callback, net = Recorder(), module(lora=True)
    fit(tmp_path, callback, net)
    fit(tmp_path, callback, net, ReplayMixer(source(max_tokens=6), rows_per_batch=2))
    fresh = ActivationMarginRegularizer()
    fit(tmp_path, fresh, module(lora=True), ReplayMixer(source(max_tokens=6)), max_steps=1)
    assert callback._reference.states.digest == fresh._reference.states.digest


def test_other_settings_after_a_restart(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=2)
    fit(tmp_path, ActivationMarginRegularizer(), more=(saver,), enable_checkpointing=True, max_steps=2)
    refused(
        tmp_path,
        r"taken with other settings \(num_std: then 1.0, now 1.5\)",
        ActivationMarginRegularizer(num_std=1.5),
        ckpt=saver.best_model_path,
    )


@pytest.mark.parametrize("what", ["gone", "another"])
def test_a_restart_without_its_store(tmp_path: Path, what: str) -> None:
    path = tmp_path / "states"
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=2)
    fit(tmp_path, ActivationMarginRegularizer(store=str(path)), more=(saver,), enable_checkpointing=True, max_steps=2)
    path.unlink()
    if what == "another":
        fit(tmp_path, ActivationMarginRegularizer(store=str(path)), module(seed=2), max_steps=1)
    message = "that are not at" if what == "gone" else "holds other activation states"
    refused(tmp_path, message, ActivationMarginRegularizer(store=str(path)), ckpt=saver.best_model_path)
