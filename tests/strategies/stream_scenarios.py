# SPDX-License-Identifier: Apache-2.0
"""A stream of tasks under the strategies, with and without callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import lightning_cl
from tests.helpers import models
from tests.strategies import workers


def _rows(count: int, seed: int) -> list[dict[str, Any]]:
    digits = torch.randint(0, 10, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [{"prompt": f"{d}+{seed}=", "answer": str((d + seed) % 10), "options": list("0123456789")} for d in digits]


def run(
    folder: Path, strategy: Any, devices: int, callbacks: list[Any], ckpt_path: str | None = None, **kwargs: Any
) -> Any:
    """Two tasks and a probe, on one process with batches of 8 or on two with 4 each."""
    torch.manual_seed(0)
    module = lightning_cl.CausalLMModule(
        models.tiny_llama(), lora={"r": 4}, tokenizer=models.tiny_tokenizer(), lr=1e-2, max_new_tokens=4
    )
    tasks = [lightning_cl.Task(f"plus {i}", train=_rows(16, i), test=_rows(21, i), metric="accuracy") for i in range(2)]
    tasks.append(lightning_cl.Task("probe", test=_rows(5, 7), metric="exact_match", role="probe"))
    stream = lightning_cl.TaskStream(tasks, batch_size=8 // devices, max_length=64)
    trainer = workers.trainer(
        folder, devices=devices, strategy=strategy, callbacks=callbacks, enable_checkpointing=True, **kwargs
    )
    matrix = lightning_cl.fit_stream(trainer, module, stream, ckpt_path=ckpt_path)
    return {
        "matrix": {k: v for k, v in matrix.compute().items() if isinstance(v, float)},
        "weights": workers.whole(module),
    }


def five_callbacks() -> list[Any]:
    """All callbacks but the router."""
    from lightning_cl import callbacks, replay

    ids = [torch.randint(4, 99, (12,), generator=torch.Generator().manual_seed(i)) for i in range(8)]
    general = [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": i.clone()} for i in ids]
    return [
        callbacks.ReplayMixer(
            [replay.GeneralSamples(general, num_samples=8), replay.EpisodicMemory(8)], rows_per_batch=2
        ),
        callbacks.ReplayDistillation(anchor="previous_task"),
        callbacks.ActivationMarginRegularizer(anchor="previous_task"),
        callbacks.LoRAInterpolator(),
        callbacks.ForgettingMonitor("test_accuracy"),
    ]


def alone(rank: int, folder: Path) -> Any:
    """The stream without callbacks, in 4 bits and sharded."""
    return run(folder, workers.strategy(quantization="nf4"), 2, [])


def all_on(rank: int, folder: Path) -> Any:
    """With five callbacks; and the same again, broken off in the second task and resumed."""
    import lightning.pytorch as pl

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.datamodule.current_task.name == "plus 1" and batch_idx == 0:
                raise RuntimeError("broken off")

    unbroken = run(folder / "unbroken", workers.strategy(quantization="nf4"), 2, five_callbacks())
    try:
        run(folder / "broken", workers.strategy(quantization="nf4"), 2, [*five_callbacks(), Stop()])
    except RuntimeError as error:
        if "broken off" not in str(error):
            raise
    resumed = run(folder / "broken", workers.strategy(quantization="nf4"), 2, five_callbacks(), ckpt_path="last")
    return unbroken, resumed


ALL = [alone, all_on]
