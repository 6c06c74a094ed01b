# SPDX-License-Identifier: Apache-2.0
"""The margin benchmark runs end to end, and its two sides are the same method."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import lightning.pytorch  # noqa: F401 - changes the environment when it is first imported
import pytest


@pytest.mark.slow
def test_tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples" / "benchmark")
    out = tmp_path / "margin.json"
    assert importlib.import_module("margin").main(["--tiny", "--out", str(out)]) == 0
    figures = json.loads(out.read_text())
    (released,), (overhead,), (collect,) = (figures[name] for name in ("released", "overhead", "collect"))
    assert released["speed_up"] > 0
    assert released["store_ratio"] > 10
    assert overhead["time_ratio"] > 0
    assert collect["collect_seconds"] > 0
    assert {"command", "hardware", "versions", "commit"} <= figures.keys()
    assert "speed_up" in capsys.readouterr().out
