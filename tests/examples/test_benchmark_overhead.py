# SPDX-License-Identifier: Apache-2.0
"""The overhead benchmark runs end to end and writes every figure with its target."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import lightning.pytorch  # noqa: F401 - changes the environment when it is first imported
import pytest


@pytest.mark.slow
def test_tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples" / "benchmark")
    out = tmp_path / "overhead.json"
    sizes = ["--repeats", "1", "--steps", "2", "--tasks", "4"]
    importlib.import_module("overhead").main(["--tiny", *sizes, "--out", str(out)])
    document = json.loads(out.read_text())
    assert {"command", "hardware", "versions", "commit"} <= document.keys()
    assert [target for _, _, target in document["figures"] if target] == [1.01, 1.275, 1.1, 1.03, 1.03, 50.0]
    assert all(value > 0 for _, value, _ in document["figures"])
    assert len(document["task_series_ms"]) == 4
    assert "target 1.010" in capsys.readouterr().out
