# SPDX-License-Identifier: Apache-2.0
"""The comparison of the methods, small enough for tests."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.models import tiny_llama, tiny_tokenizer

FOLDER = Path(__file__).parents[2] / "examples" / "benchmark"


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("compare", "compare_data", "compare_graphs", "compare_run", "compare_table"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    # What the script sets for its children must not outlive the test.
    for name in ("PYTORCH_NVML_BASED_CUDA_CHECK", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "0")
    return importlib.import_module("compare")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Two tasks of a few rows, a probe of each kind, a model of two layers, and the methods that need no generation."""
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer(chat=False).save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for task, options in (("colour", ["red", "blue"]), ("taste", ["sweet", "sour"]), ("mood", ["glad", "sad"])):
        rows = [{"prompt": f"{task} {i}?", "answer": options[i % 2], "options": options} for i in range(8)]
        write_rows(tmp_path / "data" / f"{task}.train.jsonl", rows)
        # A row whose answer is none of its options cannot be scored and is left out.
        write_rows(tmp_path / "data" / f"{task}.test.jsonl", [{**rows[0], "answer": "-"}, *rows[:4]])
    write_rows(tmp_path / "news.jsonl", [{"text": "some words of news " * 2}] * 3)
    write_rows(tmp_path / "quiz.jsonl", [{"prompt": "Which?", "answer": "a", "options": ["a", "b"]}] * 3)
    standard = yaml.safe_load((FOLDER / "compare" / "standard.yaml").read_text())
    chosen = ("sequential", "multi-task", "memory", "i-lora")
    content = {
        **standard,
        "data": str(tmp_path / "data"),
        "model": str(tmp_path / "model"),
        "recipe": {
            **standard["recipe"],
            **{"train_rows": 8, "test_rows": 4, "epochs": 1, "batch_size": 2, "max_length": 64, "precision": "32-true"},
        },
        "orders": {"two": ["colour", "taste"], "tune": ["mood", "taste"]},
        "seeds": [0, 1],
        "groups": {"core": list(chosen), "tuned": ["sequential", "i-lora"]},
        "tune": {"order": "tune", "seeds": [9], "lr": [1e-3, 1e-2], "probes": ["news"]},
        "methods": {name: standard["methods"][name] for name in chosen},
        "probes": {
            "news": {"file": str(tmp_path / "news.jsonl"), "metric": "loss", "made_by": "a script"},
            "mmlu": {"file": str(tmp_path / "quiz.jsonl"), "metric": "accuracy", "made_by": "a script"},
        },
    }
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return tmp_path / "compare.yaml"
