# SPDX-License-Identifier: Apache-2.0
"""Tasks that a tiny model tells apart, and what the processes of the router's distributed tests do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_cl import Task, TaskStream, fit_stream
from lightning_cl.callbacks import RLSRouterFitter
from tests.helpers import models

DIM = 64
EXPECTED = [f"task_{i % 3}" for i in range(6)]


#: Wordings of an instruction that all tasks share.
WORDINGS = [range(120, 126), range(114, 120), range(108, 114)]


class TaskRows(Dataset):
    """Rows of prompt and answer; each task has its own tokens.

    ``instruction``: none, ``"own"`` (a frame that names the task), ``"shared"`` (the same frame around every task's
    prompts), or ``"paraphrased"`` (the same, each row in one of several wordings).
    """

    def __init__(self, task: int, rows: int = 16, instruction: str = "", seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(100 * task + seed)
        self.rows = []
        for row in range(rows):
            n = int(torch.randint(4, 9, (1,), generator=generator))
            prompt = 4 + 40 * task + torch.randint(6, (n,), generator=generator)
            if instruction:
                wording = WORDINGS[row % 3 if instruction == "paraphrased" else 0]
                frame = torch.tensor(range(30 + 40 * task, 36 + 40 * task) if instruction == "own" else wording)
                prompt = torch.cat([frame, prompt, frame.flip(0)])
            answer = torch.full((2,), 4 + 40 * task)
            ids = torch.cat([prompt, answer])
            labels = torch.cat([torch.full_like(prompt, -100), answer])
            self.rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


def loader(task: int, batch_size: int = 4, cls: Any = DataLoader, **kwargs: Any) -> Any:
    return cls(TaskRows(task, **kwargs), batch_size=batch_size, collate_fn=models.collate)


def loader_of_two(task: int) -> DataLoader:
    """One process's loader whose batches hold what two ranks with batches of four see in the same step."""
    data = TaskRows(task)
    parts = [list(DistributedSampler(data, 2, r, shuffle=True, seed=0)) for r in range(2)]
    order = [i for start in range(0, len(parts[0]), 4) for part in parts for i in part[start : start + 4]]
    return DataLoader(data, batch_size=8, sampler=order, collate_fn=models.collate)


def module(lr: float = 0.3, layers: int = 3, **config: Any) -> models.PlainLM:
    return models.PlainLM(models.lora(models.tiny_llama(num_hidden_layers=layers), **config), lr=lr)


def fitter(**kwargs: Any) -> RLSRouterFitter:
    return RLSRouterFitter(**{"expansion_dim": DIM, "ridge": 1e-3, **kwargs})


def fit(folder: Path, router: Any, lm: Any, task: int, rows: Any = None, **kwargs: Any) -> Any:
    settings = {"max_epochs": 1, "max_steps": -1, **kwargs}
    callbacks = [*settings.pop("callbacks", []), router]
    trainer = models.trainer(folder, callbacks=callbacks, **settings)
    trainer.fit(lm, rows if isinstance(rows, DataLoader) else loader(task, **(rows or {})))
    return trainer


def mixed(rows: int = 6) -> dict[str, Tensor]:
    """A batch with rows of all three tasks in turn."""
    sets = [TaskRows(task, seed=7) for task in range(3)]
    return models.collate([sets[i % 3][i] for i in range(rows)])


def adapters(router: RLSRouterFitter) -> dict[str, Tensor]:
    """Whole weights of every adapter, as they are in the model."""
    bank = router._bank
    return {name: value for k in range(3) for name, value in bank.snapshot(f"task_{k}").items()}


def three_tasks(folder: Path, strategy: str, precision: str) -> dict[str, Any]:
    """Fit three tasks in two processes with one Trainer a task; what this rank holds at the end."""
    import lightning_cl  # noqa: F401  (registers the strategies)

    lm, router = module(), fitter(max_tasks=3 if "fsdp" in strategy else None)
    for task in range(3):
        fit(folder, router, lm, task, strategy=strategy, devices=2, precision=precision)
    batch = mixed()
    lm.eval()
    with torch.no_grad():
        logits = lm.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
        ).logits
    return {
        "adapters": adapters(router),
        "stored": router._stored,
        "weight": router.router.weight,
        "gram": router._statistics.total.gram,
        "counts": router._statistics.total.counts,
        "routes": router.routed.last.adapters,
        "route": router.route(batch).adapters,
        "logits": logits.float(),
        "quantized": sum(type(part).__name__ == "Linear4bit" for part in lm.modules()),
        "sharded": sorted(n for n, p in lm.named_parameters() if hasattr(p, "to_local") and "task_2" in n),
    }


def ddp(rank: int, folder: Path) -> dict[str, Any]:
    return three_tasks(folder, "ddp", "32-true")


def fsdp(rank: int, folder: Path) -> dict[str, Any]:
    return three_tasks(folder, "cl_fsdp", "32-true")


def fsdp_4bit(rank: int, folder: Path) -> dict[str, Any]:
    return three_tasks(folder, "cl_fsdp_4bit", "bf16-true")


def resumed(rank: int, folder: Path, sharded: bool = False) -> dict[str, Any]:
    """Task 1 with a checkpoint after each step; then from the one in the middle of its first epoch, with new objects."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    from lightning_cl.strategies import CLFSDPStrategy

    def settings(path: str) -> dict[str, Any]:
        saver = ModelCheckpoint(folder / path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        strategy = CLFSDPStrategy(sharded_checkpoint=sharded)
        return {"strategy": strategy, "devices": 2, "callbacks": [saver], "enable_checkpointing": True}

    lm, router = module(), fitter(max_tasks=3)
    fit(folder, router, lm, 0, strategy="cl_fsdp", devices=2)
    fit(folder, router, lm, 1, rows=loader(1, cls=StatefulDataLoader), **settings("whole"))
    again, newer = module(), fitter(max_tasks=3)
    options = settings("again")
    trainer = models.trainer(
        folder, max_epochs=1, max_steps=-1, **{**options, "callbacks": [*options["callbacks"], newer]}
    )
    trainer.fit(again, loader(1, cls=StatefulDataLoader), ckpt_path=folder / "whole" / "step=1.ckpt")
    return {
        "whole": adapters(router),
        "again": adapters(newer),
        "weights": (router.router.weight, newer.router.weight),
        "counts": newer._statistics.total.counts.tolist(),
    }


def resumed_sharded(rank: int, folder: Path) -> dict[str, Any]:
    return resumed(rank, folder, sharded=True)


def stream(rank: int, folder: Path) -> dict[str, Any]:
    """A task stream under FSDP: the number of adapters is known from the stream."""
    tasks = [Task(f"t{k}", train=TaskRows(k), test=TaskRows(k, rows=6, seed=4)) for k in range(3)]
    data = TaskStream(tasks, batch_size=4, collate_fn=models.collate)
    lm, router = module(), fitter(compare=True)
    trainer = models.trainer(folder, callbacks=[router], max_epochs=1, max_steps=-1, strategy="cl_fsdp", devices=2)
    fit_stream(trainer, lm, data)
    found = {"stages": router.confusion.stages, "names": router._bank.names, "adapters": adapters(router)}
    return {**found, "scores": router.confusion.scores}


def stream_of(tasks: int = 3) -> TaskStream:
    return TaskStream(
        [
            Task(f"t{k}", train=TaskRows(k), val=TaskRows(k, rows=6, seed=3), test=TaskRows(k, rows=6, seed=4))
            for k in range(tasks)
        ],
        batch_size=4,
        collate_fn=models.collate,
    )


def routes(router: RLSRouterFitter, lm: Any) -> list[str]:
    batch = mixed()
    lm.eval()
    with torch.no_grad():
        lm.model(**batch)
    return router.routed.last.adapters
