# SPDX-License-Identifier: Apache-2.0
"""Reading results back, and one clear error for each way in which they can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_cl.report.run import ReportError, add_external, differences, find_runs, load_run
from tests.report.runs import PROVENANCE, matrix, write_run


def test_a_run_is_read_back_whole(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "seed0")
    (folder / "config.yaml").write_text("seed_everything: 0\n")
    run = load_run(folder)
    assert run.name == "seed0"
    assert run.matrix.compute() == matrix().compute()
    assert run.config == "seed_everything: 0\n"
    assert run.costs[0]["train_seconds"] == 30.0
    assert run.terms["cl/kl"][-1] == [30, 0.125]
    assert run.disk_bytes > 1000
    assert load_run(folder / "task_matrix.json").name == "seed0"
    assert load_run(write_run(tmp_path / "replay" / "version_3")).name == "replay/version_3"


def test_a_folder_of_runs(tmp_path: Path) -> None:
    for name in ("plain/seed0", "plain/seed1", "replay/seed0"):
        write_run(tmp_path / name)
    runs, problems = find_runs([tmp_path])
    assert [run.name for run in runs] == ["plain/seed0", "plain/seed1", "replay/seed0"]
    assert problems == []
    runs, _ = find_runs([tmp_path / "plain" / "seed0", tmp_path / "replay" / "seed0"])
    assert [run.name for run in runs] == ["plain/seed0", "replay/seed0"]
    runs, _ = find_runs([tmp_path / "plain" / "seed0"] * 2)
    assert len({run.name for run in runs}) == 2


def test_broken_runs_below_a_folder_are_listed_and_the_others_shown(tmp_path: Path) -> None:
    write_run(tmp_path / "good")
    cut = write_run(tmp_path / "cut") / "task_matrix.json"
    cut.write_text(cut.read_text()[:300])
    runs, problems = find_runs([tmp_path])
    assert [run.name for run in runs] == ["good"]
    assert len(problems) == 1
    assert "cut short or damaged" in problems[0]


def test_differences_between_origins() -> None:
    class Made:
        def __init__(self, name: str, **made: object) -> None:
            self.name, self.made_by = name, {**PROVENANCE, **made}

    assert differences([Made("a"), Made("b")]) == []
    assert differences([Made("a"), Made("b", commit=None)]) == ["commit: c0ffee (a); unknown (b)"]
    found = differences([Made("a"), Made("b", versions={"torch": "2.11.0", "peft": "0.18"})])
    assert found == ["torch: 2.13.0 (a); 2.11.0 (b)", "peft: unknown (a); 0.18 (b)"]


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"nothere does not exist\. Give the folder of a run"):
        load_run(tmp_path / "nothere")


def test_run_without_monitor(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step\n1\n")
    with pytest.raises(
        ReportError, match=r"holds no task_matrix\.json \(there is: metrics\.csv\), so .* had no monitor"
    ):
        find_runs([tmp_path])


def test_half_written_json(tmp_path: Path) -> None:
    file = write_run(tmp_path) / "task_matrix.json"
    file.write_text(file.read_text()[:-200])
    with pytest.raises(ReportError, match=r"is cut short or damaged: .* at line \d+, column \d+\. Delete it"):
        load_run(tmp_path)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ReportError, match="is no JSON text"):
        load_run(tmp_path)


@pytest.mark.parametrize("content", [{"format": 99}, {"format": 1}, [1, 2], {}])
def test_other_formats(tmp_path: Path, content: object) -> None:
    (tmp_path / "task_matrix.json").write_text(json.dumps(content))
    with pytest.raises(ReportError, match="this version reads format 1"):
        load_run(tmp_path)


def test_matrix_with_missing_parts(tmp_path: Path) -> None:
    file = write_run(tmp_path) / "task_matrix.json"
    document = json.loads(file.read_text())
    del document["matrix"]["roles"]
    file.write_text(json.dumps(document))
    with pytest.raises(ReportError, match="holds no valid task matrix"):
        load_run(tmp_path)


def test_zero_finished_runs(tmp_path: Path) -> None:
    from lightning_cl.metrics import TaskMatrix
    from lightning_cl.report import results

    results.write(tmp_path / "early", TaskMatrix(["a"]), {})
    with pytest.raises(ReportError, match=r"zero finished runs: .*early: no stage is finished yet"):
        find_runs([tmp_path])


# ------------------------------------------------------------------------------- external scores

HARNESS = {
    "results": {
        "arc_easy": {"alias": "arc_easy", "acc,none": 0.41, "acc_stderr,none": 0.01, "acc_norm,none": 0.43},
        "lambada": {"perplexity,none": 25.0, "perplexity_stderr,none": 0.5},
        "gsm8k": {"exact_match,strict-match": 0.02},
    },
    "higher_is_better": {"arc_easy": {"acc": True, "acc_norm": True}, "lambada": {"perplexity": False}},
    "n-samples": {"arc_easy": {"original": 2376, "effective": 100}},
}


def test_external_scores_of_the_harness_become_probes(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path))
    before, after = json.loads(json.dumps(HARNESS)), json.loads(json.dumps(HARNESS))
    after["results"]["arc_easy"]["acc,none"] = 0.38
    after["results"]["lambada"]["perplexity,none"] = 28.0
    (tmp_path / "before.json").write_text(json.dumps(before))
    (tmp_path / "after.json").write_text(json.dumps(after))
    six = {name: value for name, value in run.matrix.compute().items() if name != "general_change"}
    add_external(run, tmp_path / "before.json", -1)
    names = add_external(run, tmp_path / "after.json")
    assert names == ["arc_easy/acc", "arc_easy/acc_norm", "lambada/perplexity", "gsm8k/exact_match,strict-match"]
    figures = run.matrix.compute()
    assert figures["general_change"]["arc_easy/acc"] == pytest.approx(-0.03)
    assert figures["general_change"]["lambada/perplexity"] == pytest.approx(-3.0)
    assert {name: value for name, value in figures.items() if name != "general_change"} == six
    assert run.matrix.score(2, "arc_easy/acc").rows == 100


def test_external_plain_scores(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path))
    (tmp_path / "x.json").write_text(json.dumps({"quiz": {"-1": 0.5, "2": 0.4}, "web_loss": 3.1}))
    assert add_external(run, tmp_path / "x.json") == ["quiz", "web_loss"]
    assert run.matrix.compute()["general_change"]["quiz"] == pytest.approx(-0.1)
    assert run.matrix.mode_of("web_loss") == "min"
    assert run.matrix.compute()["general_change"]["web_loss"] is None


@pytest.mark.parametrize(
    ("content", "stage", "message"),
    [
        ('{"results": {"a"', None, "is cut short or no JSON"),
        ('{"results": {}}', None, "holds no scores"),
        ("[]", None, "holds no scores"),
        ('{"red": 0.5}', None, "'red', which is a training task"),
        ('{"quiz": 0.5}', 7, r"has the stages \[-1, 0, 1, 2\]"),
        ('{"quiz": {"9": 0.5}}', None, "stage 9 of 'quiz' is none of the run's stages"),
    ],
)
def test_bad_external_scores(tmp_path: Path, content: str, stage: int | None, message: str) -> None:
    run = load_run(write_run(tmp_path))
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ReportError, match=message):
        add_external(run, tmp_path / "x.json", stage)
    with pytest.raises(ReportError, match="there is no such file"):
        add_external(run, tmp_path / "y.json")
