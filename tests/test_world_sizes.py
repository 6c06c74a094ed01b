# SPDX-License-Identifier: Apache-2.0
"""A stream with replay that goes on with other numbers of processes: the same rows as often, and weights that agree."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_cl import fit_stream
from lightning_cl.callbacks import LoRAInterpolator, ReplayMixer
from lightning_cl.replay import EpisodicMemory, GeneralSamples
from tests.helpers import spawn
from tests.stream_tools import Killed, Scored, points, stream, trainer

GENERAL = 20


class Quiet(Scored):
    """No dropout and no noise: the weights depend on the rows alone. Remembers the rows that it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.net[1].p = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        self.seen.append(x.detach().clone())
        # Summed, so that unequal shares of a batch weigh the same on one and on two processes.
        return torch.nn.functional.cross_entropy(self.net(x), y, reduction="sum") * self.trainer.world_size / 8


class KillAt(pl.Callback):
    """Kills before the first step of the second task that the optimizer has not reached."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.datamodule.current_index == 1 and trainer.global_step == self.step:
            raise Killed


def part(rank: int, folder: Path, strategy: str, devices: int, ckpt: str | None, kill: int | None, out: str) -> None:
    torch.manual_seed(1)
    module = Quiet()
    sources = [GeneralSamples(points(99, GENERAL), num_samples=GENERAL), EpisodicMemory(12)]
    callbacks: list[Any] = [
        ReplayMixer(sources, rows_per_batch=4 // devices, layout="joined"),
        LoRAInterpolator(decay=0.9, parameters="trainable", evaluate_with="fast", consistency_weight=0.0),
        ModelCheckpoint(save_top_k=-1, every_n_train_steps=1, filename="s{step}"),
    ]
    kills = [] if kill is None else [KillAt(kill)]
    strategy = "auto" if strategy == "ddp" and devices == 1 else strategy
    run = trainer(folder, callbacks=[*callbacks, *kills], max_epochs=3, devices=devices, strategy=strategy)
    with contextlib.suppress(Killed):
        fit_stream(run, module, stream(count=2, rows=21, batch_size=8 // devices), ckpt_path=ckpt)
    seen = [row for x in module.seen for row in x.tolist()]
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in module.parameters()]
    spawn.save(folder / out, rank, {"weights": torch.cat([p.detach().flatten() for p in whole]), "seen": seen})


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("cl_fsdp", marks=pytest.mark.slow)])
def test_two_processes_then_one_then_two_draw_each_row_as_often_and_agree(strategy: str, tmp_path: Path) -> None:
    for name in ("one/0", "many/0", "many/1", "many/2"):
        (tmp_path / name).mkdir(parents=True)
    one, many = tmp_path / "one", tmp_path / "many"

    def step(number: int) -> str:
        return str(next(iter(many.glob(f"task_1_t1/sstep={number}*.ckpt"))))

    part(0, one, "ddp", 1, None, None, "0")
    spawn.run(part, 2, many, strategy, 2, None, 2, "0")
    spawn.run(part, 1, many, strategy, 1, step(2), 5, "1")
    spawn.run(part, 2, many, strategy, 2, step(5), None, "2")
    alone = spawn.load(one / "0", 1)[0]
    parts = [*spawn.load(many / "0"), *spawn.load(many / "1", 1), *spawn.load(many / "2")]
    drawn = Counter(tuple(row) for p in parts for row in p["seen"])
    assert drawn == Counter(tuple(row) for row in alone["seen"])

    def counts(seed: int, rows: int) -> list[int]:
        return [drawn[tuple(row)] for row in points(seed, rows).tensors[0].tolist()]

    steps = 3 * 3 * 2  # tasks x epochs x batches of 8 among 21 rows
    general, second = counts(99, GENERAL), counts(1, 21)
    assert second == [3] * 21
    # Of 4 replay rows a step all are general in the first task; the sources share them in the second.
    assert max(general) - min(general) <= 1
    assert sum(general) + sum(counts(0, 21)) - 3 * 21 == 4 * steps
    remembered = [count - 3 for count in counts(0, 21) if count > 3]
    assert len(remembered) == 12
    assert max(remembered) - min(remembered) <= 1
    torch.testing.assert_close(parts[-1]["weights"], alone["weights"], rtol=1e-4, atol=1e-5)
    assert torch.equal(parts[-1]["weights"], parts[-2]["weights"])


@pytest.mark.parametrize("ranks", [(2, 1, 2), (1, 3, 2), (4, 2)])
def test_a_walk_goes_on_with_other_numbers_of_ranks(ranks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_cl.replay import shuffle

    drawn: list[int] = []
    state: Any = None
    for world in ranks:
        steps = []
        for rank in range(world):
            monkeypatch.setattr(shuffle, "world_size", lambda world=world: world)
            monkeypatch.setattr(shuffle, "rank", lambda rank=rank: rank)
            walk = shuffle.ShuffledWalk(seed=5)
            if state is not None:
                walk.load_state_dict(state)
            drawn += walk.take(3, 7, rank, world)
            steps.append(walk.state_dict())
        state = {**steps[0], "steps": [s["steps"][0] for s in steps]}
    counted = Counter(drawn)
    assert len(drawn) == 3 * sum(ranks)
    assert max(counted.values()) - min(counted[i] for i in range(7)) <= 1
