# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of LoRAInterpolator run end to end."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import lightning.pytorch  # noqa: F401 - changes the environment when it is first imported
import pytest


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The scripts, which import their neighbours as scripts do."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples" / "benchmark")
    return importlib.import_module


@pytest.mark.slow
def test_tiny_run_writes_every_part(load: Any, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    assert load("interpolator").main(["--tiny", "--out", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert figures["average"]["bytes_a_parameter"] == 4.0
    assert {"lightning_ratio", "ours_ratio", "lightning_peak_gib"} <= figures["average"].keys()
    assert {"last_extra_over_must", "all_extra_over_must"} <= figures["consistency"].keys()


@pytest.mark.slow
def test_every_configuration_of_the_ablation_runs_once(
    load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ablation = load("interpolator_ablation")
    for worker in ("0/2", "1/2"):
        assert ablation.main(["--tiny", "--runs", str(tmp_path), "--worker", worker]) == 0
    files = {path.name: path.read_text() for path in tmp_path.glob("*.json")}
    assert set(files) == {f"{name}-0.json" for name in ablation.CONFIGURATIONS}
    both = json.loads(files["fast-0.json"])
    assert both["slow"].keys() == both["trained"].keys() == set(ablation.FIGURES)
    table = capsys.readouterr().out.split("| configuration |")[-1]
    assert all(f"| {title} |" in table for _, _, title in ablation.TABLE)
    # What is there is not run again.
    assert ablation.main(["--tiny", "--runs", str(tmp_path)]) == 0
    assert {path.name: path.read_text() for path in tmp_path.glob("*.json")} == files


def test_the_ablation_needs_its_data(load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load("interpolator_ablation").main(["--runs", str(tmp_path)])
    assert "name the folder of the tasks with --data" in capsys.readouterr().err
