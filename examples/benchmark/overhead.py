# SPDX-License-Identifier: Apache-2.0
"""What replay costs a training step, beside what the added rows must cost.

Every run is a real ``trainer.fit``. Runs take turns within a round, and a figure is the median over the rounds of a
ratio within one round, so that a clock that drifts from round to round cancels. ``python
examples/benchmark/overhead.py --device gpu --out overhead.json``; ``--tiny`` on a CPU, ``--parts`` for some of it.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_cl.callbacks import ContinualCallback, ReplayMixer
from lightning_cl.replay import EpisodicMemory, GeneralSamples, Row
from lightning_cl.report.provenance import provenance

VOCABULARY = 4096
# Steps of each fit that are not counted: allocator, kernels and the optimizer's state are set up in them.
WARM_UP = 3

#: A measured figure: what it is, its value, and the most it may be (None: for comparison).
Figure = tuple[str, float, "float | None"]


class Rows(Dataset):
    """Rows of random tokens, all of one length."""

    def __init__(self, rows: int, length: int, seed: int = 0) -> None:
        self.ids = torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


class Model(pl.LightningModule):
    """A Llama of SmolLM2-135M's shape (or a small one) with random weights."""

    def __init__(self, tiny: bool) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = (128, 4, 256) if tiny else (576, 30, 1536)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=shape[0],
            num_hidden_layers=shape[1],
            intermediate_size=shape[2],
            num_attention_heads=4 if tiny else 9,
            num_key_value_heads=2 if tiny else 3,
            use_cache=False,
        )
        self.model = LlamaForCausalLM(config)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-5)


class StepTimes(pl.Callback):
    """Seconds between the ends of steps, device work included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None

    def on_train_batch_end(self, *args: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


class Idle(ContinualCallback):
    """Attaches to the module and asks for nothing."""


class Bench:
    """The model and the device that all runs share.

    Args:
        device: ``"cpu"`` or ``"gpu"``.
        tiny: a small model on short rows, to try the script itself.
        rounds: how often each comparison is repeated.
        steps: counted steps of each run.
    """

    def __init__(self, device: str, tiny: bool, rounds: int, steps: int) -> None:
        self.device, self.tiny, self.rounds, self.steps = device, tiny, rounds, steps
        self.model = Model(tiny)
        self.batch, self.added = (8, 2) if tiny else (32, 8)
        self.long, self.short = (128, 16) if tiny else (512, 48)

    def step_time(self, callbacks: list[pl.Callback], batch: int, length: int, seed: int = 0) -> float:
        """Median step time of one fit, in seconds."""
        times, steps = StepTimes(), self.steps + WARM_UP
        trainer = pl.Trainer(
            accelerator=self.device,
            devices=1,
            precision="bf16-true" if self.device == "gpu" else "32-true",
            max_steps=steps,
            callbacks=[*callbacks, times],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        # The collector would otherwise run in the middle of some steps and not of others.
        gc.collect()
        trainer.fit(self.model, DataLoader(Rows(batch * steps, length, seed), batch_size=batch))
        return statistics.median(times.seconds[WARM_UP - 1 :])

    def rounds_of(self, runs: Mapping[str, Callable[[], float]]) -> list[dict[str, float]]:
        """The seconds of each run in each round, after a round that does not count."""
        timed = [{name: run() for name, run in runs.items()} for _ in range(self.rounds + 1)]
        return timed[1:]

    def general(self, length: int, **kwargs: Any) -> list[pl.Callback]:
        """A mixer of replay rows of one length."""
        rows = GeneralSamples(Rows(64, length, seed=1), num_samples=64, max_tokens=length)
        return [ReplayMixer(rows, rows_per_batch=self.added, **kwargs)]

    def equal(self) -> list[Figure]:
        """Task and replay rows of one length."""
        batch, added, length = self.batch, self.added, self.long
        rounds = self.rounds_of(
            {
                "plain": lambda: self.step_time([], batch, length),
                "attached": lambda: self.step_time([Idle()], batch, length),
                "replay": lambda: self.step_time(self.general(length), batch, length),
                "larger": lambda: self.step_time([], batch + added, length),
            }
        )
        return [
            ("attached, nothing active / plain", _ratio(rounds, "attached", "plain"), 1.01),
            (
                f"{batch} + {added} rows of {length} / plain",
                _ratio(rounds, "replay", "plain"),
                1.02 * (1 + added / batch),
            ),
            (f"the same / a plain batch of {batch + added}", _ratio(rounds, "replay", "larger"), None),
        ]

    def unequal(self) -> list[Figure]:
        """Short task rows and long replay rows."""
        batch, added, short, long = self.batch, self.added, self.short, self.long
        rounds = self.rounds_of(
            {
                # The unpadded arithmetic, measured: the same tokens as plain batches of either length.
                "short alone": lambda: self.step_time([], batch, short),
                "long alone": lambda: self.step_time([], added, long),
                "auto": lambda: self.step_time(self.general(long), batch, short),
                "joined": lambda: self.step_time(self.general(long, layout="joined"), batch, short),
            }
        )
        both = f"{batch} x {short} + {added} x {long}"
        return [
            (f"{both} / both alone", _ratio(rounds, "auto", "short alone", "long alone"), 1.1),
            ("the same, always joined / both alone", _ratio(rounds, "joined", "short alone", "long alone"), None),
        ]

    def tasks(self, count: int) -> list[Figure]:
        """Many tasks with one memory, and the same number of plain fits beside them."""
        mixer = ReplayMixer(EpisodicMemory(200, policy="task_balanced"))
        batch, length = self.batch, self.short
        plain, replay, memory = [], [], []
        for seed in range(count):
            plain.append(self.step_time([], batch, length, seed))
            replay.append(self.step_time([mixer], batch, length, seed))
            memory.append(torch.cuda.memory_allocated() if torch.cuda.is_available() else 0)
        # Neighbouring tasks are taken together: one short fit alone is noise. Task 1 has nothing to replay.
        few = max(2, count // 10)
        first, last = slice(1, 1 + few), slice(count - few, count)

        def growth(values: list[float]) -> float:
            return statistics.median(values[last]) / statistics.median(values[first])

        ratios = [r / p for r, p in zip(replay, plain, strict=True)]
        return [
            (f"replay / plain, at the last of {count} tasks / at the second", growth(ratios), 1.03),
            ("step time with replay, last / second", growth(replay), None),
            ("step time of the plain fits beside it, last / second", growth(plain), None),
            ("memory, last / second", memory[-1] / memory[1] if memory[1] else 1.0, 1.03),
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
    tokens = torch.arange(8 * size) % VOCABULARY
    memory = EpisodicMemory(size)
    state = memory.state_dict()
    state["kept"] = {
        "columns": {"input_ids": {"data": tokens, "shapes": [[8]] * size}},
        "priorities": list(range(size)),
        "ids": [str(i) for i in range(size)],
        "tokens": [8] * size,
        "tasks": ["past"] * size,
    }
    memory.load_state_dict(state)
    assert isinstance(memory.draw(1, 0, 1)[0], Row)
    return memory


def _ratio(rounds: list[dict[str, float]], over: str, *under: str) -> float:
    """Median over the rounds of one run's step time over the sum of others'."""
    return statistics.median(times[over] / sum(times[name] for name in under) for times in rounds)


def main() -> None:
    """Measure, check against the targets, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("--parts", default="equal,unequal,tasks,memory")
    parser.add_argument("--tiny", action="store_true", help="a small model, few rounds: to try the script itself")
    parser.add_argument("--rounds", type=int, help="how often each comparison is repeated")
    parser.add_argument("--steps", type=int, help="counted steps of each run")
    parser.add_argument("--tasks", type=int, help="how many tasks are learnt one after the other")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    tiny = arguments.tiny
    bench = Bench(
        arguments.device, tiny, arguments.rounds or (2 if tiny else 7), arguments.steps or (5 if tiny else 20)
    )
    parts: dict[str, Callable[[], list[Figure]]] = {
        "equal": bench.equal,
        "unequal": bench.unequal,
        "tasks": lambda: bench.tasks(arguments.tasks or (8 if tiny else 100)),
        "memory": bench.memory,
    }
    unknown = [name for name in arguments.parts.split(",") if name not in parts]
    if unknown:
        parser.error(f"unknown parts {unknown}; choose from {', '.join(parts)}")
    figures: list[Figure] = []
    for name in arguments.parts.split(","):
        start = time.perf_counter()
        figures += parts[name]()
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        if arguments.out:
            result = {"figures": figures, "tiny": tiny, "rounds": bench.rounds, "steps": bench.steps, **provenance()}
            arguments.out.write_text(json.dumps(result, indent=1))
    for what, value, target in figures:
        verdict = "" if target is None else f"  target {target:.3f}  {'met' if value <= target else 'MISSED'}"
        print(f"{what:60s} {value:9.3f}{verdict}")


if __name__ == "__main__":
    main()
