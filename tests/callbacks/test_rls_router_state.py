# SPDX-License-Identifier: Apache-2.0
"""Checkpoints, resumes and exports of `RLSRouterFitter`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_cl import fit_stream
from lightning_cl.routing import load_routed
from tests.callbacks import router_tools as tools
from tests.callbacks.router_tools import fit, fitter, mixed, module
from tests.helpers import models


def run_until(tmp_path: Any, kill_at: int | None) -> tuple[Any, Any, Any]:
    """Task 0, then task 1 in a new process's objects, killed after ``kill_at`` steps and resumed in newer ones."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    lm, router = module(), fitter(ridge="auto")
    fit(tmp_path, router, lm, 0)
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    settings: dict[str, Any] = {"max_epochs": 2, "max_steps": -1, "enable_checkpointing": True}

    class Kill(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == kill_at:
                raise KeyboardInterrupt

    trainer = models.trainer(tmp_path, callbacks=[router, saver, Kill()], **settings)
    if kill_at is None:
        trainer.fit(lm, tools.loader(1, cls=StatefulDataLoader))
        return lm, router, trainer
    with pytest.raises(SystemExit):
        trainer.fit(lm, tools.loader(1, cls=StatefulDataLoader))
    again, newer = module(), fitter(ridge="auto")
    saver = ModelCheckpoint(tmp_path / "resumed")
    trainer = models.trainer(tmp_path, callbacks=[newer, saver], **settings)
    trainer.fit(again, tools.loader(1, cls=StatefulDataLoader), ckpt_path=tmp_path / f"step={kill_at - 1}.ckpt")
    return again, newer, trainer


def test_killed_anywhere_and_resumed_to_the_bit(tmp_path):
    whole_lm, whole, _ = run_until(tmp_path / "whole", None)
    for at in (2, 4, 6):  # from a checkpoint early in the first epoch, late in it, and in the second
        lm, router, _ = run_until(tmp_path / str(at), at)
        assert router.task_index == 2
        assert torch.equal(router.router.weight, whole.router.weight)
        assert router._statistics.total.counts.tolist() == [16, 16]
        for k in range(2):
            expected = whole._bank.snapshot(f"task_{k}")
            assert all(torch.equal(v, expected[n]) for n, v in router._bank.snapshot(f"task_{k}").items())
        assert tools.routes(router, lm)[:2] == tools.routes(whole, whole_lm)[:2]


def test_a_stream_resumed_from_a_tasks_end_is_the_unbroken_one(tmp_path):
    def run(folder: Any, ckpt_path: Any = None) -> tuple[Any, Any]:
        lm, router = module(), fitter()
        trainer = models.trainer(folder, callbacks=[router], max_epochs=1, max_steps=-1, enable_checkpointing=True)
        matrix = fit_stream(trainer, lm, tools.stream_of(2), ckpt_path=ckpt_path)
        return router, matrix

    whole, matrix = run(tmp_path)
    end = next(tmp_path.glob("**/task_0_t0/task_end.ckpt"))
    resumed, again = run(tmp_path, ckpt_path=end)
    assert torch.equal(resumed.router.weight, whole.router.weight)
    assert resumed._statistics.total.counts.tolist() == [16, 16]
    for k in range(2):
        expected = whole._bank.snapshot(f"task_{k}")
        assert all(torch.equal(v, expected[n]) for n, v in resumed._bank.snapshot(f"task_{k}").items())
    assert again.compute()["average"] == matrix.compute()["average"]
    assert resumed.confusion.stages == whole.confusion.stages


@pytest.mark.parametrize("strategy", ["auto", "cl_single_device"])
def test_a_checkpoint_alone_is_enough_to_validate_and_to_go_on(tmp_path, strategy):
    lm, router = module(), fitter()
    for task in range(2):
        trainer = fit(tmp_path, router, lm, task, strategy=strategy)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    scores = trainer.validate(lm, tools.loader(0), verbose=False)
    fresh, new = module(), fitter()
    trainer = models.trainer(tmp_path, callbacks=[new], strategy=strategy)
    assert trainer.validate(fresh, tools.loader(0), ckpt_path=tmp_path / "two.ckpt", verbose=False) == scores
    assert torch.equal(new.router.weight, router.router.weight)
    # The same callback with another module: its adapters are written into that one.
    third = module()
    fit(tmp_path, router, third, 2, strategy=strategy)
    for k in range(2):
        for name, value in router._bank.snapshot(f"task_{k}").items():
            assert torch.equal(value, dict(lm.model.named_parameters())[name])
    assert tools.routes(router, third) == tools.EXPECTED
    content = torch.load(tmp_path / "two.ckpt", weights_only=True)["callbacks"]
    assert any("router" in state for state in content.values() if isinstance(state, dict))


def test_a_checkpoint_from_before_the_callback_loads(tmp_path):
    lm, router = module(), fitter()
    router.load_state_dict({})
    fit(tmp_path, router, lm, 0)
    assert router.task_index == 1


def test_export_serves_what_was_trained(tmp_path):
    lm, router = module(), fitter()
    for task in range(3):
        fit(tmp_path, router, lm, task)
    router.export(tmp_path / "served")
    batch = mixed()
    lm.eval()
    served = load_routed(models.tiny_llama(num_hidden_layers=3), tmp_path / "served")
    with torch.no_grad():
        assert torch.equal(served(**batch).logits, lm.model(**batch).logits)
    assert served.routed.last.adapters == tools.EXPECTED


def test_an_exception_leaves_no_training_hook(tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise RuntimeError("stop here")

    lm, router = module(), fitter()
    with pytest.raises(RuntimeError, match="stop here"):
        fit(tmp_path, router, lm, 0, callbacks=[Stop()])
    assert all(not part._forward_hooks and not part._forward_pre_hooks for part in lm.modules())
    fit(tmp_path, router, lm, 0)  # and the task is started again
    assert router._statistics.total.counts.tolist() == [16]


def test_networks_built_in_configure_model(tmp_path):
    class Late(models.PlainLM):
        def __init__(self) -> None:
            super().__init__(None)

        def configure_model(self) -> None:
            if self.model is None:
                self.model = module().model

    lm, router = Late(), fitter()
    for task in range(2):
        fit(tmp_path, router, lm, task)
    assert tools.routes(router, lm)[:2] == ["task_0", "task_1"]
    assert "configure_model" not in vars(lm)
