# SPDX-License-Identifier: Apache-2.0
"""The benchmark of LoRAInterpolator runs end to end."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmark" / "interpolator.py"


def _load() -> Any:
    spec = importlib.util.spec_from_file_location("benchmark_interpolator", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_tiny_run_writes_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark, out = _load(), tmp_path / "figures.json"
    assert benchmark.main(["--tiny", "--out", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert figures["average"]["bytes_a_parameter"] == 4.0
    assert {"lightning_ratio", "ours_ratio", "lightning_peak_gib"} <= figures["average"].keys()
    assert {"last_extra_over_must", "all_extra_over_must"} <= figures["consistency"].keys()
    assert set(figures["ablation"]["summary"]) == set(benchmark.CONFIGURATIONS)
    assert figures["ablation"]["summary"]["I-LoRA (defaults)"]["seeds"] == 1
    assert "| configuration | average | BWT | learning accuracy | seeds |" in capsys.readouterr().out
    # A second call takes the finished runs from the file.
    before = figures["ablation"]["runs"]
    assert benchmark.main(["--tiny", "--only", "ablation", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["ablation"]["runs"] == before


def test_the_ablation_needs_its_data(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _load().main(["--only", "ablation"])
    assert "the ablation needs --data" in capsys.readouterr().err
