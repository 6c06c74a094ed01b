# SPDX-License-Identifier: Apache-2.0
"""What LoRAInterpolator saves, resumes and exports, alone and in a stream of tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_cl import weights
from lightning_cl.callbacks import LoRAInterpolator
from tests.callbacks.interpolator_tools import (
    Recorder,
    Watch,
    Weights,
    assert_same,
    average_of,
    copy_of,
    fit,
    loss_of,
    make_mixer,
    make_module,
)
from tests.helpers import models


class KillAfter(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


def _resumable(seed: int) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(models.TokenRows(16, seed=seed), 4, collate_fn=models.collate)


def _second_task(tmp_path: Path, name: str, kill: int | None = None, ckpt: str | None = None, **kwargs: Any) -> Any:
    """Two tasks; the second one can be killed, or resumed from a checkpoint with everything built anew."""
    module, mixer = make_module(optimizer="adamw", lr=0.01), make_mixer()
    callback = LoRAInterpolator(half_life=0.3, consistency_weight=2.0, **kwargs)
    settings = {"max_steps": -1, "max_epochs": 3, "accumulate_grad_batches": 2}
    folder = tmp_path / name
    if ckpt is None:
        fit(folder, module, [mixer, callback], _resumable(0), **settings)
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    extra = [saver] if kill is None else [saver, KillAfter(kill)]
    trainer = models.trainer(
        folder, callbacks=[mixer, callback, *extra], enable_checkpointing=True, num_sanity_val_steps=1, **settings
    )
    try:
        trainer.fit(module, _resumable(1), models.loader(rows=4, seed=9), ckpt_path=ckpt, weights_only=True)
    except SystemExit:
        assert kill is not None
    return callback, module


@pytest.mark.parametrize("kill", [1, 3, 5])
def test_resume_gives_the_same_slow_weights_bit_for_bit(tmp_path: Path, kill: int) -> None:
    unbroken, module = _second_task(tmp_path, "unbroken")
    _second_task(tmp_path, "killed", kill=kill)
    resumed, other = _second_task(tmp_path, "resumed", ckpt=str(tmp_path / "killed" / f"step={kill}.ckpt"))
    assert_same(resumed.slow_weights(), unbroken.slow_weights())
    assert_same(copy_of(weights.trainable(other)), copy_of(weights.trainable(module)))
    assert resumed._average.updates == unbroken._average.updates


def test_checkpoint_between_a_step_and_its_update_loses_nothing(tmp_path: Path) -> None:
    class SaveFirst(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "early.ckpt")

    def run(ckpt: Path | None) -> Weights:
        callback = LoRAInterpolator(decay=0.5, consistency_weight=0)
        trainer = models.trainer(tmp_path, callbacks=[SaveFirst(), callback], max_steps=6, max_epochs=2)
        trainer.fit(make_module(), _resumable(0), ckpt_path=ckpt, weights_only=True if ckpt else None)
        return callback.slow_weights()

    unbroken = run(None)
    assert_same(run(tmp_path / "early.ckpt"), unbroken)


def test_checkpoint_holds_both_sets_and_evaluates_the_one_that_was_asked_for(tmp_path: Path) -> None:
    module = make_module()
    callback = Recorder(decay=0.9, consistency_weight=0)
    saver = ModelCheckpoint(tmp_path, filename="mid", every_n_train_steps=2)
    fit(tmp_path, module, [callback, saver], enable_checkpointing=True, max_steps=3)
    checkpoint = torch.load(tmp_path / "mid.ckpt", weights_only=True)
    names = list(weights.trainable(module))
    state = checkpoint["callbacks"]["Recorder"]
    assert_same({n: checkpoint["state_dict"][n] for n in names}, callback.fast[1])
    assert list(state["slow"]) == names  # never the frozen base
    assert state["evaluate_with"] == "slow"
    fresh, other = make_module(seed=0), Recorder(decay=0.9, consistency_weight=0)
    watch = Watch()
    trainer = models.trainer(tmp_path, callbacks=[other, watch])
    trainer.validate(fresh, models.loader(rows=4, seed=9), ckpt_path=tmp_path / "mid.ckpt", weights_only=True)
    assert_same(watch.during[0], state["slow"])
    assert_same(copy_of(weights.trainable(fresh)), callback.fast[1])
    with torch.no_grad(), weights.swapped(fresh, state["slow"]):
        assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(loss_of(fresh), abs=1e-5)
    trainer.predict(Predicting(fresh.model), models.loader(rows=4), ckpt_path=tmp_path / "mid.ckpt", weights_only=True)


class Predicting(models.PlainLM):
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(**batch).logits


def test_a_checkpoint_written_inside_validation_holds_the_fast_weights(tmp_path: Path) -> None:
    class SaveInside(Callback):
        def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / "inside.ckpt")

    module, callback, watch = make_module(), Recorder(decay=0.9, consistency_weight=0), Watch()
    trainer = models.trainer(tmp_path, callbacks=[callback, SaveInside(), watch])
    trainer.fit(module, models.loader(), models.loader(rows=8, seed=9))
    state = torch.load(tmp_path / "inside.ckpt", weights_only=True)["state_dict"]
    assert_same({n: state[n] for n in callback.fast[-1]}, callback.fast[-1])
    assert_same(watch.during[1], callback.slow_weights())  # and validation goes on with the slow ones


def test_a_checkpoint_from_before_the_callback_starts_a_new_average(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="plain", every_n_train_steps=4)
    fit(tmp_path, make_module(), [saver], enable_checkpointing=True)
    callback = Recorder(decay=0.5, warmup=False, consistency_weight=0, evaluate_with="fast")
    module = make_module()
    trainer = models.trainer(tmp_path, callbacks=[callback], max_steps=8, max_epochs=2)
    trainer.fit(module, models.loader(), ckpt_path=tmp_path / "plain.ckpt", weights_only=True)
    saved = torch.load(tmp_path / "plain.ckpt", weights_only=True)["state_dict"]
    initial = {n: saved[n] for n in weights.trainable(module)}
    assert_same(callback.slow_weights(), average_of(initial, callback.fast, [0.5] * 4), rtol=0, atol=1e-6)


@pytest.mark.parametrize("export", ["slow", "fast"])
def test_export_writes_a_folder_that_peft_loads(tmp_path: Path, export: str) -> None:
    from peft import PeftModel

    module = make_module()
    callback = Recorder(decay=0.5, consistency_weight=0, export=export)
    fit(tmp_path, module, [callback])
    loaded = PeftModel.from_pretrained(models.tiny_llama(), tmp_path / "adapters" / "task_0").eval()
    wanted = callback.slow_weights() if export == "slow" else callback.fast[-1]
    batch = next(iter(models.loader(rows=4, seed=9)))
    module.eval()
    with torch.no_grad(), weights.swapped(module, wanted):
        expected = module.model(**batch).logits
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, expected)


# -------------------------------------------------------------------- streams of tasks


class StreamLM(models.PlainLM):
    """One loader a task, as a stream gives them."""

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("test_loss", self.model(**batch).loss, batch_size=len(batch["input_ids"]))


def _stream() -> Any:
    from lightning_cl import Task, TaskStream

    tasks = [
        Task(f"t{i}", train=models.TokenRows(12, seed=i), val=models.TokenRows(4, seed=i + 10), metric="loss")
        for i in range(2)
    ]
    return TaskStream(tasks, batch_size=4, collate_fn=models.collate, seed=0)


def _streamed(folder: Path, callbacks: list[Callback], kill: int | None = None, **kwargs: Any) -> models.PlainLM:
    from lightning_cl import fit_stream

    module = StreamLM(models.lora(models.tiny_llama()), lr=0.01, optimizer="adamw")
    extra = [] if kill is None else [KillInTask(1, kill)]
    trainer = models.trainer(
        folder,
        callbacks=[*callbacks, *extra],
        enable_checkpointing=True,
        max_steps=-1,
        max_epochs=2,
        num_sanity_val_steps=0,
    )
    try:
        fit_stream(trainer, module, _stream(), **kwargs)
    except (SystemExit, KeyboardInterrupt):
        assert kill is not None
    return module


class KillInTask(Callback):
    def __init__(self, task: int, step: int) -> None:
        self.task, self.step = task, step

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.datamodule.current_index == self.task and trainer.global_step == self.step:
            raise KeyboardInterrupt


def test_a_stream_resumed_in_the_middle_of_an_epoch_ends_bit_for_bit(tmp_path: Path) -> None:
    def callbacks() -> list[Callback]:
        return [
            make_mixer(),
            LoRAInterpolator(half_life=0.3, consistency_weight=2.0),
            ModelCheckpoint(every_n_train_steps=1, save_top_k=-1, filename="{step}"),
        ]

    unbroken, resumed = callbacks(), callbacks()
    module = _streamed(tmp_path / "a", unbroken)
    _streamed(tmp_path / "b", callbacks(), kill=4)
    other = _streamed(tmp_path / "b", resumed, ckpt_path="last")
    assert_same(copy_of(weights.trainable(other)), copy_of(weights.trainable(module)))
    assert_same(resumed[1].slow_weights(), unbroken[1].slow_weights())  # type: ignore[attr-defined]


def test_the_best_weights_of_a_task_are_the_set_that_was_evaluated(tmp_path: Path) -> None:
    class Take(Recorder):
        """What the module holds when each task has ended, and what its best checkpoint holds."""

        ended: list[tuple[Weights, Weights]]

        def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            super().on_task_end(trainer, pl_module)
            best = torch.load(trainer.datamodule.best_loaded, weights_only=True)
            self.ended.append((copy_of(weights.trainable(pl_module)), best["callbacks"][self.state_key]["slow"]))

    callback = Take(half_life=0.3, consistency_weight=0)
    callback.ended = []
    saver = ModelCheckpoint(monitor="val_loss", mode="max")  # not the last one, which has learnt the most
    _streamed(tmp_path, [callback, saver], task_end_weights="best")
    for held, best in callback.ended:
        assert_same(held, best)


def test_a_checkpoint_of_another_model_is_named(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="mid", every_n_train_steps=2)
    fit(
        tmp_path, make_module(), [LoRAInterpolator(consistency_weight=0), saver], enable_checkpointing=True, max_steps=3
    )
    bare = models.PlainLM(models.tiny_llama())
    bare.strict_loading = False
    trainer = models.trainer(tmp_path, callbacks=[LoRAInterpolator(consistency_weight=0)])
    with pytest.raises(
        MisconfigurationException, match=r"holds slow weights of .* and 7 more, which `PlainLM` does not have"
    ):
        trainer.validate(bare, models.loader(rows=4), ckpt_path=tmp_path / "mid.ckpt", weights_only=True)


@pytest.mark.parametrize("evaluate_with", ["slow", "fast"])
def test_a_checkpoint_of_our_strategies_gives_either_set_and_as_a_rule_the_evaluated_one(
    tmp_path: Path, evaluate_with: str
) -> None:
    from peft import PeftModel

    from lightning_cl.commands import export
    from lightning_cl.strategies.export import load_for_inference

    base = tmp_path / "base"
    models.tiny_llama().save_pretrained(base)
    module, callback = make_module(), Recorder(decay=0.5, consistency_weight=0, evaluate_with=evaluate_with)
    saver = ModelCheckpoint(tmp_path, filename="mid", every_n_train_steps=2)
    fit(tmp_path, module, [callback, saver], strategy="cl_single_device", enable_checkpointing=True, max_steps=3)
    path = tmp_path / "mid.ckpt"
    slow = torch.load(path, weights_only=True)["callbacks"]["Recorder"]["slow"]
    sets = {"slow": slow, "trained": callback.fast[1]}
    sets["evaluated"] = sets["slow" if evaluate_with == "slow" else "trained"]
    module.eval()
    batch = next(iter(models.loader(rows=4, seed=9)))
    for which, wanted in sets.items():
        folder = tmp_path / which
        choice = [] if which == "evaluated" else ["--weights", which]
        assert export.main([str(path), "--out", str(folder), *choice]) == 0
        loaded = [PeftModel.from_pretrained(models.tiny_llama(), folder).eval()]
        loaded.append(load_for_inference(path, base, **({} if which == "evaluated" else {"weights": which})))
        with torch.no_grad(), weights.swapped(module, wanted):
            expected = module.model(**batch).logits
        for network in loaded:
            with torch.no_grad():
                torch.testing.assert_close(network(**batch).logits, expected)
    assert (
        f"({'slow' if evaluate_with == 'slow' else 'trained'} weights)"
        in (tmp_path / "evaluated/README.md").read_text()
    )


def test_a_checkpoint_of_a_task_s_end_holds_the_evaluated_set_in_both_places(tmp_path: Path) -> None:
    from lightning_cl.strategies.export import export_checkpoint

    module, callback = make_module(), LoRAInterpolator(decay=0.5, consistency_weight=0)
    trainer = fit(tmp_path, module, [callback], strategy="cl_single_device")
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    files = [
        export_checkpoint(tmp_path / "end.ckpt", tmp_path / which, weights=which) for which in ("evaluated", "slow")
    ]
    first, second = (folder / "adapter_model.safetensors" for folder in files)
    assert first.read_bytes() == second.read_bytes()
