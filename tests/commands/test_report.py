# SPDX-License-Identifier: Apache-2.0
"""``lightning-cl report`` as it is called."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_cl.commands.report import main
from tests.report.runs import write_run


def test_page_and_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "plain", shift=0.1)
    write_run(tmp_path / "replay")
    paths = [str(tmp_path / name) for name in ("plain", "replay")]
    assert main([*paths, "--markdown", str(tmp_path / "summary.md"), "--title", "Two <runs>"]) == 0
    text = (tmp_path / "plain" / "report.html").read_text()
    assert "<title>Two &lt;runs&gt;</title>" in text
    markdown = (tmp_path / "summary.md").read_text()
    rows = [line for line in markdown.splitlines() if line.startswith("| backward transfer")]
    assert len(rows) == 1
    assert "-25.0 [" in rows[0]
    assert "-15.0 [" in rows[0]
    assert "| test rows | 200 | 200 | 200 | 50 |" in markdown
    assert "none (no reference scores were given (`reference`))" in markdown
    assert "Wrote" in capsys.readouterr().err
    assert main([paths[0], "--markdown", "-", "--out", str(tmp_path / "x.html")]) == 0
    assert "### Forgetting report" in capsys.readouterr().out
    assert (tmp_path / "x.html").is_file()


@pytest.mark.parametrize(
    ("threshold", "code", "said"),
    [
        (["--fail-below", "bwt=-20"], 0, "backward_transfer -15 is at least -20"),
        (["--fail-below", "bwt=-2"], 1, "backward_transfer -15 is below -2: FAILED"),
        (
            ["--fail-below", "bwt=-15.5", "--fail-above", "forgetting=14"],
            1,
            "forgetting 15 is above 14: FAILED",
        ),
        (["--fail-above", "forgetting=16"], 0, "forgetting 15 is at most 16"),
        (["--fail-below", "general_change/news=-0.2"], 1, "general_change/news -0.25 is below -0.2: FAILED"),
        (["--fail-below", "acc=80", "--fail-below", "la=90"], 0, "learning_accuracy 91.67 is at least 90"),
        (["--fail-below", "intransigence=0"], 2, "intransigence is undefined (no reference scores were given"),
    ],
)
def test_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], threshold: list[str], code: int, said: str
) -> None:
    write_run(tmp_path)
    assert main([str(tmp_path), *threshold]) == code
    assert said in capsys.readouterr().err
    # The page is written whatever the threshold says.
    assert (tmp_path / "report.html").is_file()


def test_external(tmp_path: Path) -> None:
    write_run(tmp_path)
    for name, score in (("before", 0.5), ("after", 0.4)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"quiz": score}))
    given = ["--external", f"-1:{tmp_path / 'before.json'}", "--external", str(tmp_path / "after.json")]
    # argparse takes a value that begins with a minus sign only after an equals sign.
    given = [f"{option}={value}" for option, value in zip(given[::2], given[1::2], strict=True)]
    assert main([str(tmp_path), *given, "--fail-below", "general_change/quiz=-5"]) == 1
    assert "quiz (probe)" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothere"], "nothere does not exist"),
        (["empty"], "this run had no monitor"),
        (["cut"], "is cut short or damaged"),
        (["early"], "zero finished runs"),
        (["good", "--fail-below", "bwt"], "is no FIGURE=NUMBER"),
        (["good", "--fail-below", "bwt=low"], "is no FIGURE=NUMBER"),
        (["good", "--fail-above", "kindness=1"], "has no figure 'kindness'. It has average"),
        (["good", "--external", "nothere.json"], "there is no such file"),
        (["good", "--out", "good/task_matrix.json/x.html"], "good/task_matrix.json/"),
    ],
)
def test_bad_input_gives_one_error_and_code_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    from lightning_cl.metrics import TaskMatrix
    from lightning_cl.report import results

    monkeypatch.chdir(tmp_path)
    write_run(Path("good"))
    Path("empty").mkdir()
    cut = write_run(Path("cut")) / "task_matrix.json"
    cut.write_text(cut.read_text()[:100])
    results.write(Path("early"), TaskMatrix(["a"]), {})
    assert main(arguments) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("lightning-cl report: ")
    assert said in errors[0]
    assert not Path("good/report.html").exists()


def test_mixed_hardware_is_shown_and_not_averaged(tmp_path: Path) -> None:
    from tests.report.runs import PROVENANCE

    write_run(tmp_path / "a")
    write_run(tmp_path / "b", provenance={**PROVENANCE, "hardware": "1 x H100"})
    assert main([str(tmp_path), "--markdown", str(tmp_path / "s.md")]) == 0
    assert "nothing is averaged: hardware: CPU, 2 cores (a); 1 x H100 (b)" in (tmp_path / "s.md").read_text()


def test_it_is_a_subcommand(tmp_path: Path) -> None:
    write_run(tmp_path)
    command = [sys.executable, "-m", "lightning_cl", "report", str(tmp_path), "--fail-below", "bwt=-2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=dict(os.environ))
    assert done.returncode == 1, done.stderr
    assert "is below -2: FAILED" in done.stderr
