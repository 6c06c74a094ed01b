# SPDX-License-Identifier: Apache-2.0
"""The router benchmark runs end to end, and its ways of taking the instruction out do so."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "benchmark"


@pytest.mark.slow
def test_tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(FOLDER / "router.py"))
    monkeypatch.chdir(tmp_path)
    assert script["main"](["--tiny", "--out", "router.json"]) == 0
    figures = json.loads((tmp_path / "router.json").read_text())
    assert figures["overhead"]["tiny"]["passes"] == {"first": 1, "last": 1}
    assert figures["overhead"]["tiny"]["adapters_used"] > 1
    assert figures["routing"]["as_given"]["accuracy_by_stage"] == [100.0, 100.0]
    assert set(figures["routed"]["side_by_side"]) == {"routed", "oracle", "base"}
    assert {"command", "hardware", "torch", "commit"} <= figures.keys()
    assert script["main"](["--join", "router.json", "router.json", "--out", "joined.json"]) == 0
    assert "| routed | 50.0 (50.0 to 50.0) |" in capsys.readouterr().out


@pytest.fixture(scope="module")
def ways() -> Any:
    return runpy.run_path(str(FOLDER / "router_tasks.py"))["WAYS"]


def test_instructions_are_taken_out(ways: Any) -> None:
    question = 'Whether the "first sentence" ... meaning? Choose one from the option.\nOption: False, True\n'
    prompt = f"{question}first sentence: Is it?\nsecond sentence: It is.\nAnswer:"
    assert ways["as_given"](prompt) == prompt
    assert ways["no_instruction"](prompt) == "first sentence: Is it?\nsecond sentence: It is."
    assert ways["bare_text"](prompt) == "Is it?\nIt is."
    assert ways["one_instruction"](prompt).endswith("first sentence: Is it?\nsecond sentence: It is.\nAnswer:")
    copa = 'Which sentence is the cause of "My "bad" day."? Choose one between A and B.\nA: Rain.\nB: Sun.\nAnswer:'
    assert ways["no_instruction"](copa) == 'My "bad" day.\nA: Rain.\nB: Sun.'
    assert ways["bare_text"](copa) == 'My "bad" day.\nRain.\nSun.'
