# SPDX-License-Identifier: Apache-2.0
"""The margin benchmark runs end to end, and its two sides are the same method."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest


@pytest.mark.slow
def test_tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "benchmark" / "margin.py"))
    monkeypatch.chdir(tmp_path)
    assert script["main"](["--tiny", "--out", "margin.json"]) == 0
    figures = json.loads((tmp_path / "margin.json").read_text())
    (released,), (overhead,), (collect,) = (figures[name] for name in ("released", "overhead", "collect"))
    assert released["ours_steps_per_second"] > 0
    assert released["store_ratio"] > 10
    assert overhead["time_ratio"] > 0
    assert collect["collect_seconds"] > 0
    assert {"command", "hardware", "torch", "commit"} <= figures.keys()
    assert "speed_up" in capsys.readouterr().out
