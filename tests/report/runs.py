# SPDX-License-Identifier: Apache-2.0
"""Task matrices and run folders whose numbers are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightning_cl.metrics import TaskMatrix
from lightning_cl.report import results

TASKS = ["red", "green", "blue"]
#: Accuracies before and after each stage, and the loss of a probe.
SCORES = {-1: (0.10, 0.20, 0.30), 0: (0.90, 0.25, 0.30), 1: (0.80, 0.95, 0.35), 2: (0.70, 0.85, 0.90)}
LOSSES = {-1: 3.0, 0: 3.1, 1: 3.2, 2: 3.25}
PROVENANCE = {
    "command": ["fit", "--x"],
    "commit": "c0ffee",
    "versions": {"torch": "2.13.0"},
    "hardware": "CPU, 2 cores",
}


def matrix(shift: float = 0.0, rows: int = 200) -> TaskMatrix:
    """Three tasks with per-row scores and one probe measured by its loss; ``shift`` lowers what was learnt earlier."""
    made = TaskMatrix(
        [*TASKS, "news"],
        roles={"news": "probe"},
        modes={"news": "min"},
        metrics={**dict.fromkeys(TASKS, "accuracy"), "news": "loss"},
    )
    for stage, row in SCORES.items():
        for index, (task, value) in enumerate(zip(TASKS, row, strict=True)):
            value = value - shift if index < stage else value
            made.update(stage, task, value, scores=(torch.arange(rows) < round(value * rows)).double())
        made.update(stage, "news", LOSSES[stage], rows=50)
    return made


def write_run(folder: Path, shift: float = 0.0, **parts: Any) -> Path:
    """A run's folder as the monitor leaves it."""
    more: dict[str, Any] = {
        "terms": {
            "train_loss": [[10, 2.0], [20, 1.5], [30, 1.25]],
            "cl/kl": [[10, 0.5], [20, 0.25], [30, 0.125]],
            "cl/kl_ratio": [[10, 0.25], [20, 0.2], [30, 0.1]],
        },
        "costs": {
            "-1": {"evaluation_seconds": 4.0},
            "0": {"prepare_seconds": 2.0, "train_seconds": 30.0, "evaluation_seconds": 4.0, "steps": 40.0},
            "1": {"prepare_seconds": 1.0, "train_seconds": 31.0, "evaluation_seconds": 4.5, "steps": 40.0},
        },
        "events": [],
        "provenance": PROVENANCE,
        "world_size": 1,
        "routing": None,
        **parts,
    }
    results.write(folder, matrix(shift), more)
    return folder
