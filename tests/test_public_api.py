# SPDX-License-Identifier: Apache-2.0
"""The public names and their first arguments. Needs nothing of the repository: it also runs against the built wheel."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

import lightning_cl
from lightning_cl import Task, TaskStream, callbacks, fit_stream, functional, metrics, replay

PACKAGES = [
    "lightning_cl",
    *(
        f"lightning_cl.{name}"
        for name in (
            "callbacks",
            "data",
            "functional",
            "metrics",
            "modules",
            "replay",
            "report",
            "strategies",
            "stream",
        )
    ),
]


@pytest.mark.parametrize("name", PACKAGES)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    package = importlib.import_module(name)
    assert list(package.__all__) == sorted(package.__all__, key=lambda n: (not n.isupper(), not n[0].isupper(), n))
    for public in package.__all__:
        assert getattr(package, public).__doc__, f"{name}.{public} has no docstring"


@pytest.mark.parametrize(
    ("thing", "first"),
    [
        (Task, "name train val test role metric higher_is_better"),
        (TaskStream, "tasks batch_size"),
        (fit_stream, "trainer model stream ckpt_path"),
        (lightning_cl.CausalLMModule, "model"),
        (callbacks.ReplayMixer, "sources rows_per_batch ratio token_ratio layout task_weight"),
        (callbacks.ReplayDistillation, "weight target_kl objective temperature anchor"),
        (callbacks.ActivationMarginRegularizer, "weight num_std layers objective reference anchor"),
        (callbacks.LoRAInterpolator, "half_life decay warmup consistency_weight evaluate_with"),
        (callbacks.RLSRouterFitter, "feature_layer expansion_dim ridge min_margin"),
        (callbacks.ForgettingMonitor, "metric mode max_forgetting on_exceed"),
        (replay.GeneralSamples, "data num_samples max_tokens seed"),
        (replay.EpisodicMemory, "capacity policy"),
        (replay.SelfGenerated, "pool_size length refresh"),
        (metrics.TaskMatrix, "tasks roles modes reference normalise"),
        (functional.activation_thresholds, "hidden num_std"),
        (functional.encode_activation_states, "hidden lower upper"),
        (functional.activation_margin_loss, "hidden states lower upper mask reduction"),
        (
            functional.distillation_loss,
            "hidden teacher_hidden head_weight teacher_head_weight bias logit_transform mask",
        ),
        (functional.RecursiveLeastSquares, "in_features ridge method dtype"),
    ],
)
def test_the_first_arguments_keep_their_names_and_order(thing: Any, first: str) -> None:
    assert list(inspect.signature(thing).parameters)[: len(first.split())] == first.split()


def test_strategies_are_registered_by_name() -> None:
    from lightning.pytorch.strategies import StrategyRegistry

    names = {"cl_single_device", "cl_single_device_4bit", "cl_fsdp", "cl_fsdp_4bit"}
    assert names <= set(StrategyRegistry.available_strategies())


def test_a_stream_with_replay_and_monitor_runs_from_end_to_end(tmp_path: Path) -> None:
    class Module(BoringModel):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val_loss", self.step(batch), batch_size=len(batch))

        test_step = None

    generator = torch.Generator().manual_seed(0)
    tasks = [
        Task(f"t{i}", train=torch.randn(8, 32, generator=generator), val=torch.randn(4, 32, generator=generator))
        for i in range(2)
    ]
    mixer = callbacks.ReplayMixer(replay.EpisodicMemory(capacity=4))
    monitor = callbacks.ForgettingMonitor("val_loss", mode="min", plots=False)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
        callbacks=[mixer, monitor],
    )
    matrix = fit_stream(trainer, Module(), TaskStream(tasks, batch_size=4))
    assert matrix.stages == [-1, 0, 1]
    assert matrix.compute()["backward_transfer"] is not None
    assert mixer.sources[0].available() == 4
    assert json.loads((tmp_path / "task_matrix.json").read_text())
