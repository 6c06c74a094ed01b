# SPDX-License-Identifier: Apache-2.0
"""A stream of many tasks with every callback on: memory of the process and open files by task, as JSON.

python tests/long_run.py FOLDER                       # 20 tasks of 100 steps
python tests/long_run.py FOLDER --setup router --tasks 5 --steps 20
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_cl import fit_stream
from tests.kill_worker import every_callback


class Usage(pl.Callback):
    """Resident memory in MB, open files and living objects, at the end of each task's training."""

    def __init__(self) -> None:
        self.megabytes: list[float] = []
        self.files: list[int] = []
        self.objects: list[int] = []
        self.steps = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.steps += 1

    def on_train_end(self, *args: Any) -> None:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.megabytes.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
        self.files.append(len(os.listdir("/proc/self/fd")))
        self.objects.append(len(gc.get_objects()))


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--setup", choices=["callbacks", "router"], default="callbacks")
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--steps", type=int, default=100, help="steps of a task")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, stream, callbacks = every_callback(args.setup == "router", args.tasks, 4 * args.steps)
    usage = Usage()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=CSVLogger(args.folder, name="", version=""),
        log_every_n_steps=10,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=args.folder,
        callbacks=[*callbacks, ModelCheckpoint(every_n_train_steps=25), usage],
    )
    fit_stream(trainer, model, stream)
    print(
        json.dumps({"steps": usage.steps, "megabytes": usage.megabytes, "files": usage.files, "objects": usage.objects})
    )


if __name__ == "__main__":
    main()
