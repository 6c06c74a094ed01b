# SPDX-License-Identifier: Apache-2.0
"""Evaluations of a routed module: by the router, by oracle, with the base model; where samples went, in the report."""

from __future__ import annotations

import csv
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_cl import Task, TaskStream, fit_stream
from lightning_cl.callbacks import ForgettingMonitor
from lightning_cl.report import html, markdown
from lightning_cl.report.run import load_run
from tests.callbacks import router_tools as tools
from tests.callbacks.router_tools import TaskRows, fit, fitter, module
from tests.helpers import models


def test_fit_stream_evaluates_routed_oracle_and_base_side_by_side(tmp_path):
    lm, router, data = module(), fitter(), tools.stream_of()
    trainer = models.trainer(tmp_path, callbacks=[router], max_epochs=1, max_steps=-1)
    matrix = fit_stream(trainer, lm, data)
    assert matrix is not None
    assert sorted(router.confusion.stages) == [0, 1, 2]
    assert router.confusion.accuracy() == 1.0
    assert router.confusion.table(2).splitlines()[2].startswith("| t0 | 6 | 0 | 0 |")
    assert [c.name for c in router.router.classes] == ["t0", "t1", "t2"]
    lm.test_step = lambda batch, batch_idx, dataloader_idx=0: lm.log("test_loss", lm.model(**batch).loss, batch_size=6)
    scores = router.side_by_side(trainer, lm, data)
    scores = {mode: torch.tensor([row[f"t{k}"] for k in range(3)]) for mode, row in scores.items()}
    assert set(router.confusion.state_dict()["scores"]) == {"routed", "oracle", "base"}
    assert torch.equal(scores["routed"], scores["oracle"])
    assert bool((scores["routed"] < scores["base"]).all())
    with lm.model.disable_adapter():
        lm.eval()
        rows = models.collate([TaskRows(0, rows=6, seed=4)[i] for i in range(6)])
        with torch.no_grad():
            expected = lm.model(**rows).loss
    assert scores["base"][0] == pytest.approx(float(expected), abs=1e-2)


class WithTest(models.PlainLM):
    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("test_loss", self.model(**batch).loss, batch_size=len(batch["input_ids"]))


def test_a_run_that_compares_has_all_three_in_its_report_and_none_in_its_matrix(tmp_path):
    lm, router, logger = WithTest(module().model, lr=0.3), fitter(compare=True), CSVLogger(tmp_path)
    monitor = ForgettingMonitor("test_loss", mode="min", dirpath=str(tmp_path / "run"), print_table=False)
    trainer = models.trainer(tmp_path, callbacks=[router, monitor], max_epochs=1, max_steps=-1, logger=logger)
    matrix = fit_stream(trainer, lm, tools.stream_of())
    assert monitor in trainer.callbacks
    assert trainer.loggers == [logger]
    last = {task: score.value for (stage, task), score in matrix.scores().items() if stage == 2}
    assert {t: s.value for (stage, t), s in monitor.matrix.scores().items() if stage == 2} == last
    run = load_run(tmp_path / "run")
    assert run.routing is not None
    assert run.routing["scores"]["routed"] == last
    assert run.routing["scores"]["oracle"] == pytest.approx(last)
    assert all(run.routing["scores"]["base"][task] > value for task, value in last.items())
    assert run.routing["accuracy"] == {"0": 1.0, "1": 1.0, "2": 1.0}
    assert run.routing["learnt"]["1"] == ["t0", "t1"]
    assert (tmp_path / "run" / "task_matrix_routing.png").stat().st_size > 1000
    values = [
        float(line["test_loss/dataloader_idx_0"]) for line in rows_of(logger) if line.get("test_loss/dataloader_idx_0")
    ]
    assert len(values) == 4  # before the first task and after each of three; none of the comparison
    assert values[-1] == pytest.approx(last["t0"], rel=1e-4)
    page = html.page([run])
    for mode, score in run.routing["scores"].items():
        assert f'data-mode="{mode}" data-scored="t1" data-value="{score["t1"]!r}"' in page
    assert "Routing accuracy after each task: 100.0 %, 100.0 %, 100.0 %." in markdown.summary([run])


def rows_of(logger: CSVLogger) -> list[dict[str, str]]:
    logger.save()
    with open(f"{logger.log_dir}/metrics.csv") as file:
        return list(csv.DictReader(file))


def test_one_row_of_the_matrix_may_take_a_test_and_a_validation(tmp_path):
    lm, router = WithTest(module().model, lr=0.3), fitter()
    tasks = [
        Task("t0", train=TaskRows(0), test=TaskRows(0, rows=6, seed=4)),
        Task("t1", train=TaskRows(1), val=TaskRows(1, rows=4, seed=3)),
    ]
    data = TaskStream(tasks, batch_size=4, collate_fn=models.collate)
    trainer = models.trainer(tmp_path, callbacks=[router], max_epochs=1, max_steps=-1)
    fit_stream(trainer, lm, data)
    assert router.confusion.stages[1] == {"t0": {"t0": 6}, "t1": {"t1": 4}}
    assert set(router.side_by_side(trainer, lm, data)["oracle"]) == {"t0", "t1"}


def test_validation_in_the_middle_of_a_task_uses_what_was_seen_so_far(tmp_path):
    lm, router, seen = module(), fitter(), []

    class Spy(Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append((router.routed.last.adapters, router._statistics.rows_in_task))

        def on_train_batch_end(self, *args: Any) -> None:
            assert not router.routed.enabled

    fit(tmp_path, router, lm, 0)
    trainer = models.trainer(tmp_path, callbacks=[router, Spy()], max_epochs=1, max_steps=-1, val_check_interval=2)
    trainer.fit(lm, tools.loader(1), DataLoader(TaskRows(1, rows=4, seed=3), batch_size=4, collate_fn=models.collate))
    assert [count for _, count in seen] == [8, 16]
    assert all(adapters == ["task_1"] * 4 for adapters, _ in seen)
    undisturbed, other = fitter(), module()
    for task in range(2):
        fit(tmp_path, undisturbed, other, task)
    assert torch.equal(undisturbed.router.weight, router.router.weight)


def test_predict_and_min_margin(tmp_path):
    class Predicts(models.PlainLM):
        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return (
                self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float().mean(-1)
            )

    lm, router = Predicts(module().model), fitter(min_margin=50.0)
    for task in range(2):
        fit(tmp_path, router, lm, task)
    rows = DataLoader(
        [TaskRows(k, seed=3)[i] for i in range(2) for k in range(2)], batch_size=4, collate_fn=models.collate
    )
    trainer = models.trainer(tmp_path, callbacks=[router])
    base = trainer.predict(lm, rows)[0]
    assert router.routed.last.adapters == ["__base__"] * 4
    router.min_margin = None
    routed = trainer.predict(lm, rows)[0]
    assert router.routed.last.adapters == ["task_0", "task_1"] * 2
    assert not torch.equal(base, routed)
    with router.evaluating_with("base"):
        assert torch.equal(trainer.predict(lm, rows)[0], base)
    with router.routed.given("task_1"):
        first = trainer.predict(lm, rows)[0]
    assert not torch.equal(first, routed)
    assert torch.equal(trainer.predict(lm, rows)[0], routed)
    router.evaluate_with = "oracle"
    with pytest.raises(
        MisconfigurationException, match="`evaluate_with='oracle'` needs to know the task of each loader"
    ):
        trainer.predict(lm, rows)


def test_a_resumed_run_logs_the_accuracies_of_the_unbroken_one(tmp_path):
    def accuracies(ckpt_path: Any = None) -> list[str]:
        logger = CSVLogger(tmp_path, name="", version="")
        callbacks = [fitter(), ModelCheckpoint(every_n_epochs=1, save_top_k=-1, filename="{epoch}")]
        settings = {"max_epochs": 1, "max_steps": -1, "num_sanity_val_steps": 2}
        trainer = models.trainer(tmp_path, callbacks=callbacks, logger=logger, enable_checkpointing=True, **settings)
        torch.manual_seed(0)
        fit_stream(trainer, module(), tools.stream_of(), ckpt_path=ckpt_path)
        return [line["cl/routing_accuracy"] for line in rows_of(logger)]

    whole = accuracies()
    assert sum(value != "" for value in whole) >= 3
    # Lightning's sanity check comes before the epoch that is taken up, with a router that is fitted already.
    for name in ("epoch=0.ckpt", "task_end.ckpt"):
        assert accuracies(tmp_path / "task_0_t0" / name) == whole
