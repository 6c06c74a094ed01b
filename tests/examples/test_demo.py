# SPDX-License-Identifier: Apache-2.0
"""The demo from end to end, on a tiny model and made-up rows, with what it leaves behind."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.models import tiny_llama, tiny_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("the_demo", EXAMPLES / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for index, task in enumerate(module.TASKS):
        words = [f"word {number} of {index}" for number in range(12)]
        rows = [
            {"prompt": text, "answer": "yes" if len(text) % 2 else "no", "options": ["yes", "no"]} for text in words
        ]
        for split in ("train", "test"):
            (tmp_path / f"{task}.{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "news.test.jsonl").write_text('{"text": "It rained."}\n' * 2)
    tiny_llama(max_position_embeddings=256).save_pretrained(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 256
    tokenizer.save_pretrained(tmp_path / "model")
    settings = {"ASSETS": tmp_path, "MODEL": tmp_path / "model", "TRAIN_ROWS": 8, "TEST_ROWS": {"cpu": 6}, "EPOCHS": 1}
    for name, value in settings.items():
        monkeypatch.setattr(module, name, value)
    return module


def test_it_compares_two_runs(
    demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(out)])
    monkeypatch.setattr(demo, "quiet", lambda: None)  # it would silence the tests that follow
    demo.main()
    shown = capsys.readouterr().out
    assert "This takes about" in shown
    assert "6 test rows a task" in shown
    assert "backward transfer" in shown.lower()
    for run in ("plain", "replay"):
        document = json.loads((out / run / "task_matrix.json").read_text())
        assert "scores" in json.dumps(document)
        with (out / run / "task_matrix.csv").open() as file:
            assert len(list(csv.reader(file))) > 5
        assert (out / f"{run}.heat_map.png").stat().st_size > 5_000
        assert (out / f"{run}.curves.png").stat().st_size > 5_000
    assert (out / "side_by_side.png").stat().st_size > 5_000


def test_an_unknown_method_is_answered_with_the_known_ones(
    demo: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["demo.py", "--methods", "magic"])
    monkeypatch.setattr(demo, "quiet", lambda: None)
    with pytest.raises(SystemExit):
        demo.main()
    assert "unknown methods ['magic']; choose from plain, replay" in capsys.readouterr().err
