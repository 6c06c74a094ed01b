# SPDX-License-Identifier: Apache-2.0
"""The stream: tasks in one Trainer, what is set back between them, and each row once."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import IterableDataset, get_worker_info

from lightning_cl import Task, TaskStream, fit_stream
from lightning_cl.stream.loader import TaskLoader
from lightning_cl.stream.plan import batch_sizes, batches_of_stream, part_of
from tests.stream_tools import Hooks, Net, Numbers, Scored, Stream, stream, tasks, trainer, weights

sizes = st.tuples(st.integers(1, 60), st.integers(1, 7), st.integers(1, 4)).filter(lambda t: t[0] >= t[2])


@given(sizes)
def test_every_process_has_rows_of_every_batch_and_each_row_is_used_once(size: tuple[int, int, int]) -> None:
    rows, batch_size, world = size
    used: list[int] = []
    start = 0
    for global_size in batch_sizes(rows, batch_size, world):
        parts = [list(part_of(start, global_size, rank, world)) for rank in range(world)]
        assert all(parts)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert max(map(len, parts)) <= batch_size + (batch_size == 1)
        used += itertools.chain.from_iterable(parts)
        start += global_size
    assert used == list(range(rows))


@given(sizes)
def test_a_source_without_length_is_cut_as_one_with_length(size: tuple[int, int, int]) -> None:
    rows, batch_size, world = size
    plan = batch_sizes(rows, batch_size, world)
    ends = list(itertools.accumulate(plan))
    for rank in range(world):
        expected = [
            (end, part_of(end - n, n, rank, world).start, list(part_of(end - n, n, rank, world)))
            for end, n in zip(ends, plan, strict=True)
        ]
        assert list(batches_of_stream(iter(range(rows)), batch_size, rank, world)) == expected


@settings(max_examples=40, deadline=None)
@given(sizes, st.booleans(), st.data())
def test_a_loader_begun_at_a_position_gives_what_was_left(size: Any, streams: bool, data: Any) -> None:
    rows, batch_size, world = size
    source = Stream(Numbers(0, rows)) if streams else Numbers(0, rows)

    def loader(rank: int, world: int, batch_size: int, position: Any = None) -> TaskLoader:
        return TaskLoader(source, batch_size, list, not streams, seed=5, rank=rank, world_size=world, position=position)

    whole = [list(loader(rank, world, batch_size)) for rank in range(world)]
    done = data.draw(st.integers(0, len(whole[0])))
    position = None
    for rank in range(world):
        first = loader(rank, world, batch_size)
        assert list(itertools.islice(iter(first), done)) == whole[rank][:done]
        position = first.position(done)
        rest = loader(rank, world, batch_size, position)
        assert list(rest) == whole[rank][done:]
        assert streams or len(rest) == len(whole[rank])
    # Another number of processes draws the rest of the rows, each once.
    other = data.draw(st.integers(1, 3))
    if rows - position["rows"] >= other:
        left = [row for rank in range(other) for batch in loader(rank, other, batch_size, position) for row in batch]
        before = [row for part in whole for batch in part[:done] for row in batch]
        assert sorted(left + before) == list(range(rows))


class SplitsItself(IterableDataset):
    """Gives each worker its own rows, as careful sources do."""

    def __iter__(self) -> Any:
        info = get_worker_info()
        yield from range(0 if info is None else info.id, 11, 1 if info is None else info.num_workers)


@pytest.mark.parametrize("source", [Numbers(0, 11), Stream(Numbers(0, 11)), SplitsItself(), list(range(11))])
@pytest.mark.parametrize("workers", [0, 2])
def test_each_row_once_an_epoch_with_any_source_and_workers(source: Any, workers: int) -> None:
    data = TaskStream([Task("a", train=source)], batch_size=4, num_workers=workers)
    loader = data.train_dataloader()
    alone = TaskStream([Task("a", train=source)], batch_size=4).train_dataloader()
    for epoch in range(2):
        loader.set_epoch(epoch)
        alone.set_epoch(epoch)
        batches = [batch.tolist() for batch in loader]
        assert sorted(itertools.chain.from_iterable(batches)) == list(range(11))
        assert batches == [batch.tolist() for batch in alone]


def test_the_order_changes_with_the_epoch_the_task_and_the_seed() -> None:
    def order(seed: int, task: int, epoch: int) -> list[int]:
        data = TaskStream([Task(n, train=Numbers(0, 32)) for n in "ab"], batch_size=32, seed=seed)
        data.current_index = task
        loader = data.train_dataloader()
        loader.set_epoch(epoch)
        return next(iter(loader)).tolist()

    orders = [order(*where) for where in itertools.product((0, 1), (0, 1), (0, 1))]
    assert len({tuple(o) for o in orders}) == 8
    assert order(1, 1, 1) == orders[-1]


def test_three_tasks_train_fully_with_one_trainer(tmp_path: Path) -> None:
    hooks = Hooks()
    module = Scored()
    matrix = fit_stream(trainer(tmp_path, callbacks=[hooks]), module, stream())
    names = [(name, task) for name, task, _, _ in hooks.calls]
    for task in range(3):
        assert names.count(("on_train_batch_end", task)) == 6  # 2 epochs of 3 batches
        assert names.count(("on_train_epoch_end", task)) == 2
    # Epochs begin anew with each task, logged steps do not.
    starts = [(epoch, steps) for name, _, epoch, steps in hooks.calls if name == "on_train_start"]
    assert starts == [(0, 0), (0, 6), (0, 12)]
    assert matrix.tasks == ["t0", "t1", "t2"]
    assert set(matrix.scores()) == {(stage, f"t{task}") for stage in range(-1, 3) for task in range(3)}


def test_max_steps_holds_for_each_task(tmp_path: Path) -> None:
    hooks = Hooks()
    fit_stream(trainer(tmp_path, max_steps=4, max_epochs=-1, callbacks=[hooks]), Scored(), stream())
    per_task = [sum(c[:2] == ("on_train_batch_end", task) for c in hooks.calls) for task in range(3)]
    assert per_task == [4, 4, 4]


def test_a_plain_second_fit_trains_nothing_which_is_why_the_boundary_exists(tmp_path: Path) -> None:
    run, module, data = trainer(tmp_path), Scored(), stream()
    run.fit(module, datamodule=data)
    before = weights(module)
    data.current_index = 1
    run.fit(module, datamodule=data)
    assert torch.equal(before, weights(module))


def test_the_stream_equals_a_loop_of_fits_with_new_trainers(tmp_path: Path) -> None:
    ours, theirs = Net(), Net()
    for module in (ours, theirs):
        _deterministic(module)
    fit_stream(trainer(tmp_path), ours, TaskStream(_named(), batch_size=4, seed=3))
    data = TaskStream(_named(), batch_size=4, seed=3)
    for task in range(2):
        data.current_index = task
        trainer(tmp_path).fit(theirs, datamodule=data)
    assert torch.equal(weights(ours), weights(theirs))


def _deterministic(module: Net) -> None:
    module.net[1].p = 0.0

    def step(batch: Any, batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(module.net(batch[0]), batch[1])

    module.training_step = step  # type: ignore[method-assign]


def test_early_stopping_checkpoints_and_rates_begin_anew_with_each_task(tmp_path: Path) -> None:
    stopping = EarlyStopping("val_acc", mode="max", patience=1)
    best = ModelCheckpoint(monitor="val_acc", mode="max", save_last=True)
    seen: list[tuple[int, int]] = []

    class Watch(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
            assert stopping.wait_count == 0
            assert best.best_model_score is None
            assert not trainer.optimizers[0].state

        def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
            seen.append((trainer.datamodule.current_index, trainer.current_epoch))
            assert Path(best.best_model_path).parent.name == f"task_{trainer.datamodule.current_index}_t{len(seen) - 1}"

    loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "tb")]
    run = trainer(
        tmp_path,
        max_epochs=6,
        logger=loggers,
        log_every_n_steps=1,
        callbacks=[Watch(), stopping, LearningRateMonitor(), best],
    )
    fit_stream(run, Scored(scheduled=True), stream())
    assert [task for task, _ in seen] == [0, 1, 2]
    # Without the reset, tasks 1 and 2 would end after their first epoch at the latest.
    assert all(epochs >= 2 for _, epochs in seen)
    root = Path(loggers[0].log_dir)
    for task in range(3):
        files = {path.name for path in (root / f"task_{task}_t{task}").iterdir()}
        assert {"task_end.ckpt", "last.ckpt", "row.json"} <= files
        assert any(name.startswith("epoch=") for name in files)
    with open(root / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(steps)
    rates = [float(row["lr-AdamW"]) for row in rows if row["lr-AdamW"]]
    assert rates.count(0.01) == 3  # the schedule, too, begins anew


def test_optimizer_and_schedule_can_be_carried_over(tmp_path: Path) -> None:
    steps: list[float] = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            state = trainer.optimizers[0].state
            steps.append(float(next(iter(state.values()))["step"]) if state else 0.0)

    fit_stream(trainer(tmp_path, callbacks=[Watch()]), Scored(scheduled=True), stream(count=2), optimizer_reset=False)
    assert steps == [float(i) for i in range(12)]


def test_a_task_can_end_with_its_best_weights(tmp_path: Path) -> None:
    best = ModelCheckpoint(monitor="val_loss", mode="min")
    ends: list[bool] = []

    class Watch(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
            saved = torch.load(best.best_model_path, weights_only=True)["state_dict"]
            ends.append(all(torch.equal(saved[name], value) for name, value in module.state_dict().items()))

    # So large a rate that the last weights are not the best.
    run = trainer(tmp_path, max_epochs=4, callbacks=[Watch(), best])
    matrix = fit_stream(run, Net(lr=1.0), TaskStream(_named(), batch_size=4, seed=3), task_end_weights="best")
    assert ends == [True, True]
    assert matrix.score(1, "t1") is not None


def _named() -> list[Task]:
    return [Task(t.name, t.train, t.val, t.test, metric="loss") for t in tasks(2)]


def test_the_current_tasks_validation_has_the_bare_name(tmp_path: Path) -> None:
    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
            index = trainer.datamodule.current_index
            metrics = trainer.callback_metrics
            assert metrics["val_acc"] == metrics[f"val_acc/dataloader_idx_{index}"]

    fit_stream(trainer(tmp_path, callbacks=[Watch()]), Scored(), stream())


def test_scores_come_from_test_rows_and_else_from_validation_rows(tmp_path: Path) -> None:
    class Both(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.weight.sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val_mean", batch.float().mean(), batch_size=len(batch))

        def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("test_mean", batch.float().mean(), batch_size=len(batch))

    class ValidationAlone(Both):
        test_step = None  # type: ignore[assignment]

    class Neither(Both):
        test_step = validation_step = None  # type: ignore[assignment]

    def data() -> TaskStream:
        several = [
            Task("a", train=Numbers(0, 4), val=Numbers(10, 5), test=Numbers(20, 5)),
            Task("b", train=Numbers(0, 4), val=Numbers(30, 5)),
            Task("c", train=Numbers(0, 4)),
            Task("p", test=Numbers(40, 5), role="probe"),
        ]
        return TaskStream(several, batch_size=2)

    for module in (Both(), ValidationAlone()):
        matrix = fit_stream(trainer(tmp_path, max_epochs=1), module, (used := data()))
        found = {task: score.value for (stage, task), score in matrix.scores().items() if stage == 1}
        assert found == {"a": 22.0, "b": 32.0, "p": 42.0}
        assert used.missing[1, "c"] == "the task has neither `test` nor `val` rows"
        assert matrix.score(0, "a").rows == 5
    with pytest.warns(UserWarning, match="The task matrix stays empty"):
        matrix = fit_stream(trainer(tmp_path, max_epochs=1), Neither(), data())
    assert matrix.scores() == {}
    assert matrix.compute()["average"] is None


def test_a_callback_can_end_the_stream_after_its_task(tmp_path: Path) -> None:
    class Stop(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
            if trainer.datamodule.current_index == 1:
                trainer.datamodule.stop("enough")

    with pytest.warns(UserWarning, match=r"ends after task 't1' \(2 of 3\): enough"):
        matrix = fit_stream(trainer(tmp_path, callbacks=[Stop()]), Scored(), stream())
    assert matrix.stages == [-1, 0, 1]


def test_the_trainer_is_left_as_it_was(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "given")
    run = trainer(tmp_path, callbacks=[checkpoint])
    before = list(run.callbacks)
    fit_stream(run, Scored(), stream(count=2))
    assert run.callbacks == before
    assert run._checkpoint_connector._parse_ckpt_path.__func__ is type(run._checkpoint_connector)._parse_ckpt_path
    assert (checkpoint.dirpath, run.num_sanity_val_steps) == (str(tmp_path / "given"), 2)
    assert {p.name for p in (tmp_path / "given").glob("task_*")} == {"task_0_t0", "task_1_t1"}


def test_a_loader_says_its_length_where_its_source_has_one() -> None:
    assert len(TaskLoader(Numbers(0, 7), 4, list)) == 2
    with pytest.raises(TypeError, match="has no length"):
        len(TaskLoader(Stream(Numbers(0, 7)), 4, list))
