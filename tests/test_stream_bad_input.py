# SPDX-License-Identifier: Apache-2.0
"""Every bad input of the stream is refused with one clear error, before training."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cl import Task, TaskStream, fit_stream
from lightning_cl.stream import files
from tests.helpers import spawn
from tests.stream_tools import Net, Numbers, Scored, points, stream, tasks, trainer, weights


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": " ", "train": [1]}, "a task needs a name"),
        ({"name": "a", "train": [1], "role": "teacher"}, "has `role='teacher'`. Use 'train', or 'probe'"),
        ({"name": "a", "test": [1]}, "Task 'a' has no `train` rows"),
        ({"name": "a", "train": [1], "role": "probe"}, "a probe is never trained on"),
        ({"name": "a", "role": "probe"}, "neither `val` nor `test` rows"),
    ],
)
def test_tasks_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        Task(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": [], "batch_size": 1}, "got 0 tasks and none to train on"),
        ({"tasks": [Task("p", test=[1], role="probe")], "batch_size": 1}, "got 1 tasks and none to train on"),
        ({"tasks": [Task("a", train=[1]), Task("a", train=[2])], "batch_size": 1}, "two tasks named 'a'"),
        ({"tasks": [Task("a", train=[1])], "batch_size": 0}, r"`TaskStream\(batch_size=0\)`: .* at least 1"),
        ({"tasks": [Task("a", train=[1])], "batch_size": 1, "eval_batch_size": 0.5}, "eval_batch_size=0.5"),
        ({"tasks": [Task("a", train=[1])], "batch_size": 1, "num_workers": -1}, "num_workers=-1"),
    ],
)
def test_streams_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        TaskStream(**arguments)


def test_an_unknown_task_name() -> None:
    with pytest.raises(
        MisconfigurationException, match=r"No task is named 't9'. The stream's tasks are 't0', 't1', 't2'"
    ):
        stream().task("t9")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["not json"], r"Task 'a', `train`: .*rows.jsonl, line 1: not JSON .*found 'not json'"),
        ([json.dumps({"question": "x"})], r"rows.jsonl, line 1: found the keys \['question'\], but a row needs"),
        (
            [json.dumps({"prompt": "x", "answer": "c", "options": ["a", "b"]})],
            "the answer 'c' is not among the options",
        ),
        ([], "no rows"),
    ],
)
def test_files_that_cannot_be_learnt_from(tmp_path: Path, lines: list[str], message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(lines))
    data = TaskStream([Task("a", train=str(file))], batch_size=1)
    module = Net()
    before = weights(module)
    with pytest.raises(MisconfigurationException, match=message):
        fit_stream(trainer(tmp_path), module, data)
    assert torch.equal(before, weights(module))


def test_empty_sources(tmp_path: Path) -> None:
    for source in ([], Numbers(0, 0)):
        with pytest.raises(MisconfigurationException, match=r"Task 'a'.*`train`.*no rows|Task 'a' has no `train` rows"):
            fit_stream(trainer(tmp_path), Net(), TaskStream([Task("a", train=source)], batch_size=1))


def test_rows_that_the_tasks_metric_cannot_score(tmp_path: Path) -> None:
    rows = [{"prompt": "1+1=", "answer": "2"}]
    data = TaskStream([Task("a", train=rows, test=rows, metric="accuracy")], batch_size=1)
    with pytest.raises(MisconfigurationException, match=r"Task 'a', `test`: .*'accuracy' needs"):
        fit_stream(trainer(tmp_path), Net(), data)


def test_text_without_a_tokenizer(tmp_path: Path) -> None:
    data = TaskStream([Task("a", train=[{"text": "some words"}])], batch_size=1)
    with pytest.raises(MisconfigurationException, match=r"no tokenizer: `tokenizer` is None"):
        fit_stream(trainer(tmp_path), Net(), data)


def test_a_metric_that_nothing_logs(tmp_path: Path) -> None:
    named = [Task(t.name, t.train, t.val, t.test, metric="bleu") for t in tasks(2)]
    module = Net()
    before = weights(module)
    with pytest.raises(
        MisconfigurationException, match=r"No score for task 't0'.*nothing logs 'bleu' .*logged: acc, loss"
    ):
        fit_stream(trainer(tmp_path), module, TaskStream(named, batch_size=4))
    assert torch.equal(before, weights(module))


def test_arguments_of_fit_stream(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"needs a `TaskStream`, found `list`"):
        fit_stream(trainer(tmp_path), Net(), [])  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match=r"`task_end_weights='first'`: use 'last' or 'best'"):
        fit_stream(trainer(tmp_path), Net(), stream(), task_end_weights="first")  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match=r"no ModelCheckpoint of the Trainer monitors a metric"):
        fit_stream(trainer(tmp_path, callbacks=[ModelCheckpoint()]), Net(), stream(), task_end_weights="best")
    with pytest.raises(MisconfigurationException, match=r"The Trainer has no limit"):
        fit_stream(trainer(tmp_path, max_epochs=-1), Net(), stream())
    with pytest.raises(MisconfigurationException, match=r"starts new processes for every fit"):
        fit_stream(trainer(tmp_path, strategy="ddp_spawn", devices=2), Net(), stream())


def test_no_checkpoint_yet_warns_and_starts(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"there is no checkpoint of this stream in .* yet"):
        matrix = fit_stream(trainer(tmp_path), Scored(), stream(count=2), ckpt_path="last")
    assert matrix.stages == [-1, 0, 1]


def _run(folder: Path, data: TaskStream, ckpt_path: Any = None, **kwargs: Any) -> Any:
    checkpoint = ModelCheckpoint(save_top_k=-1, every_n_train_steps=1)
    return fit_stream(trainer(folder, callbacks=[checkpoint], **kwargs), Scored(), data, ckpt_path=ckpt_path)


def test_a_checkpoint_of_another_stream_is_refused_with_the_difference(tmp_path: Path) -> None:
    _run(tmp_path, stream(count=2))
    end = tmp_path / "task_1_t1" / "task_end.ckpt"

    def refused(changed: list[Task], message: str, path: Path = end) -> None:
        with pytest.raises(MisconfigurationException, match=f"of another stream: {message}"):
            _run(tmp_path, TaskStream(changed, batch_size=4, seed=3), str(path))

    first, second = tasks(2)
    refused([second, first], "task 0 is 't0' in the checkpoint and 't1' now")
    refused([first], "task 1 is 't1' in the checkpoint and nothing now")
    other_rows = Task("t1", points(9), second.val, second.test)
    refused([first, other_rows], "task 't1', `train`: 10 rows as in the checkpoint, but with other content")
    refused([first, Task("t1", points(1, 12), second.val, second.test)], "task 't1', `train`: 10 rows .*, 12 now")
    refused([first, Task("t1", points(1), second.val)], "task 't1' has `test` rows only in the checkpoint")
    # A task that has not begun may change.
    early = tmp_path / "task_0_t0" / "task_end.ckpt"
    _run(tmp_path / "new", TaskStream([first, other_rows], batch_size=4, seed=3), str(early))


def test_damaged_and_foreign_checkpoints(tmp_path: Path) -> None:
    _run(tmp_path, stream(count=2))
    end = tmp_path / "task_1_t1" / "task_end.ckpt"
    missing = tmp_path / "none.ckpt"
    with pytest.raises(MisconfigurationException, match=r"none.ckpt cannot be resumed: there is no such file"):
        _run(tmp_path, stream(count=2), missing)
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {}}, foreign)
    with pytest.raises(MisconfigurationException, match=r"foreign.ckpt holds no state of a `TaskStream`"):
        _run(tmp_path, stream(count=2), foreign)
    whole = end.read_bytes()
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(12):
        place = int(torch.randint(len(whole), (1,), generator=generator))
        end.write_bytes(
            whole[:place] if place % 2 else whole[:place] + bytes([whole[place] ^ 0x5A]) + whole[place + 1 :]
        )
        refused += files.damage(end) is not None
    assert refused >= 8  # the other flips fell into padding between the parts, which holds nothing
    end.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MisconfigurationException, match=r"task_end.ckpt cannot be resumed: it cannot be read"):
        _run(tmp_path, stream(count=2), end)
    with pytest.warns(UserWarning, match=r"task_end.ckpt is damaged and skipped"):
        path = files.find_last(trainer(tmp_path, callbacks=[ModelCheckpoint()]), "TaskStream")
    assert path is not None
    assert path.parent == end.parent  # the last step's checkpoint of the same task


class _WithObject(Scored):
    """Saves an object of its own among the hyperparameters."""

    def __init__(self, setting: Any) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_checkpoints_that_could_not_be_resumed_are_known_at_the_first(tmp_path: Path) -> None:
    run = trainer(tmp_path, callbacks=[ModelCheckpoint()], max_epochs=1)
    with pytest.warns(
        UserWarning, match=r"not be able to resume .*: `checkpoint.hyper_parameters.setting` is a `Task`"
    ):
        fit_stream(run, _WithObject(Task("a", train=[1])), stream(count=1))
    path = tmp_path / "task_0_t0" / "task_end.ckpt"
    with pytest.raises(MisconfigurationException, match=r"task_end.ckpt cannot be resumed: .*running code"):
        fit_stream(trainer(tmp_path), _WithObject(Task("a", train=[1])), stream(count=1), ckpt_path=path)


def test_the_furthest_checkpoint_counts_and_not_the_clock(tmp_path: Path) -> None:
    _run(tmp_path, stream(count=2))
    for age, path in enumerate(sorted(tmp_path.glob("task_*/*.ckpt"))):
        os.utime(path, (10**9 - age, 10**9 - age))
    assert files.find_last_in(tmp_path, "TaskStream") == tmp_path / "task_1_t1" / "task_end.ckpt"


def test_a_run_that_went_on_from_an_older_checkpoint_is_the_last(tmp_path: Path) -> None:
    _run(tmp_path, stream(count=2))
    older = next(iter((tmp_path / "task_0_t0").glob("*step=2.ckpt")))

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 4:
                raise KeyboardInterrupt

    run = trainer(tmp_path, callbacks=[ModelCheckpoint(save_top_k=-1, every_n_train_steps=1), Stop()])
    with pytest.raises(SystemExit):
        fit_stream(run, Scored(), stream(count=2), ckpt_path=older)
    found = files.find_last_in(tmp_path, "TaskStream")
    assert found is not None
    state = files.peek(found)["TaskStream"]
    # Not the end of task 1, which the first run reached.
    assert (state["current_index"], state["position"]["batches"] + 3 * state["position"]["epoch"]) == (0, 3)


def test_of_two_runs_in_one_folder_the_one_begun_last_counts(tmp_path: Path) -> None:
    _run(tmp_path, stream(count=3))
    _run(tmp_path, stream(count=1))
    found = files.find_last_in(tmp_path, "TaskStream")
    assert found is not None
    assert files.peek(found)["TaskStream"]["current_index"] == 0


HOLDER = """
import os, sys, time
from pathlib import Path
from lightning_cl.stream.files import RunLock

lock = RunLock(Path(sys.argv[1]))
lock.acquire()
if os.fork() == 0:
    time.sleep(60)  # as a loader's worker that outlives its parent
    os._exit(0)
print("held", flush=True)
time.sleep(60)
"""


def test_a_folder_that_another_process_writes(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        named = rf"Another process \(process {holder.pid} on .*\) is writing the run's folder"
        with pytest.raises(MisconfigurationException, match=named):
            _run(tmp_path, stream(count=1))
        # A killed holder leaves its file, and here a child; neither holds the folder.
        holder.kill()
        holder.wait()
        _run(tmp_path, stream(count=1))
    finally:
        os.killpg(holder.pid, signal.SIGKILL)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    module = Scored()
    before = weights(module)
    run = trainer(tmp_path, callbacks=[ModelCheckpoint(dirpath=tmp_path / "file" / "below")])
    with pytest.raises(MisconfigurationException, match=r"The run's folder .* cannot be written"):
        fit_stream(run, module, stream(count=1))
    assert torch.equal(before, weights(module))


@pytest.mark.skipif(shutil.which("mount") is None or os.geteuid() != 0, reason="mounting needs root and `mount`")
def test_a_read_only_folder(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path)], check=False)
    if mounted.returncode != 0:
        pytest.skip("this machine lets nothing be mounted")
    try:
        with pytest.raises(MisconfigurationException, match=r"cannot be written \(Read-only file system\)"):
            _run(tmp_path, stream(count=1))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_while_writing_scores_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = files.write_json

    def full(path: Path, value: Any) -> None:
        if path.name == files.ROW:
            raise OSError(28, "No space left on device")
        write(path, value)

    monkeypatch.setattr(files, "write_json", full)
    with pytest.warns(UserWarning, match=r"could not be written to .*row.json \(No space left on device\)"):
        matrix = _run(tmp_path, stream(count=2))
    assert matrix.stages == [-1, 0, 1]


def test_scores_that_cannot_be_read_are_evaluated_again(tmp_path: Path) -> None:
    matrix = _run(tmp_path, stream(count=2))
    (tmp_path / "task_1_t1" / "row.json").write_text("{")
    with pytest.warns(UserWarning, match=r"row.json cannot be read"):
        again = _run(tmp_path, stream(count=2), "last")
    assert {k: v.value for k, v in again.scores().items()} == {k: v.value for k, v in matrix.scores().items()}


def _on_two_ranks(rank: int, folder: Path) -> None:
    def refused(message: str, data: TaskStream, **kwargs: Any) -> None:
        run = trainer(folder, strategy="ddp", **{"devices": 2, **kwargs})
        with pytest.raises(MisconfigurationException, match=message):
            fit_stream(run, Net(), data)

    (folder / "of_rank_0.jsonl").write_text('{"text": "words"}')
    # Only the second process misses its file, and the first must not wait for it.
    one_missing = TaskStream([Task("a", train=str(folder / f"of_rank_{rank}.jsonl"))], batch_size=1, tokenizer=_words)
    with pytest.raises((MisconfigurationException, RuntimeError), match=r"Task 'a', `train`: .*no such file"):
        fit_stream(trainer(folder, strategy="ddp", devices=2), Net(), one_missing)
    refused("Task 't0' has 1 `train` rows for 2 processes", stream(count=1, rows=1))
    named = [Task(t.name, t.train, t.val, t.test, metric="bleu") for t in tasks(1)]
    refused("No score for task 't0'.*nothing logs 'bleu'", TaskStream(named, batch_size=4))
    (folder / "file").write_text("")
    blocked = ModelCheckpoint(dirpath=folder / "file" / "below")
    refused("cannot be written", stream(count=1), callbacks=[blocked])


def _words(text: str, **_: Any) -> Any:
    raise AssertionError("never asked: the other process has no rows")


def test_errors_are_raised_on_every_rank(tmp_path: Path) -> None:
    spawn.run(_on_two_ranks, 2, tmp_path)
