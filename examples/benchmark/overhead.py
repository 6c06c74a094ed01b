# SPDX-License-Identifier: Apache-2.0
"""What replay costs a training step, beside what the added rows must cost.

Plain and replay runs take turns, each a real ``trainer.fit``; a figure is the median of step times over the median of
the plain run's. ``python examples/benchmark/overhead.py --device gpu --out overhead.json``; ``--tiny`` on a CPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
import warnings
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

    def on_train_start(self, *args: Any) -> None:
        self._last = None

    def on_train_batch_end(self, *args: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


def fit(model: Model, callbacks: list[pl.Callback], device: str, batch: int, length: int, steps: int) -> list[float]:
    """One short fit; gives its step times without the first three."""
    times = StepTimes()
    trainer = pl.Trainer(
        accelerator=device,
        devices=1,
        precision="bf16-true" if device == "gpu" else "32-true",
        max_steps=steps,
        callbacks=[*callbacks, times],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(model, DataLoader(Rows(batch * steps, length), batch_size=batch))
    return times.seconds[3:]


def compare(model: Model, variants: dict[str, Any], device: str, rounds: int, steps: int) -> dict[str, float]:
    """Median step time of each variant over interleaved rounds, and each ratio to the first."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, (callbacks, batch, length) in variants.items():
            seconds[name] += fit(model, callbacks(), device, batch, length, steps)
    return {name: statistics.median(values) for name, values in seconds.items()}


def general(length: int) -> GeneralSamples:
    """Replay rows of one length."""
    return GeneralSamples(Rows(64, length, seed=1), num_samples=64, max_tokens=length)


class Idle(ContinualCallback):
    """Attaches to the module and asks for nothing."""


def sampling(rows: int) -> float:
    """Microseconds to draw 8 rows from a memory of ``rows``: the median of 2,000 draws."""
    memory = EpisodicMemory(rows)
    row = Row({"input_ids": torch.zeros(8, dtype=torch.long)}, "0")
    memory._kept = [(i, row) for i in range(rows)]
    seconds = []
    for _ in range(2000):
        start = time.perf_counter()
        memory.draw(8, 0, 1)
        seconds.append(time.perf_counter() - start)
    return 1e6 * statistics.median(seconds)


def many_tasks(model: Model, device: str, tasks: int, batch: int, length: int, steps: int) -> dict[str, float]:
    """Step time and memory at the last of many tasks, over the second's."""
    mixer = ReplayMixer(EpisodicMemory(200))
    medians, allocated = [], []
    for _ in range(tasks):
        medians.append(statistics.median(fit(model, [mixer], device, batch, length, steps)))
        allocated.append(torch.cuda.memory_allocated() if torch.cuda.is_available() else 0)
    # Neighbouring tasks are taken together: one short fit alone is noise.
    time_ratio = statistics.median(medians[-5:]) / statistics.median(medians[1:6])
    return {"time": time_ratio, "memory": allocated[-1] / allocated[1] if allocated[1] else 1.0}


def main() -> None:
    """Measure, check against the targets, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    device, tiny = arguments.device, arguments.tiny
    model = Model(tiny)
    rounds, steps = (2, 8) if tiny else (4, 24)
    batch, added, length, long = (8, 2, 32, 128) if tiny else (32, 8, 512, 512)
    short = 16 if tiny else 48
    equal = compare(
        model,
        {
            "plain": (list, batch, length),
            "attached": (lambda: [Idle()], batch, length),
            "replay": (lambda: [ReplayMixer(general(length), rows_per_batch=added)], batch, length),
        },
        device,
        rounds,
        steps,
    )
    unequal = compare(
        model,
        {
            "plain": (list, batch, short),
            "replay": (lambda: [ReplayMixer(general(long), rows_per_batch=added)], batch, short),
            "joined": (lambda: [ReplayMixer(general(long), rows_per_batch=added, layout="joined")], batch, short),
            # The unpadded arithmetic, measured: the same tokens as plain batches of either length, one after the other.
            "long alone": (list, added, long),
        },
        device,
        rounds,
        steps,
    )
    tasks = many_tasks(model, device, 6 if tiny else 100, 8, short, 6 if tiny else 8)
    rows = [
        ("attached, nothing active / plain", equal["attached"] / equal["plain"], 1.01),
        (
            f"{batch} + {added} rows of {length} / plain",
            equal["replay"] / equal["plain"],
            (batch + added) / batch * 1.02,
        ),
        (
            f"{batch} x {short} + {added} x {long} / both alone",
            unequal["replay"] / (unequal["plain"] + unequal["long alone"]),
            1.1,
        ),
        ("the same, always joined / both alone", unequal["joined"] / (unequal["plain"] + unequal["long alone"]), None),
        ("step time at the last of many tasks / second", tasks["time"], 1.03),
        ("memory at the last of many tasks / second", tasks["memory"], 1.03),
        ("8 rows of a memory of 1,000,000, microseconds", sampling(1_000_000), 50.0),
    ]
    for name, value, target in rows:
        verdict = "" if target is None else f"  target {target:.3f}  {'met' if value <= target else 'MISSED'}"
        print(f"{name:52s} {value:9.3f}{verdict}")
    result = {"rows": rows, "seconds": {"equal": equal, "unequal": unequal}, "tiny": tiny, **provenance()}
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
