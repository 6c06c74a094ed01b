# SPDX-License-Identifier: Apache-2.0
"""Tables, plots and result files show the numbers that the matrix holds."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import pytest

from lightning_cl.metrics import TaskMatrix
from lightning_cl.report import curves, display, heat_map, results, run_tables, side_by_side, summary_table
from lightning_cl.report.tables import as_text
from tests.report.runs import LOSSES, SCORES, TASKS, matrix


def test_matrix_table_shows_scores_rows_and_intervals() -> None:
    text = as_text(run_tables(matrix()), width=200)
    for row in SCORES.values():
        for value in row:
            assert f" {100 * value:.1f} " in text
    assert "3.250" in text
    assert text.count("200 rows") == 3
    assert "50 rows" in text
    low, high = matrix().score(2, "red").interval
    assert f"[{100 * low:.1f}, {100 * high:.1f}]" in text
    assert "news (probe)" in text
    assert "loss, lower is better" in text


def test_summary_shows_figures_reasons_and_flipped_signs() -> None:
    text = as_text(summary_table({"plain": matrix(0.1), "replay": matrix()}), width=220)
    line = next(line for line in text.splitlines() if "backward transfer" in line)
    assert "-25.0 [" in line
    assert "-15.0 [" in line
    assert "general change: news" in text
    assert "-0.250" in text
    assert "none: no reference scores were given (`reference`)" in text
    assert "Signs are flipped for news (lower is better)" in text


@pytest.mark.parametrize(
    ("metric", "values", "share"),
    [
        ("accuracy", (0.2, 1.0), True),
        ("val/token_f1", (0.2, 1.0), True),
        ("accuracy", (20.0, 100.0), False),
        ("loss", (0.2, 0.9), False),
        ("", (0.2, 0.9), True),
        ("", (0.2, 1.9), False),
    ],
)
def test_shares_are_shown_in_points(metric: str, values: tuple[float, ...], share: bool) -> None:
    made = TaskMatrix(["a"], metrics={"a": metric} if metric else None)
    for stage, value in enumerate(values, -1):
        made.update(stage, "a", value)
    assert display.is_share(made, "a") is share
    assert display.figure_scale(made) == (100.0 if share else 1.0)


def test_numbers() -> None:
    assert display.number(-0.0001, 100, sign=True) == "0.0"
    assert display.number(math.nan) == "nan"
    assert display.number(123.456) == "123.5"
    assert display.interval(None) == ""
    assert display.ramp(0.0) == "#f7fafd"
    assert display.ramp(2.0) == display.ramp(1.0) == "#08306b"


def test_shades_follow_the_direction_of_the_metric() -> None:
    shades = display.shades(matrix())
    assert shades[1, "green"] == 1.0
    assert shades[-1, "red"] == 0.0
    # The probe's lowest loss is its best, on a scale of its own.
    assert shades[-1, "news"] == 1.0
    assert shades[2, "news"] == 0.0


def test_heat_map_draws_every_cell() -> None:
    figure = heat_map(matrix())
    texts = [text.get_text() for text in figure.axes[0].texts]
    for row in SCORES.values():
        for value in row:
            assert f"{100 * value:.1f}" in texts
    assert {f"{loss:.3f}" for loss in LOSSES.values()} <= set(texts)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [
        "before",
        "after red",
        "after green",
        "after blue",
    ]
    figure.savefig(io.BytesIO())


def test_curves_have_a_panel_per_kind_of_metric_and_the_right_points() -> None:
    figure = curves(matrix())
    shares, losses = figure.axes
    lines = {line.get_label(): line for line in shares.get_lines() if not line.get_label().startswith("_")}
    assert list(lines) == TASKS
    assert list(lines["green"].get_ydata()) == pytest.approx([20, 25, 95, 85])
    assert list(losses.get_lines()[0].get_ydata()) == pytest.approx(list(LOSSES.values()))
    figure.savefig(io.BytesIO())


def test_side_by_side_has_a_panel_per_task_and_a_line_per_run() -> None:
    figure = side_by_side({"plain": matrix(0.1), "replay": matrix()})
    assert [axes.get_title() for axes in figure.axes] == ["red", "green", "blue", "news (probe)"]
    plain, replay = figure.axes[0].get_lines()[:2]
    assert list(plain.get_ydata()) == pytest.approx([10, 90, 70, 60])
    assert list(replay.get_ydata()) == pytest.approx([10, 90, 80, 70])
    figure.savefig(io.BytesIO())


def test_many_tasks_are_drawn_without_numbers() -> None:
    made = TaskMatrix()
    for stage in range(-1, 25):
        for task in range(25):
            made.update(stage, f"t{task}", 0.5 + task / 100)
    figure = heat_map(made)
    assert not figure.axes[0].texts
    assert len(figure.axes[0].images) == 1
    figure.savefig(io.BytesIO())
    curves(made).savefig(io.BytesIO())


def test_plots_leave_matplotlibs_global_state_alone() -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    heat_map(matrix())
    curves(matrix())
    assert plt.get_fignums() == before


def test_files_hold_the_matrix(tmp_path: Path) -> None:
    made = matrix()
    made.update(0, "blue", math.nan)
    files = results.write(tmp_path, made, {"seed": 3}, figures={"": heat_map(made)})
    assert [file.name for file in files] == ["task_matrix.json", "task_matrix.csv", "task_matrix.png"]
    saved = json.loads((tmp_path / "task_matrix.json").read_text())
    assert saved["seed"] == 3
    assert saved["figures"]["backward_transfer"] == pytest.approx(-0.15)
    assert saved["figure_intervals"]["backward_transfer"] is not None
    assert saved["after_stage"]["1"]["average"] == pytest.approx((0.8 + 0.95) / 2)
    again = TaskMatrix.from_dict(saved["matrix"])
    assert again.compute() == made.compute()
    assert math.isnan(again.score(0, "blue").value)
    assert again.score(2, "red").interval == pytest.approx(made.score(2, "red").interval)
    cells = {(int(c["stage"]), c["task"]): c for c in csv.DictReader((tmp_path / "task_matrix.csv").open())}
    assert float(cells[1, "green"]["value"]) == 0.95
    assert cells[1, "green"]["rows"] == "200"
    assert float(cells[1, "green"]["low"]) == pytest.approx(made.score(1, "green").interval[0])
    assert cells[2, "news"]["mode"] == "min"
