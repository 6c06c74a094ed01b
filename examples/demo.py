# SPDX-License-Identifier: Apache-2.0
"""Train four tasks in sequence, plainly and with replay, and show what each run remembers.

``make demo`` runs it. Everything it uses is the public API; read it as an example.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from assets import ASSETS
from rich.console import Console

from lightning_cl import CausalLMModule, Task, TaskStream, fit_stream
from lightning_cl.callbacks import (
    ActivationMarginRegularizer,
    ForgettingMonitor,
    LoRAInterpolator,
    ReplayDistillation,
    ReplayMixer,
    RLSRouterFitter,
)
from lightning_cl.metrics import TaskMatrix
from lightning_cl.replay import EpisodicMemory, GeneralSamples, SelfGenerated
from lightning_cl.report import plots, tables

TASKS = ["topics", "reviews", "sarcasm", "tweets"]
# Rows of each task. On two CPU cores a row of training costs about as much as two of evaluation.
TRAIN_ROWS, PROBE_ROWS = 160, 16
TEST_ROWS = {"cpu": 50, "gpu": 200}
EPOCHS, BATCH_SIZE, LR = 2, 16, 1e-3
MODEL = ASSETS / "smollm2-135m-instruct"


def general(**kwargs: Any) -> GeneralSamples:
    """News articles that no task and no probe contains."""
    return GeneralSamples(str(ASSETS / "general.jsonl"), num_samples=200, max_tokens=96, **kwargs)


# What each method adds to the plain Trainer.
METHODS: dict[str, Any] = {
    "plain": lambda: [],
    "replay": lambda: [ReplayMixer(EpisodicMemory(capacity=200))],
    "margin": lambda: [ReplayMixer(general()), ActivationMarginRegularizer(weight="dynamic")],
    "distillation": lambda: [
        ReplayMixer(SelfGenerated(pool_size=64, length=64)),
        ReplayDistillation(weight=3.0),
    ],
    "interpolation": lambda: [ReplayMixer(EpisodicMemory(capacity=200)), LoRAInterpolator()],
    "router": lambda: [RLSRouterFitter(expansion_dim=1024)],
}


def make_stream(seed: int, test_rows: int) -> TaskStream:
    """Four tasks of real text, and held-out news as a probe of general ability."""
    tasks = [
        Task(name, train=head(name, "train", TRAIN_ROWS), test=head(name, "test", test_rows), metric="accuracy")
        for name in TASKS
    ]
    articles = [{"text": " ".join(row["text"].split()[:80])} for row in head("news", "test", PROBE_ROWS)]
    tasks.append(Task("news", test=articles, role="probe", metric="loss"))
    return TaskStream(tasks, BATCH_SIZE, eval_batch_size=50, seed=seed, max_length=160, template="none")


def head(name: str, split: str, count: int) -> list[dict[str, Any]]:
    """The first rows of a task's file."""
    from lightning_cl.data import read_rows

    return list(read_rows(str(ASSETS / f"{name}.{split}.jsonl")))[:count]


def run(method: str, seed: int, device: str, out: Path) -> tuple[TaskMatrix, float]:
    """One method over the whole stream; gives its task matrix and the seconds it took."""
    pl.seed_everything(seed, verbose=False)
    model = CausalLMModule(
        str(MODEL),
        lora={"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
        lr=LR,
        schedule="linear",
        warmup=0.1,
        # Adapters are trained in float32; few CPUs multiply bfloat16 faster than float32.
        dtype="float32",
    )
    monitor = ForgettingMonitor("test_accuracy", dirpath=str(out / method), print_table=False)
    trainer = pl.Trainer(
        accelerator=device,
        devices=1,
        precision="32-true" if device == "cpu" else "bf16-mixed",
        max_epochs=EPOCHS,
        callbacks=[*METHODS[method](), monitor],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=5,
        default_root_dir=str(out / method),
    )
    start = time.perf_counter()
    matrix = fit_stream(trainer, model, make_stream(seed, TEST_ROWS[device]))
    assert matrix is not None
    return matrix, time.perf_counter() - start


def quiet() -> None:
    """Leave the demo's own lines, its progress bars and its tables."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "transformers", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main() -> None:
    """Run the methods one after the other and compare them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", default="plain,replay", help=f"comma-separated: {', '.join(METHODS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    arguments = parser.parse_args()
    quiet()
    methods = arguments.methods.split(",")
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        parser.error(f"unknown methods {unknown}; choose from {', '.join(METHODS)}")
    minutes = 6 * len(methods) if arguments.device == "cpu" else len(methods)
    console = Console()
    where = "two CPU cores" if arguments.device == "cpu" else "one GPU"
    console.print(
        f"SmolLM2-135M learns {len(TASKS)} tasks in sequence ({', '.join(TASKS)}), {TRAIN_ROWS} rows each, two epochs;"
        f" {TEST_ROWS[arguments.device]} test rows a task, {PROBE_ROWS} news articles as a probe."
        f" Methods: {', '.join(methods)}. This takes about {minutes} minutes on {where}."
    )
    matrices: dict[str, TaskMatrix] = {}
    for method in methods:
        console.rule(method)
        matrices[method], seconds = run(method, arguments.seed, arguments.device, arguments.out)
        console.print(
            tables.matrix_table(matrices[method], title=f"{method}: accuracy and intervals ({seconds:.0f} s)")
        )
        plots.heat_map(matrices[method], title=method).savefig(arguments.out / f"{method}.heat_map.png", dpi=120)
        plots.curves(matrices[method], title=method).savefig(arguments.out / f"{method}.curves.png", dpi=120)
    console.print(tables.summary_table(matrices))
    plots.side_by_side(matrices).savefig(arguments.out / "side_by_side.png", dpi=120)
    console.print(f"Plots, JSON and CSV: {arguments.out}")


if __name__ == "__main__":
    main()
