# SPDX-License-Identifier: Apache-2.0
"""The recommended composition trains, on a tiny model, as its header says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from lightning_cl.cli import main
from tests.helpers.models import tiny_llama, tiny_tokenizer

RECOMMENDED = Path(__file__).parents[2] / "examples" / "recommended.yaml"


def test_it_trains_after_a_base_configuration(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer(chat=False).save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"row {i}?", "answer": "yn"[i % 2], "options": ["y", "n"]} for i in range(8)]
    tasks = [{"name": name, "train": rows, "test": rows, "metric": "accuracy"} for name in ("one", "two")]
    base: dict[str, Any] = {
        "model": {
            "class_path": "lightning_cl.CausalLMModule",
            "init_args": {"model": str(tmp_path / "model"), "lora": {"r": 2}, "lr": 1e-3},
        },
        "data": {"class_path": "lightning_cl.TaskStream", "init_args": {"batch_size": 4, "tasks": tasks}},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 2,
            "log_every_n_steps": 1,
            "default_root_dir": str(tmp_path / "run"),
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "callbacks": [],
        },
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    # The pool and its rows are made small, and nothing else is changed.
    text = RECOMMENDED.read_text().replace("pool_size: 320, length: 128", "pool_size: 8, length: 16")
    (tmp_path / "recommended.yaml").write_text(text)
    assert not main(["fit", "--config", str(tmp_path / "base.yaml"), "--config", str(tmp_path / "recommended.yaml")])
    results = json.loads(next((tmp_path / "run").rglob("task_matrix.json")).read_text())
    assert results["figures"]["average"] is not None
    assert {"cl/distillation", "cl/replay_rows"} <= results["terms"].keys()
