# SPDX-License-Identifier: Apache-2.0
"""What replay costs a training step, beside what the added rows must cost.

Every run is a real ``trainer.fit``. Runs take turns within a round, and a figure is the median over the rounds of a
ratio within one round, so that a clock that drifts from round to round cancels. ``python
examples/benchmark/overhead.py --out overhead.json``; ``--tiny`` on a CPU, ``--parts`` for some of it.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from training import DEVICE, SHAPES, Plain, Stopwatch, make_model, make_rows, quiet, ratio, rounds, run, write

from lightning_cl.callbacks import ContinualCallback, ReplayMixer
from lightning_cl.replay import EpisodicMemory, GeneralSamples, Row

# Steps of each fit that are not counted: allocator, kernels and the optimizer's state are set up in them.
WARM_UP = 2

# For many short fits: a step that is short makes what is added to it plain.
SHAPES["smollm2-8-layers"] = {**SHAPES["smollm2-135m"], "num_hidden_layers": 8}

#: A measured figure: what it is, its value, and the most it may be (None: for comparison).
Figure = tuple[str, float, "float | None"]


class Idle(ContinualCallback):
    """Attaches to the module and asks for nothing."""


class Bench:
    """The models and sizes that the runs share.

    Args:
        tiny: a small model on short rows, to try the script itself.
        repeats: how often each comparison is repeated.
        steps: counted steps of each run.
    """

    def __init__(self, tiny: bool, repeats: int, steps: int) -> None:
        self.tiny, self.repeats, self.steps = tiny, repeats, steps
        self.shape = "tiny" if tiny else "smollm2-135m"
        self.module = Plain(make_model(self.shape, lora=None))
        self.shallow = Plain(make_model("tiny" if tiny else "smollm2-8-layers", lora=None))
        self.batch, self.added = (8, 2) if tiny else (32, 8)
        self.long, self.short = (128, 16) if tiny else (512, 48)
        #: Milliseconds a step at each of the tasks, with replay.
        self.task_series: list[float] = []

    def fit(self, callbacks: list[pl.Callback], batch: int, length: int, task: int | None = None) -> Stopwatch:
        """One training run on rows of random tokens; those of a task train the shallow model."""
        module = self.module if task is None else self.shallow
        steps = WARM_UP + self.steps * (1 if task is None else 2)
        rows = make_rows(self.shape, batch * steps, length, seed=task or 0)
        precision = "bf16-true" if DEVICE == "cuda" else "32-true"
        return run(module, rows, batch, steps, WARM_UP, callbacks, limit_val_batches=0, precision=precision)

    def general(self, length: int, **kwargs: Any) -> list[pl.Callback]:
        """A mixer of replay rows of one length."""
        rows = GeneralSamples(make_rows(self.shape, 64, length, seed=1), num_samples=64, max_tokens=length)
        return [ReplayMixer(rows, rows_per_batch=self.added, **kwargs)]

    def equal(self) -> list[Figure]:
        """Task and replay rows of one length."""
        batch, added, length = self.batch, self.added, self.long
        runs = rounds(
            {
                "plain": lambda: self.fit([], batch, length),
                "attached": lambda: self.fit([Idle()], batch, length),
                "replay": lambda: self.fit(self.general(length), batch, length),
                "larger": lambda: self.fit([], batch + added, length),
            },
            self.repeats,
        )
        limit = 1.02 * (1 + added / batch)
        return [
            ("attached, nothing active / plain", ratio(runs["attached"], runs["plain"]), 1.01),
            (f"{batch} + {added} rows of {length} / plain", ratio(runs["replay"], runs["plain"]), limit),
            (f"the same / a plain batch of {batch + added}", ratio(runs["replay"], runs["larger"]), None),
        ]

    def unequal(self) -> list[Figure]:
        """Short task rows and long replay rows."""
        batch, added, short, long = self.batch, self.added, self.short, self.long
        runs = rounds(
            {
                # The unpadded arithmetic, measured: the same rows as plain batches of either length.
                "short": lambda: self.fit([], batch, short),
                "long": lambda: self.fit([], added, long),
                "auto": lambda: self.fit(self.general(long), batch, short),
                "joined": lambda: self.fit(self.general(long, layout="joined"), batch, short),
            },
            self.repeats,
        )

        def over_both(name: str) -> float:
            pairs = zip(runs[name], runs["short"], runs["long"], strict=True)
            return statistics.median(mixed.seconds / (short.seconds + long.seconds) for mixed, short, long in pairs)

        both = f"{batch} x {short} + {added} x {long}"
        return [
            (f"{both} / both alone", over_both("auto"), 1.1),
            ("the same, always joined / both alone", over_both("joined"), None),
        ]

    def tasks(self, count: int) -> list[Figure]:
        """Many small tasks with one memory, and plain fits beside those that are compared."""
        mixer = ReplayMixer(EpisodicMemory(200, policy="task_balanced"))
        # Neighbouring tasks are taken together: one short fit alone is noise. Task 1 has nothing to replay.
        few = max(2, count // 10)
        first, last = range(1, 1 + few), range(count - few, count)
        plain, replay, memory = {}, {}, {}
        for index in range(count):
            replay[index] = self.fit([mixer], self.batch, self.short, task=index).seconds
            if index in first or index in last:
                plain[index] = self.fit([], self.batch, self.short, task=index).seconds
            memory[index] = torch.cuda.memory_allocated() if DEVICE == "cuda" else 1
        self.task_series = [1e3 * seconds for seconds in replay.values()]

        def growth(value: Callable[[int], float]) -> float:
            return statistics.median(map(value, last)) / statistics.median(map(value, first))

        return [
            (
                f"replay / plain, at the last of {count} tasks / at the second",
                growth(lambda index: replay[index] / plain[index]),
                1.03,
            ),
            ("step time with replay, last / second", growth(replay.__getitem__), None),
            ("step time of the plain fits beside it, last / second", growth(plain.__getitem__), None),
            ("memory, last / second", memory[count - 1] / memory[1], 1.03),
        ]

    def memory(self) -> list[Figure]:
        """Drawing 8 rows from a small and from a large memory."""
        large = 10_000 if self.tiny else 1_000_000
        memories = {size: _filled(size) for size in (1_000, large)}
        seconds: dict[int, list[float]] = {size: [] for size in memories}
        for _ in range(2000):
            for size, memory in memories.items():
                start = time.perf_counter()
                memory.draw(8, 0, 1)
                seconds[size].append(time.perf_counter() - start)
        small, big = (1e6 * statistics.median(values) for values in seconds.values())
        return [
            (f"8 rows of a memory of {large:,}, microseconds", big, 50.0),
            ("8 rows of a memory of 1,000, microseconds", small, None),
        ]


def _filled(size: int) -> EpisodicMemory:
    """A memory of ``size`` rows, each its own, brought in as a checkpoint would."""
    memory = EpisodicMemory(size)
    state = memory.state_dict()
    state["kept"] = {
        "columns": {"input_ids": {"data": torch.arange(8 * size), "shapes": [[8]] * size}},
        "priorities": list(range(size)),
        "ids": [str(i) for i in range(size)],
        "tokens": [8] * size,
        "tasks": ["past"] * size,
    }
    memory.load_state_dict(state)
    assert isinstance(memory.draw(1, 0, 1)[0], Row)
    return memory


def main(argv: list[str] | None = None) -> None:
    """Measure, check against the targets, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default="equal,unequal,tasks,memory")
    parser.add_argument("--tiny", action="store_true", help="a small model, few repeats: to try the script itself")
    parser.add_argument("--repeats", type=int, help="how often each comparison is repeated")
    parser.add_argument("--steps", type=int, help="counted steps of each run")
    parser.add_argument("--tasks", type=int, help="how many tasks are learnt one after the other")
    parser.add_argument("--processor-time", action="store_true", help="of one thread: on CPUs that others use too")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    quiet()
    if arguments.processor_time:
        torch.set_num_threads(1)
        Stopwatch.clock = staticmethod(time.process_time)
    tiny = arguments.tiny
    bench = Bench(tiny, arguments.repeats or (2 if tiny else 7), arguments.steps or (5 if tiny else 20))
    parts: dict[str, Callable[[], list[Figure]]] = {
        "equal": bench.equal,
        "unequal": bench.unequal,
        "tasks": lambda: bench.tasks(arguments.tasks or (8 if tiny else 100)),
        "memory": bench.memory,
    }
    unknown = [name for name in arguments.parts.split(",") if name not in parts]
    if unknown:
        parser.error(f"unknown parts {unknown}; choose from {', '.join(parts)}")
    # What is imported and built by now is not garbage: each run collects what it left behind, and only that.
    gc.freeze()
    figures: list[Figure] = []
    for name in arguments.parts.split(","):
        start = time.perf_counter()
        figures += parts[name]()
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        settings = {"tiny": tiny, "repeats": bench.repeats, "steps": bench.steps, "task_series_ms": bench.task_series}
        write(arguments.out, {"figures": figures, **settings})
    for what, value, target in figures:
        verdict = "" if target is None else f"  target {target:.3f}  {'met' if value <= target else 'MISSED'}"
        print(f"{what:60s} {value:9.3f}{verdict}")


if __name__ == "__main__":
    main()
