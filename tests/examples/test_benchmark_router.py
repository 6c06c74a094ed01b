# SPDX-License-Identifier: Apache-2.0
"""The router benchmark runs end to end, and its ways of taking the instruction out do so."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.report.runs import matrix, write_run

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
    assert {"command", "hardware", "torch", "commit"} <= figures.keys()
    assert "| as_given | 100.0 100.0 |" in capsys.readouterr().out


def test_streams_of_the_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    tasks = ["red", "green", "blue"]
    for seed, shift in enumerate((0.0, 0.1)):
        routing = {
            "accuracy": {"0": 1.0, "10": 0.9 + shift, "2": 0.5},
            "scores": {
                "oracle": dict.fromkeys(tasks, 0.5 + shift),
                "base": {**dict.fromkeys(tasks, 0.25), "quiz": 1.0},
            },
        }
        for method in ("routed", "sequential", "memory"):
            more = {"routing": routing} if method == "routed" else {}
            comparison = {"method": method, "order": "three", "tasks": tasks, "seed": seed}
            write_run(tmp_path / method / f"seed_{seed}", shift=shift, comparison=comparison, **more)
    table = runpy.run_path(str(FOLDER / "router_tasks.py"))["stream_table"](tmp_path)
    averages = [matrix(shift).compute()["average"] * 100 for shift in (0.0, 0.1)]
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in table.splitlines() if line[:2] == "| "}
    assert list(rows)[2:] == ["sequential", "routed", "oracle", "base"]  # and not what no table of the router shows
    assert rows["sequential"] == rows["routed"]
    assert rows["routed"][0].startswith(f"{sum(averages) / 2:.1f} ± ")
    assert rows["oracle"] == ["55.0 ± 63.5", "0 by construction", "-", "2 |"]  # t(0.975, 1) * 10 / 2
    assert rows["base"][0] == "25.0 ± 0.0"
    assert "Routing accuracy after the last task: 95.0 ± 63.5 %." in table


@pytest.fixture(scope="module")
def ways() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
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
