# SPDX-License-Identifier: Apache-2.0
"""The benchmarks that need a large GPU run end to end on a tiny shape and leave every figure that the README shows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmark"


def _figures(script: str, out: Path, *arguments: str) -> dict[str, Any]:
    """What a benchmark writes, with what it was measured on."""
    subprocess.run([sys.executable, str(BENCHMARKS / script), *arguments, "--out", str(out)], check=True)
    found = json.loads(out.read_text())
    assert {"command", "commit", "versions", "hardware"} <= found.keys()
    return found


def test_self_generated(tmp_path: Path) -> None:
    found = _figures("selfgenerated.py", tmp_path / "out.json", "--tiny")
    assert set(found["decode"]) == {"tiny", "tiny + LoRA"}
    assert all(found["cost"]["tiny"][rows]["ratio"] > 0 for rows in ("32+8", "32+4"))
    assert len(found["distillation"]) == 2


@pytest.mark.slow
def test_strategies_on_one_device(tmp_path: Path) -> None:
    sizes = ["--shape", "tiny", "--tokens", "16", "--steps", "2", "--warmup", "1"]
    found = _figures("strategies.py", tmp_path / "out.json", *sizes, "--strict")
    assert found["processes"] == 1
    speeds = [case for case in found["cases"] if "tokens_per_second_per_device" in case]
    assert len(speeds) >= 4
    assert all(case["step_ms"] > 0 for case in speeds)


@pytest.mark.slow
def test_resume(tmp_path: Path) -> None:
    found = _figures("resume.py", tmp_path / "out.json", "--tiny")
    assert all(found[mode]["stall_seconds"] > 0 for mode in ("blocking", "background"))
    assert all(seconds > 0 for seconds in found["resume_seconds"].values())
