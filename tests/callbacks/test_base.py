# SPDX-License-Identifier: Apache-2.0
"""When tasks start and end, in plain projects: one fit is one task, across Trainers, checkpoints and crashes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cl.callbacks import ContinualCallback
from tests.helpers import models


class Diary(ContinualCallback):
    """Writes down what is called, in which task."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, int]] = []

    def prepare_task(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert not trainer.optimizers
        self.lines.append(("prepare", self.task_index))

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert trainer.optimizers
        self.lines.append(("start", self.task_index))

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.lines.append(("end", self.task_index))


def _task(number: int) -> list[tuple[str, int]]:
    return [("prepare", number), ("start", number), ("end", number)]


def test_each_fit_of_a_new_trainer_is_a_task(tmp_path: Path) -> None:
    diary, module = Diary(), models.PlainLM(models.tiny_llama())
    for _ in range(3):
        models.trainer(tmp_path, max_steps=1, callbacks=[diary]).fit(module, models.loader())
    assert diary.lines == _task(0) + _task(1) + _task(2)
    assert diary.task_index == 3


def test_validation_and_test_are_no_tasks(tmp_path: Path) -> None:
    diary, module = Diary(), models.PlainLM(models.tiny_llama())
    models.trainer(tmp_path, callbacks=[diary]).validate(module, models.loader(4), verbose=False)
    assert diary.lines == []
    assert diary.task_index == 0


class Crash(pl.Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            raise ZeroDivisionError("on purpose")


def test_a_crashed_fit_is_the_same_task_again(tmp_path: Path) -> None:
    diary, module = Diary(), models.PlainLM(models.tiny_llama())
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        models.trainer(tmp_path, callbacks=[diary, Crash()]).fit(module, models.loader())
    models.trainer(tmp_path, max_steps=1, callbacks=[diary]).fit(module, models.loader())
    assert diary.lines == [*_task(0)[:2], *_task(0)]


def test_a_checkpoint_tells_a_new_process_its_task_before_sharding(tmp_path: Path) -> None:
    """``prepare_task`` may change the model for the task, so it must know the index that the checkpoint holds."""
    diary, module = Diary(), models.PlainLM(models.tiny_llama())
    models.trainer(tmp_path, max_steps=1, callbacks=[diary]).fit(module, models.loader())
    saver = pl.callbacks.ModelCheckpoint(tmp_path, filename="middle", every_n_train_steps=2)
    second = models.trainer(tmp_path, max_steps=2, callbacks=[diary, saver], enable_checkpointing=True)
    second.fit(module, models.loader())
    resumed = Diary()
    trainer = models.trainer(tmp_path, max_steps=3, callbacks=[resumed])
    trainer.fit(models.PlainLM(models.tiny_llama()), models.loader(), ckpt_path=str(tmp_path / "middle.ckpt"))
    assert resumed.lines == _task(1)


def test_a_checkpoint_from_before_the_callback_existed(tmp_path: Path) -> None:
    module = models.PlainLM(models.tiny_llama())
    saver = pl.callbacks.ModelCheckpoint(tmp_path, filename="old", every_n_train_steps=1)
    models.trainer(tmp_path, max_steps=1, callbacks=[saver], enable_checkpointing=True).fit(module, models.loader())
    diary = Diary()
    trainer = models.trainer(tmp_path, max_steps=2, callbacks=[diary])
    trainer.fit(models.PlainLM(models.tiny_llama()), models.loader(), ckpt_path=str(tmp_path / "old.ckpt"))
    assert diary.lines == _task(0)


def test_epochs_that_are_spent(tmp_path: Path) -> None:
    trainer = models.trainer(tmp_path, max_steps=-1, max_epochs=1, callbacks=[Diary()])
    module = models.PlainLM(models.tiny_llama())
    trainer.fit(module, models.loader(4))
    with pytest.raises(MisconfigurationException, match=r"`max_epochs=1`: a second `trainer.fit` would train 0 steps"):
        trainer.fit(module, models.loader(4))


def test_replay_rows_are_required(tmp_path: Path) -> None:
    class Needs(ContinualCallback):
        def prepare_task(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.require_replay_rows(trainer)

    with pytest.raises(
        MisconfigurationException, match=r"`Needs` works on replay rows.*Add `ReplayMixer\(GeneralSamples"
    ):
        models.trainer(tmp_path, callbacks=[Needs()]).fit(models.PlainLM(models.tiny_llama()), models.loader())


def test_deepspeed_is_refused(tmp_path: Path) -> None:
    """Without the package its strategy cannot be constructed; `setup` asks for nothing but its class."""
    from lightning.pytorch.strategies import DeepSpeedStrategy

    trainer = models.trainer(tmp_path)
    trainer._accelerator_connector.strategy = object.__new__(DeepSpeedStrategy)
    with pytest.raises(MisconfigurationException, match=r'`Diary` cannot work under DeepSpeed.*strategy="cl_fsdp"'):
        Diary().setup(trainer, models.PlainLM(models.tiny_llama()), "fit")


def test_the_attachment_exists_only_while_a_fit_runs() -> None:
    with pytest.raises(RuntimeError, match=r"`Diary\.attachment` exists only while a fit runs"):
        Diary().attachment  # noqa: B018
