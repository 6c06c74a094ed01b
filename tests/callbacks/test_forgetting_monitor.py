# SPDX-License-Identifier: Apache-2.0
"""The monitor in real Trainers, with a model whose scores are known exactly: one weight that learns one number a task."""

from __future__ import annotations

import csv
import inspect
import json
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_cl import Task, TaskStream, fit_stream
from lightning_cl.callbacks import ForgettingMonitor
from tests.helpers import spawn

TARGETS = {"a": 0.0, "b": 0.25, "c": 1.0}


class Point(pl.LightningModule):
    """One weight; a step of its SGD lands exactly on the target, and its score is 1 - distance to the target."""

    def __init__(self, start: float = 0.5, keep_rows: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(start))
        self.row_scores: dict[int, list[float]] = {}
        self.keep_rows = keep_rows

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.weight - batch.mean()) ** 2

    def evaluate(self, name: str, batch: Tensor, loader: int) -> None:
        scores = 1 - (self.weight - batch).abs()
        if self.keep_rows:
            self.row_scores.setdefault(loader, []).extend(scores.tolist())
        self.log(name, scores.mean(), batch_size=len(batch), sync_dist=True)

    def on_validation_epoch_start(self) -> None:
        self.row_scores = {}

    def on_test_epoch_start(self) -> None:
        self.row_scores = {}

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluate("val_acc", batch, dataloader_idx)

    def test_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluate("test_acc", batch, dataloader_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def rows(task: str, count: int = 4) -> Tensor:
    return torch.full((count,), TARGETS[task])


DATASETS = {task: rows(task) for task in TARGETS}


def loaders(tasks: str = "abc") -> list[DataLoader]:
    return [DataLoader(DATASETS[task], batch_size=2) for task in tasks]


def a_trainer(path: Path, monitor: Any = None, **kwargs: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": str(path),
        "log_every_n_steps": 1,
        **kwargs,
    }
    callbacks = [] if monitor is None else [monitor] if not isinstance(monitor, list) else monitor
    return pl.Trainer(callbacks=[*callbacks, *settings.pop("more", [])], **settings)


def plain_loop(path: Path, monitor: ForgettingMonitor, module: pl.LightningModule, tasks: str = "abc", **kwargs: Any):
    """What projects do that know nothing of us: a new Trainer for each task."""
    for task in tasks:
        trainer = a_trainer(path, monitor, **kwargs)
        trainer.fit(module, DataLoader(DATASETS[task], batch_size=2), loaders(tasks))


def expected_score(weight: float, task: str) -> float:
    return 1 - abs(weight - TARGETS[task])


def stream(splits: tuple[str, ...] = ("val", "test"), probe: bool = False) -> TaskStream:
    tasks = [Task(t, train=list(rows(t)), **{split: list(rows(t)) for split in splits}) for t in TARGETS]
    if probe:
        tasks.append(Task("p", test=list(torch.full((4,), 0.5)), role="probe"))
    return TaskStream(tasks, batch_size=2)


def quiet(*args: Any, **kwargs: Any) -> ForgettingMonitor:
    """A monitor that draws and prints nothing: most tests look at its numbers."""
    return ForgettingMonitor(*args, **{"plots": False, "print_table": False, **kwargs})


# ------------------------------------------------------------------------------------ what is measured


def test_plain_project_with_a_new_trainer_for_each_task(tmp_path: Path) -> None:
    monitor = quiet("val_acc", tasks=list("abc"))
    plain_loop(tmp_path, monitor, Point(), num_sanity_val_steps=2)
    for stage, learnt in enumerate("abc"):
        for task in "abc":
            assert monitor.matrix.score(stage, task).value == pytest.approx(expected_score(TARGETS[learnt], task))
            assert monitor.matrix.score(stage, task).rows == 4
    # The sanity check has logged too, and must not be taken for a stage before the first task.
    assert monitor.matrix.stages == [0, 1, 2]
    figures = monitor.matrix.compute()
    assert figures["backward_transfer"] == pytest.approx((-1.0 - 0.75) / 2)
    assert figures["forgetting"] == pytest.approx((1.0 + 0.75) / 2)
    assert figures["learning_accuracy"] == pytest.approx(1.0)
    assert figures["forward_transfer"] is None
    assert monitor.matrix.reasons["forward_transfer"] == "task 'b' was not measured before the first task"


def test_plain_project_that_tests_before_and_after_each_fit(tmp_path: Path) -> None:
    monitor, module = quiet("test_acc", tasks=list("abc")), Point()
    a_trainer(tmp_path, monitor).test(module, loaders(), verbose=False)
    for task in "abc":
        trainer = a_trainer(tmp_path, monitor)
        trainer.fit(module, DataLoader(DATASETS[task], batch_size=2), loaders())
        trainer.test(module, loaders(), verbose=False)
    assert monitor.matrix.stages == [-1, 0, 1, 2]
    assert monitor.matrix.compute()["forward_transfer"] == pytest.approx(((0.75 - 0.75) + (0.25 - 0.5)) / 2)
    # The validations inside the fits logged val_acc, which is test_acc's twin: they are kept apart.
    assert monitor.running.stages == [0, 1, 2]


def test_names_come_from_dict_keys_and_from_data_sets(tmp_path: Path) -> None:
    monitor, module = quiet("val_acc"), Point()
    trainer = a_trainer(tmp_path, monitor)
    trainer.fit(module, DataLoader(DATASETS["a"]), dict(zip("abc", loaders(), strict=True)))
    assert monitor.matrix.tasks == ["a", "b", "c"]
    # Another order of loaders over the same data sets: each keeps its name.
    a_trainer(tmp_path, monitor).fit(module, DataLoader(DATASETS["b"]), loaders("cab"))
    assert monitor.matrix.score(1, "b").value == pytest.approx(1.0)
    assert monitor.matrix.score(1, "c").value == pytest.approx(0.25)


def test_one_loader_per_fit_is_the_current_tasks(tmp_path: Path) -> None:
    monitor, module = quiet("val_acc"), Point()
    for task in "abc":
        a_trainer(tmp_path, monitor).fit(module, DataLoader(DATASETS[task]), DataLoader(DATASETS[task].clone()))
    assert sorted(monitor.matrix.scores()) == [(0, "task_0"), (1, "task_1"), (2, "task_2")]
    figures = monitor.matrix.compute()
    assert figures["learning_accuracy"] == pytest.approx(1.0)
    assert figures["backward_transfer"] is None


def test_growing_list_of_loaders(tmp_path: Path) -> None:
    monitor, module = quiet("val_acc"), Point()
    for index, task in enumerate("abc"):
        a_trainer(tmp_path, monitor).fit(module, DataLoader(DATASETS[task]), loaders("abc"[: index + 1]))
    assert monitor.matrix.compute()["forgetting"] == pytest.approx((1.0 + 0.75) / 2)


def test_task_in_the_metrics_name(tmp_path: Path) -> None:
    class Named(Point):
        def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
            score = 1 - (self.weight - batch).abs().mean()
            self.log(f"{'abc'[dataloader_idx]}/acc", score, add_dataloader_idx=False, batch_size=len(batch))

    monitor = quiet("{task}/acc", tasks=list("abc"))
    plain_loop(tmp_path, monitor, Named())
    assert monitor.matrix.compute()["backward_transfer"] == pytest.approx((-1.0 - 0.75) / 2)
    assert monitor.matrix.metrics == dict.fromkeys("abc", "acc")


def test_lower_is_better(tmp_path: Path) -> None:
    class Loss(Point):
        def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val_loss", (self.weight - batch).abs().mean(), batch_size=len(batch))

    monitor = quiet("val_loss", mode="min", tasks=list("abc"))
    plain_loop(tmp_path, monitor, Loss())
    assert monitor.matrix.compute()["forgetting"] == pytest.approx((1.0 + 0.75) / 2)
    with pytest.warns(UserWarning, match="takes a higher val_loss as better"):
        quiet("val_loss")


@pytest.mark.parametrize("splits", [("val", "test"), ("test",), ("val",)])
def test_stream_fills_every_row(tmp_path: Path, splits: tuple[str, ...]) -> None:
    monitor = quiet("test_acc")
    returned = fit_stream(a_trainer(tmp_path, monitor, num_sanity_val_steps=2), Point(), stream(splits))
    matrix = monitor.matrix
    assert matrix.stages == [-1, 0, 1, 2]
    assert matrix.tasks == ["a", "b", "c"]
    for stage, weight in enumerate([0.5, *TARGETS.values()], -1):
        for task in TARGETS:
            assert matrix.score(stage, task).value == pytest.approx(expected_score(weight, task))
    assert matrix.compute() == pytest.approx(returned.compute())


def test_stream_with_a_probe(tmp_path: Path) -> None:
    monitor = quiet("test_acc")
    fit_stream(a_trainer(tmp_path, monitor), Point(), stream(probe=True))
    figures = monitor.matrix.compute()
    assert figures["general_change"] == {"p": pytest.approx(-0.5)}
    assert figures["average"] == pytest.approx((0.0 + 0.25 + 1.0) / 3)


def test_row_scores_give_intervals(tmp_path: Path) -> None:
    data = {task: TARGETS[task] + torch.linspace(-0.1, 0.1, 40) for task in TARGETS}
    monitor, module = quiet("val_acc", tasks=list("abc")), Point(keep_rows=True)
    for task in "abc":
        trainer = a_trainer(tmp_path, monitor)
        trainer.fit(module, DataLoader(data[task], 40), [DataLoader(rows, 8) for rows in data.values()])
    score = monitor.matrix.score(2, "c")
    assert score.rows == 40
    assert score.interval[0] < score.value < score.interval[1]
    assert monitor.matrix.figure_intervals()["average"] is not None

    class Percent(Point):
        def evaluate(self, name: str, batch: Tensor, loader: int) -> None:
            super().evaluate(name + "_share", batch, loader)
            self.log(name, 100 * (1 - (self.weight - batch).abs()).mean(), batch_size=len(batch))

    percent = quiet("val_acc", tasks=list("abc"))
    plain_loop(tmp_path, percent, Percent(keep_rows=True))
    # Shares are not rows of a percentage: no interval rather than a wrong one.
    assert percent.matrix.score(2, "b").interval is None
    assert percent.matrix.score(2, "b").rows == 4


def test_limited_batches_count_the_rows_that_were_used(tmp_path: Path) -> None:
    monitor = quiet("val_acc", tasks=list("abc"))
    plain_loop(tmp_path, monitor, Point(), limit_val_batches=1)
    assert monitor.matrix.score(0, "a").rows == 2


class Sharded(pl.LightningModule):
    """A linear map that learns to give a task's target, sharded by FSDP2 where there are two processes."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5, affine=False), nn.Linear(5, 1))

    def configure_model(self) -> None:
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if self.trainer.world_size > 1 and not isinstance(self.net, FSDPModule):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.net(batch[:, :3]) - batch[:, 3:]).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        score = 1 - (self.net(batch[:, :3]) - batch[:, 3:]).abs().mean()
        self.log("val_acc", score, batch_size=len(batch), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # With a state: Lightning cannot save the empty one of plain SGD of a sharded model.
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.1)


def _restores(path: Path, strategy: Any = None) -> tuple[dict[str, Tensor], ForgettingMonitor, pl.Trainer]:
    """Two tasks that collide; the second is undone. The weights are given whole."""
    data = [
        torch.cat([torch.randn(8, 3, generator=torch.Generator().manual_seed(7)), torch.full((8, 1), y)], 1)
        for y in (0.0, 3.0)
    ]
    monitor, module = quiet("val_acc", max_forgetting=0.2, on_exceed="restore"), Sharded()
    for rows in data:
        # Every process trains on all rows, so that two processes do what one does.
        more = {"strategy": strategy(), "devices": 2} if strategy else {}
        trainer = a_trainer(path, monitor, max_epochs=5, use_distributed_sampler=False, **more)
        trainer.fit(module, DataLoader(rows, batch_size=8), [DataLoader(rows, batch_size=8) for rows in data])
    full = {
        name: getattr(t, "full_tensor", lambda t=t: t)().detach().clone() for name, t in module.state_dict().items()
    }
    return full, monitor, trainer


def _two_ranks(rank: int, folder: str) -> None:
    class Unsynced(Point):
        def evaluate(self, name: str, batch: Tensor, loader: int) -> None:
            scores = 1 - (self.weight - batch).abs()
            self.row_scores.setdefault(loader, []).extend(scores.tolist())
            self.log(name, scores.mean(), batch_size=len(batch))

    data = [torch.tensor([0.0, 0.1, 0.0, 0.3]), torch.tensor([1.0, 0.9, 1.0, 0.7])]
    monitor, module = quiet("val_acc", max_forgetting=0.1, on_exceed="restore"), Unsynced()
    for target in (0.0, 1.0):
        trainer = a_trainer(Path(folder), monitor, strategy="ddp", devices=2, logger=CSVLogger(folder))
        train = DataLoader(torch.full((4,), target), batch_size=2)
        trainer.fit(module, train, [DataLoader(rows, batch_size=2) for rows in data])
    cells = {cell: (score.value, score.rows) for cell, score in monitor.matrix.scores().items()}

    from lightning.pytorch.strategies import ModelParallelStrategy

    def strategy() -> ModelParallelStrategy:
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)

    full, sharded, trainer = _restores(Path(folder), strategy)
    trainer.save_checkpoint(Path(folder) / "sharded.ckpt")
    ddp = [cells, module.weight.item(), monitor.events]
    spawn.save(Path(folder), rank, [*ddp, full, sharded.events, sharded.matrix.to_dict()])


def test_two_processes_agree(tmp_path: Path) -> None:
    spawn.run(_two_ranks, 2, str(tmp_path))
    first, second = spawn.load(tmp_path)
    assert first[:3] == second[:3]
    cells, weight, events, full, sharded_events, sharded_matrix = first
    assert cells[0, "task_0"] == (pytest.approx(0.9), 4)
    # The second task would have cost the first far more than 0.1: the weights went back.
    assert weight == 0.0
    assert [event["action"] for event in events] == ["restore"]

    # FSDP2: the shards that went back are those of one process, and a checkpoint holds the copy whole.
    with pytest.warns(UserWarning, match="put back"):
        expected, one, _ = _restores(tmp_path)
    assert [event["action"] for event in sharded_events] == [event["action"] for event in one.events] == ["restore"]
    for name, tensor in expected.items():
        assert torch.allclose(full[name], tensor, atol=1e-6), name
    scores = {(s["stage"], s["task"]): s["value"] for s in sharded_matrix["scores"]}
    assert scores == pytest.approx({cell: score.value for cell, score in one.matrix.scores().items()}, abs=1e-5)
    saved = torch.load(tmp_path / "sharded.ckpt", weights_only=True)
    (kept,) = (value for key, value in saved.items() if key.endswith(".last_good"))
    for name, tensor in kept["weights"].items():
        assert tensor.shape == expected[name].shape
        assert torch.allclose(tensor, expected[name], atol=1e-6), name


# ------------------------------------------------------------------------------------ the limit


def test_warn_is_the_default(tmp_path: Path) -> None:
    monitor, module = quiet("val_acc", tasks=list("abc"), max_forgetting=0.3), Point()
    with pytest.warns(
        UserWarning, match=r"Forgetting of 0.875 in task 2 \('c'\) exceeds `max_forgetting=0.3`; 'a' went"
    ):
        plain_loop(tmp_path, monitor, module)
    assert module.weight.item() == 1.0
    assert [(event["stage"], event["action"]) for event in monitor.events] == [(2, "warn")]
    assert monitor.stop_reason is None


def test_stop_ends_a_plain_loop_before_the_next_task(tmp_path: Path) -> None:
    monitor, module = quiet("val_acc", tasks=list("abc"), max_forgetting=0.2, on_exceed="stop"), Point()
    with (
        pytest.warns(UserWarning, match="The stream ends after this task"),
        pytest.raises(MisconfigurationException, match=r"End your loop when `monitor\.stop_reason` is set"),
    ):
        plain_loop(tmp_path, monitor, module, max_epochs=3)
    # Task b forgot 0.25 of a: its training ended with its first validation, and c was not trained.
    assert module.weight.item() == 0.25
    assert monitor.matrix.stages == [0, 1]
    assert monitor._diary.costs["1"]["steps"] == 2


def test_stop_ends_a_stream(tmp_path: Path) -> None:
    monitor, module = quiet("test_acc", max_forgetting=0.2, on_exceed="stop"), Point()
    with pytest.warns(UserWarning, match="exceeds `max_forgetting=0.2`"):
        fit_stream(a_trainer(tmp_path, monitor), module, stream())
    assert module.weight.item() == 0.25
    assert monitor.matrix.stages == [-1, 0, 1]


def test_restore_puts_the_last_good_weights_back(tmp_path: Path) -> None:
    monitor, module = quiet("val_acc", tasks=list("abc"), max_forgetting=0.3, on_exceed="restore"), Point()
    with pytest.warns(UserWarning, match="weights of the last evaluation within the limit are put back"):
        plain_loop(tmp_path, monitor, module)
    assert module.weight.item() == 0.25
    # The row says what the restored weights score.
    assert monitor.matrix.score(2, "c").value == pytest.approx(0.25)
    assert monitor.matrix.compute()["forgetting"] == pytest.approx((0.25 + 0.0) / 2)


def test_restore_within_a_task_keeps_what_it_had_learnt_by_then(tmp_path: Path) -> None:
    class Slow(Point):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    monitor = quiet("val_acc", tasks=["a", "c"], max_forgetting=0.3, on_exceed="restore")
    module = Slow(start=0.0)
    for task in "ac":
        trainer = a_trainer(tmp_path, monitor, val_check_interval=1)
        trainer.fit(module, DataLoader(DATASETS[task], batch_size=1), loaders("ac"))
    # Each step goes a tenth of the way to 1: 0.1, 0.19, 0.271, 0.3439. The fourth forgets more than 0.3.
    assert module.weight.item() == pytest.approx(0.271)
    assert monitor.matrix.score(1, "a").value == pytest.approx(0.729)


@pytest.mark.parametrize("splits", [("val", "test"), ("test",)])
def test_restore_in_a_stream(tmp_path: Path, splits: tuple[str, ...]) -> None:
    monitor, module = quiet("test_acc", max_forgetting=0.3, on_exceed="restore"), Point()
    with pytest.warns(UserWarning, match="put back"):
        fit_stream(a_trainer(tmp_path, monitor), module, stream(splits))
    assert module.weight.item() == 0.25
    assert monitor.matrix.score(2, "a").value == pytest.approx(0.75)


def test_restore_covers_persistent_buffers_and_leaves_the_frozen_base(tmp_path: Path) -> None:
    class Normed(Point):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(1)
            self.base = nn.Linear(1, 1).requires_grad_(False)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + 0 * self.norm(batch[:, None]).sum()

    monitor, module = quiet("val_acc", tasks=list("abc"), max_forgetting=0.3, on_exceed="restore"), Normed()
    means = []
    for task in "abc":
        a_trainer(tmp_path, monitor).fit(module, DataLoader(DATASETS[task], batch_size=2), loaders())
        means.append(module.norm.running_mean.clone())
    assert means[1] > 0
    assert torch.equal(means[2], means[1])
    assert not any("base" in name for name in monitor._limit.weights._shards)


def test_limit_that_cannot_be_checked_is_said_once(tmp_path: Path) -> None:
    monitor, module = quiet("val_acc", max_forgetting=0.1), Point()
    data = {task: DATASETS[task].clone() for task in "abc"}

    def loop() -> None:
        for task in "abc":
            a_trainer(tmp_path, monitor).fit(module, DataLoader(data[task]), DataLoader(data[task]))

    with pytest.warns(UserWarning, match="cannot be checked after stage 1: task 'task_0' was not measured"):
        loop()


# ------------------------------------------------------------------------------------ what is shown


def test_scalars_figures_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Images(CSVLogger):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.images: list[tuple[str, tuple[int, ...]]] = []

        def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
            self.images.append((key, images[0].shape))

    monitor = ForgettingMonitor("test_acc")
    loggers = [TensorBoardLogger(tmp_path, "tb"), CSVLogger(tmp_path, "csv"), Images(tmp_path, "images")]
    fit_stream(a_trainer(tmp_path, monitor, logger=loggers), Point(), stream(probe=True))

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(loggers[0].log_dir, size_guidance={"images": 0}).Reload()
    written = events.Scalars("cl/backward_transfer")
    assert written[-1].value == pytest.approx((-1.0 - 0.75) / 2)
    # An undefined figure is not logged: after task 0 there is no backward transfer.
    assert len(written) == 2
    steps = [event.step for event in events.Scalars("cl/average")]
    assert steps == sorted(steps)
    assert steps[-1] > steps[0]
    assert {"cl/task_matrix", "cl/task_matrix_stages"} <= set(events.Tags()["images"])
    assert "cl/intransigence" not in events.Tags()["scalars"]
    lines = list(csv.DictReader(Path(loggers[1].log_dir, "metrics.csv").read_text().splitlines()))
    assert float([line["cl/forgetting"] for line in lines if line.get("cl/forgetting")][-1]) == pytest.approx(0.875)
    assert {key for key, _ in loggers[2].images} == {"cl/task_matrix", "cl/task_matrix_stages"}
    assert all(shape[2] == 3 for _, shape in loggers[2].images)

    saved = json.loads(Path(loggers[0].log_dir, "task_matrix.json").read_text())
    assert saved["figures"]["average"] == pytest.approx((0.0 + 0.25 + 1.0) / 3)
    assert saved["reasons"]["intransigence"] == "no reference scores were given (`reference`)"
    assert saved["costs"]["0"]["steps"] == 2
    assert saved["costs"]["2"]["train_seconds"] > 0
    assert saved["provenance"]["versions"]["lightning"]
    cells = list(csv.DictReader(Path(loggers[0].log_dir, "task_matrix.csv").read_text().splitlines()))
    assert len(cells) == 16
    assert cells[0] == {
        "stage": "-1", "task": "a", "role": "train", "metric": "acc", "mode": "max", "value": "0.5", "rows": "4",
        "low": "", "high": "",
    }  # fmt: skip
    for name in ("task_matrix.png", "task_matrix_stages.png"):
        assert Path(loggers[0].log_dir, name).read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "Task matrix" in printed
    assert "backward transfer (BWT)" in printed
    assert "none: no reference scores were given" in printed


def test_files_go_to_dirpath_and_two_monitors_do_not_mix(tmp_path: Path) -> None:
    first = quiet("test_acc", dirpath=str(tmp_path / "out"))
    second = quiet("{task}/other", dirpath=str(tmp_path / "out"))

    class Both(Point):
        def evaluate(self, name: str, batch: Tensor, loader: int) -> None:
            super().evaluate(name, batch, loader)
            self.log(f"{'abc'[loader]}/other", 0.5, add_dataloader_idx=False, batch_size=len(batch))

    fit_stream(a_trainer(tmp_path, [first, second]), Both(), stream())
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "task_matrix.json",
        "task_matrix.csv",
        "task_matrix_task_other.json",
        "task_matrix_task_other.csv",
    }
    assert second.matrix.compute()["average"] == pytest.approx(0.5)


def test_fast_dev_run_writes_nothing(tmp_path: Path) -> None:
    monitor = quiet("val_acc")
    a_trainer(tmp_path, monitor, fast_dev_run=True).fit(Point(), DataLoader(DATASETS["a"]), loaders())
    assert not list(tmp_path.rglob("task_matrix*"))


def test_loss_terms_are_taken_down_and_stay_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_cl.report import diary

    class Term(Point):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.log("cl/kl", float(self.trainer.global_step))
            return super().training_step(batch, batch_idx)

    monkeypatch.setattr(diary, "MOST_POINTS", 20)
    monitor = quiet("val_acc")
    a_trainer(tmp_path, monitor, max_epochs=60, check_val_every_n_epoch=60).fit(
        Term(), DataLoader(DATASETS["a"], batch_size=2), loaders()
    )
    points = monitor._diary.terms["cl/kl"]
    assert 8 < len(points) <= 20
    assert [step for step, _ in points] == [value for _, value in points]
    assert points[-1][0] > 110


# ------------------------------------------------------------------------------------ resume


@pytest.mark.parametrize("on_exceed", ["warn", "restore"])
def test_resume_equals_the_unbroken_run(tmp_path: Path, on_exceed: str) -> None:
    def monitor() -> ForgettingMonitor:
        return quiet("val_acc", tasks=list("abc"), max_forgetting=0.3, on_exceed=on_exceed)

    whole, module = monitor(), Point()
    plain_loop(tmp_path / "whole", whole, module, max_epochs=2)

    broken, first = monitor(), Point()
    a_trainer(tmp_path, broken).fit(first, DataLoader(DATASETS["a"], batch_size=2), loaders())
    trainer = a_trainer(tmp_path, broken)
    trainer.fit(first, DataLoader(DATASETS["b"], batch_size=2), loaders())
    trainer.save_checkpoint(tmp_path / "b.ckpt")

    class Dies(pl.Callback):
        def on_train_batch_end(self, trainer, *args) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")
                raise RuntimeError("killed")

    del broken
    again, second = monitor(), Point()
    state = torch.load(tmp_path / "b.ckpt", weights_only=True)
    again.load_state_dict(state["callbacks"][again.state_key])
    again.on_load_checkpoint(trainer, second, state)
    second.load_state_dict(state["state_dict"])
    with pytest.raises(RuntimeError, match="killed"):
        a_trainer(tmp_path, again, max_epochs=2, more=[Dies()], limit_val_batches=0).fit(
            second, DataLoader(DATASETS["c"], batch_size=2), loaders()
        )
    last, third = monitor(), Point()
    a_trainer(tmp_path, last, max_epochs=2).fit(
        third, DataLoader(DATASETS["c"], batch_size=2), loaders(), ckpt_path=tmp_path / "middle.ckpt"
    )
    assert torch.equal(third.weight, module.weight)
    assert last.matrix.to_dict() == whole.matrix.to_dict()
    assert last.matrix.compute() == whole.matrix.compute()
    assert [e["action"] for e in last.events] == [e["action"] for e in whole.events][-1:]


def test_a_task_added_in_a_new_process_goes_on_in_the_same_matrix(tmp_path: Path) -> None:
    def run(tasks: str, ckpt_path: str | None = None) -> tuple[Any, ForgettingMonitor]:
        monitor, checkpoint = quiet("test_acc"), ModelCheckpoint(dirpath=tmp_path / "checkpoints", save_last=True)
        trainer = a_trainer(tmp_path, monitor, more=[checkpoint], enable_checkpointing=True)
        data = [Task(t, train=list(rows(t)), test=list(rows(t))) for t in tasks]
        return fit_stream(trainer, Point(), TaskStream(data, batch_size=2), ckpt_path=ckpt_path), monitor

    run("ab")
    last = max(tmp_path.rglob("last.ckpt"), key=lambda path: path.stat().st_mtime)
    returned, monitor = run("abc", str(last))
    # Task c is new: the row after b is measured for it too, and the matrix goes on.
    assert monitor.matrix.tasks == ["a", "b", "c"]
    cells = {cell: score.value for cell, score in monitor.matrix.scores().items()}
    assert cells == {cell: score.value for cell, score in returned.scores().items()}
    assert cells[1, "c"] == pytest.approx(0.25)
    assert monitor.matrix.compute()["backward_transfer"] == pytest.approx((-1.0 - 0.75) / 2)
    assert monitor.matrix.reasons["forward_transfer"] == "task 'c' was not measured before the first task"


def test_a_checkpoint_without_monitor_is_taken(tmp_path: Path) -> None:
    trainer = a_trainer(tmp_path)
    trainer.fit(Point(), DataLoader(DATASETS["a"]), loaders())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    monitor = quiet("val_acc")
    a_trainer(tmp_path, monitor, max_epochs=2).fit(
        Point(), DataLoader(DATASETS["a"]), loaders(), ckpt_path=tmp_path / "plain.ckpt"
    )
    assert monitor.matrix.stages == [0]


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"metric": ""}, r"metric=''\)`: it needs the name of a logged metric"),
        ({"mode": "higher"}, r"mode='higher'\)`: use 'max'"),
        ({"on_exceed": "die"}, "on_exceed='die'"),
        ({"max_forgetting": -1}, r"max_forgetting=-1\)`: the limit is at least 0"),
        ({"tasks": ["a", "a"]}, "holds a name twice"),
        ({"roles": {"a": "exam"}}, "role 'exam' of task 'a'"),
        ({"normalise": [1, 1]}, "two different finite numbers"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        quiet(**{"metric": "val_acc", **kwargs})


class NeverTrains(Point):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        raise AssertionError("training has begun")


@pytest.mark.parametrize("metric", ["val_accuracy", "acc"])
def test_metric_that_nothing_logs_is_refused_before_training(tmp_path: Path, metric: str) -> None:
    trainer = a_trainer(tmp_path, quiet(metric), num_sanity_val_steps=2)
    message = "nothing logs a metric of that name for the loaders of 'task_0', 'task_1', 'task_2'. Logged are 'val_acc'"
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(NeverTrains(), DataLoader(DATASETS["a"]), loaders())


def test_metric_that_nothing_logs_is_refused_before_a_stream_trains(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="Logged are 'test_acc'"):
        fit_stream(a_trainer(tmp_path, quiet("test_f1")), NeverTrains(), stream())


def test_metric_logged_once_for_all_loaders_is_refused(tmp_path: Path) -> None:
    class Mixed(NeverTrains):
        def on_validation_epoch_end(self) -> None:
            self.log("mean_acc", 0.5)

    trainer = a_trainer(tmp_path, quiet("mean_acc"), num_sanity_val_steps=2)
    with pytest.raises(MisconfigurationException, match="logged once for all 3 loaders"):
        trainer.fit(Mixed(), DataLoader(DATASETS["a"]), loaders())


@pytest.mark.parametrize("sanity", [0, 2])
def test_validation_step_without_dataloader_idx_is_refused(tmp_path: Path, sanity: int) -> None:
    class Blind(NeverTrains):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("val_acc", 0.5)

    trainer = a_trainer(tmp_path, quiet("val_acc"), num_sanity_val_steps=sanity)
    with pytest.raises(MisconfigurationException, match=r"3 validation loaders, .*takes no `dataloader_idx`"):
        trainer.fit(Blind(), DataLoader(DATASETS["a"]), loaders())

    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> DataLoader:
            return DataLoader(DATASETS["a"])

        def val_dataloader(self) -> list[DataLoader]:
            return loaders()

    trainer = a_trainer(tmp_path, quiet("val_acc"))
    with pytest.raises(MisconfigurationException, match="takes no `dataloader_idx`"):
        trainer.fit(Blind(), datamodule=Data())
    with pytest.raises(MisconfigurationException, match="takes no `dataloader_idx`"):
        fit_stream(a_trainer(tmp_path, quiet("test_acc"), num_sanity_val_steps=sanity), Blind(), stream())


def test_unwritable_folder_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    trainer = a_trainer(tmp_path, quiet("val_acc", dirpath=str(tmp_path / "file" / "folder")))
    with pytest.raises(MisconfigurationException, match="cannot write its results into"):
        trainer.fit(NeverTrains(), DataLoader(DATASETS["a"]), loaders())


def test_full_disk_in_the_middle_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    from lightning_cl.strategies import files

    monitor = quiet("val_acc", tasks=list("abc"), dirpath=str(tmp_path / "out"))
    module = Point()

    def fit(task: str) -> None:
        a_trainer(tmp_path, monitor).fit(module, DataLoader(DATASETS[task], batch_size=2), loaders())

    fit("a")
    before = (tmp_path / "out" / "task_matrix.json").read_text()

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *args: Any) -> None:
            self.file.close()

        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

    class FillsUp(pl.Callback):
        def on_train_start(self, *args: Any) -> None:
            monkeypatch.setattr(files, "open", lambda *a, **k: Full(open(*a, **k)), raising=False)  # noqa: SIM115

    trainer = a_trainer(tmp_path, monitor, more=[FillsUp()])
    with pytest.warns(UserWarning, match=r"could not write the results of stage 1: .*No space left.* Nothing is lost"):
        trainer.fit(module, DataLoader(DATASETS["b"], batch_size=2), loaders())
    assert (tmp_path / "out" / "task_matrix.json").read_text() == before
    assert monitor.matrix.stages == [0, 1]
    with pytest.raises(MisconfigurationException, match="No space left"):
        fit("c")
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path / "out")) == ["task_matrix.csv", "task_matrix.json"]
    fit("c")
    assert len(json.loads((tmp_path / "out" / "task_matrix.json").read_text())["matrix"]["scores"]) == 9


# ------------------------------------------------------------------------------------ fragment and card

CATALOGUE = Path(__file__).parents[2] / "callbacks"


def test_cards_snippet_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (CATALOGUE / "forgetting_monitor.md").read_text()
    first = text.splitlines()[0]
    for link in re.findall(r"\]\(([^)]+)\)", first):
        assert (CATALOGUE / link).is_file(), link
    assert "tests/callbacks/test_forgetting_monitor.py" in first
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    scope: dict[str, Any] = {"__name__": "snippet"}
    exec(compile(snippet, "forgetting_monitor.md", "exec"), scope)
    matrix = scope["monitor"].matrix
    assert matrix.tasks == ["red", "green", "blue"]
    assert matrix.stages == [0, 1, 2]
    assert matrix.compute()["backward_transfer"] < 0
    assert "backward transfer (BWT)" in capsys.readouterr().out


def test_card_names_every_argument() -> None:
    table = (CATALOGUE / "forgetting_monitor.md").read_text()
    for name in inspect.signature(ForgettingMonitor).parameters:
        assert re.search(rf"^\|[^|]*`{name}`", table, re.MULTILINE), name


def test_fragment_in_a_stock_lightning_cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.cli import LightningCLI

    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(
        "trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.LearningRateMonitor}]}"
    )
    fragment = str(CATALOGUE / "forgetting_monitor.yaml")
    monkeypatch.setattr("sys.argv", ["cli", "--config", "base.yaml", "--config", fragment])
    cli = LightningCLI(Point, run=False, save_config_callback=None)
    kinds = [type(callback).__name__ for callback in cli.trainer.callbacks]
    assert kinds.index("LearningRateMonitor") < kinds.index("ForgettingMonitor")
    monitor = next(callback for callback in cli.trainer.callbacks if isinstance(callback, ForgettingMonitor))
    assert monitor.metric == "val_accuracy"


def test_every_argument_goes_through_yaml(tmp_path: Path) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--monitor", type=ForgettingMonitor)
    given = {
        "class_path": "lightning_cl.callbacks.ForgettingMonitor",
        "init_args": {
            "metric": "val_acc",
            "mode": "min",
            "max_forgetting": 0.5,
            "on_exceed": "restore",
            "tasks": ["a", "b"],
            "roles": {"b": "probe"},
            "reference": {"a": 0.5},
            "normalise": {"a": [4.0, 0.0]},
            "dirpath": "out",
            "print_table": False,
            "plots": False,
        },
    }
    config = parser.parse_object({"monitor": given})
    again = parser.parse_string(parser.dump(config))
    monitor = parser.instantiate_classes(again).monitor
    assert (monitor.max_forgetting, monitor.on_exceed, monitor.dirpath) == (0.5, "restore", "out")
