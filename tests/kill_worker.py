# SPDX-License-Identifier: Apache-2.0
"""One process of the kill campaign: builds a run anew, resumes it, and dies by SIGKILL at the point it is given."""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import signal
import sys
from collections import Counter
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch

SETUPS = ("plain", "schedule", "workers", "stream", "callbacks", "router", "background", "sharded")
PARTS = ("before", "fit", "after")


@dataclass(frozen=True)
class Point:
    """A moment of a run: so many function calls into an occurrence of a phase.

    Attributes:
        phase: which phase, see :func:`phases`.
        task: index of the task.
        part: the row of the matrix ``"before"`` the first task, the ``"fit"``, or the row ``"after"`` it.
        step: optimizer steps of the task so far.
        occurrence: which of the phase's occurrences at that step, from 0.
        calls: function calls (Python's and C's) from its beginning.
        rank: the process that dies.
    """

    phase: str
    task: int
    part: str
    step: int
    occurrence: int
    calls: int
    rank: int = 0

    @property
    def key(self) -> tuple[int, int, int, int]:
        """Orders the occurrences of a phase."""
        return self.task, PARTS.index(self.part), self.step, self.occurrence

    def __str__(self) -> str:
        return f"{self.phase}@{self.task}.{self.part}.{self.step}.{self.occurrence}+{self.calls}/{self.rank}"

    @classmethod
    def parse(cls, text: str) -> Point:
        """The point that ``str`` has written."""
        phase, _, place = text.partition("@")
        place, _, rank = place.partition("/")
        place, _, calls = place.partition("+")
        task, part, step, occurrence = place.split(".")
        return cls(phase, int(task), part, int(step), int(occurrence), int(calls), int(rank or 0))


def phases() -> dict[str, list[tuple[Any, str]]]:
    """The functions whose extent is a phase."""
    import lightning.pytorch as pl
    from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
    from lightning.pytorch.loops.fetchers import _DataFetcher
    from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization

    from lightning_cl.callbacks import RLSRouterFitter
    from lightning_cl.replay.collecting import ActivationCollector
    from lightning_cl.replay.generation import DecodeEngine
    from lightning_cl.stream.boundary import TaskBoundary

    return {
        "between-steps": [(_DataFetcher, "__next__")],
        "in-a-step": [(_AutomaticOptimization, "run")],
        "validation": [(_EvaluationLoop, "run")],
        "checkpoint": [(pl.Trainer, "save_checkpoint")],
        "collecting": [(ActivationCollector, "collect")],
        "generating": [(DecodeEngine, "generate")],
        "router": [(RLSRouterFitter, "on_task_end")],
        "boundary": [(TaskBoundary, "setup"), (TaskBoundary, "on_train_end")],
    }


class Watch:
    """Counts the occurrences of each phase, and the calls inside; kills the process at a point.

    Args:
        point: where to die, or None: then all occurrences are written down.
    """

    def __init__(self, point: Point | None, rank: int) -> None:
        self.point = point if point is not None and point.rank == rank else None
        self.timeline: list[list[Any]] = []
        self._records = point is None
        self._seen: Counter[tuple[Any, ...]] = Counter()
        self._calls = 0
        self._stream: Any = None

    def install(self, stream: Any) -> None:
        """Watch all phases from now on."""
        self._stream = stream
        for phase, places in phases().items():
            for owner, name in places:
                setattr(owner, name, self._watched(phase, getattr(owner, name)))

    def _place(self) -> tuple[int, str, int]:
        stream = self._stream
        trainer = stream.trainer
        part = "fit" if stream.row is None else "before" if stream.stage < 0 else "after"
        return stream.current_index, part, 0 if trainer is None else trainer.global_step

    def _watched(self, phase: str, function: Any) -> Any:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            task, part, step = self._place()
            occurrence = self._seen[phase, task, part, step]
            self._seen[phase, task, part, step] += 1
            here = Point(phase, task, part, step, occurrence, 0)
            if self._records:
                return self._record(here, function, *args, **kwargs)
            if self.point is not None and phase == self.point.phase and here.key >= self.point.key:
                return self._die(function, *args, **kwargs)
            return function(*args, **kwargs)

        return call

    def _record(self, here: Point, function: Any, *args: Any, **kwargs: Any) -> Any:
        first, entry = self._calls, [here.phase, here.task, here.part, here.step, here.occurrence, 0]
        self.timeline.append(entry)
        outermost = sys.getprofile() is None
        if outermost:
            sys.setprofile(self._count)
        try:
            return function(*args, **kwargs)
        finally:
            if outermost:
                sys.setprofile(None)
            entry[-1] = self._calls - first

    def _count(self, frame: Any, event: str, argument: Any) -> None:
        self._calls += event in ("call", "c_call")

    def _die(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        assert self.point is not None
        left = self.point.calls

        def count(frame: Any, event: str, argument: Any) -> None:
            nonlocal left
            if event in ("call", "c_call"):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)
        try:
            return function(*args, **kwargs)
        finally:
            sys.setprofile(None)
            # The occurrence had fewer calls than the unbroken run's: the moment after it will do.
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Run the setup until its end or until the point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--setup", choices=SETUPS, required=True)
    parser.add_argument("--ckpt")
    parser.add_argument("--point", type=Point.parse)
    args = parser.parse_args()
    run(args.folder, args.setup, args.ckpt, args.point)


def run(folder: Path, setup: str, ckpt_path: str | None, point: Point | None) -> None:
    """Train the setup's stream, and write its end: what training has changed, on each rank."""
    import lightning.pytorch as pl
    import numpy as np
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger

    from lightning_cl import fit_stream
    from lightning_cl.callbacks import ContinualCallback, ForgettingMonitor
    from lightning_cl.strategies import BackgroundCheckpointIO, CLSingleDeviceStrategy

    rank, devices = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(1)
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    model, stream, callbacks = _plain(setup) if setup in SETUPS[:4] else every_callback(router=setup == "router")
    watch = Watch(point, rank)
    watch.install(stream)
    strategies: dict[str, Any] = {
        "background": CLSingleDeviceStrategy(checkpoint_io=BackgroundCheckpointIO()),
        "sharded": "cl_fsdp",
    }
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategies.get(setup, "auto"),
        max_epochs=2,
        logger=CSVLogger(folder, name="", version=""),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[
            *callbacks,
            ModelCheckpoint(save_top_k=2, monitor="step", mode="max", every_n_train_steps=1, filename="s{step}"),
            ModelCheckpoint(save_top_k=-1, every_n_epochs=1, filename="e{epoch}"),
        ],
    )
    matrix = fit_stream(trainer, model, stream, ckpt_path=ckpt_path)
    ours = [c for c in trainer.callbacks if isinstance(c, ContinualCallback)]
    end = {
        "weights": model.state_dict(),
        "optimizer": [optimizer.state_dict() for optimizer in trainer.optimizers],
        # The diary of the report is rank 0's, and sharded copies of weights are gathered there for a checkpoint.
        "callbacks": {
            c.state_key: {key: value for key, value in c.state_dict().items() if rank == 0 or key != "anchors"}
            for c in ours
            if rank == 0 or not isinstance(c, ForgettingMonitor)
        },
        "matrix": {f"{stage} {task}": score.value for (stage, task), score in matrix.scores().items()},
        "random": torch.get_rng_state(),
        "files": _files(folder) if rank == 0 else {},
    }
    if point is None:
        (folder / f"timeline{rank}.json").write_text(json.dumps(watch.timeline))
    torch.save(_local(end), folder / f"end{rank}.part")
    os.replace(folder / f"end{rank}.part", folder / f"end{rank}.pt")


def _local(value: Any) -> Any:
    """The value with this rank's shards in place of sharded tensors."""
    if isinstance(value, torch.Tensor):
        from lightning_cl.weights import local

        return local(value.detach()).clone()
    if isinstance(value, dict):
        return {key: _local(entry) for key, entry in value.items()}
    return type(value)(map(_local, value)) if type(value) in (list, tuple) else value


def _files(folder: Path) -> dict[str, Any]:
    """The results on disk, without what the clock and the command line put there."""
    found: dict[str, Any] = {}
    matrix = folder / "task_matrix.json"
    if matrix.is_file():
        found["task_matrix.json"] = json.loads(matrix.read_text())
        del found["task_matrix.json"]["provenance"]
        found["task_matrix.csv"] = matrix.with_suffix(".csv").read_text()
    with open(folder / "metrics.csv", newline="") as file:
        found["metrics.csv"] = [dict(row) for row in csv.DictReader(file)]
    return found


def _plain(setup: str) -> tuple[Any, Any, list[Any]]:
    from tests.stream_tools import Scored, stream

    options: dict[str, Any] = {"count": 4, "rows": 10}
    if setup == "workers":
        options["num_workers"] = 2
    if setup == "stream":
        options["streams"] = True
    return Scored(scheduled=setup != "plain"), stream(**options), []


def every_callback(router: bool, tasks: int = 4, rows: int = 10) -> tuple[Any, Any, list[Any]]:
    """Module, stream and every callback: all with a shared adapter but the router, which gives each task its own."""
    from lightning_cl import CausalLMModule, Task, TaskStream
    from lightning_cl import callbacks as cl
    from lightning_cl.replay import EpisodicMemory, GeneralSamples, SelfGenerated
    from tests.helpers.models import tiny_llama, tiny_tokenizer

    def texts_of(task: int, count: int) -> list[dict[str, Any]]:
        words = ("yes", "no") if task % 2 else ("up", "down")
        return [
            {"prompt": f"task {task}, row {i}?", "answer": words[i % 2], "options": list(words)} for i in range(count)
        ]

    stream = [
        Task(
            f"t{i}",
            train=texts_of(i, rows),
            val=texts_of(i, 4),
            test=texts_of(i, 4),
            metric="loss" if i % 2 else "accuracy",
        )
        for i in range(tasks)
    ]
    model = CausalLMModule(
        tiny_llama(num_hidden_layers=3),
        lora={"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1},
        tokenizer=tiny_tokenizer(),
        lr=1e-2,
        schedule="cosine",
    )
    texts = [{"text": f"a general text, number {i}, of some words"} for i in range(12)]
    sources: list[Any] = [
        GeneralSamples(texts, num_samples=8, max_tokens=32),
        SelfGenerated(pool_size=8, length=16),
    ]
    active: list[Any] = [
        cl.ReplayDistillation(),
        cl.ActivationMarginRegularizer(weight="dynamic"),
        cl.LoRAInterpolator(),
        cl.ForgettingMonitor("val_accuracy", plots=False, print_table=False),
    ]
    if router:
        active.append(cl.RLSRouterFitter(expansion_dim=32, general_class=True))
    else:
        sources.append(EpisodicMemory(16))
    mixer = cl.ReplayMixer(sources, rows_per_batch=3)
    return model, TaskStream(stream, batch_size=4, max_length=64, seed=3), [mixer, *active]


if __name__ == "__main__":
    main()
