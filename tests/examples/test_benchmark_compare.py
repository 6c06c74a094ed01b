# SPDX-License-Identifier: Apache-2.0
"""The comparison runs end to end on a tiny model, resumes, and builds its tables from whatever is there."""

from __future__ import annotations

import fcntl
import json
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import yaml

from lightning_cl.commands.report import main as report
from lightning_cl.report import results
from tests.report.runs import matrix, write_run


def one_run(config: Path, out: Path) -> list[str]:
    """The command for a single run of ``sequential``."""
    return ["run", "--config", str(config), "--out", str(out), "--methods", "sequential", "--seeds", "0"]


def test_runs_tables_and_reports(
    compare: Any, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    arguments = ["--config", str(config), "--out", str(out)]
    assert compare.main(["run", *arguments, "--seeds", "0"]) == 0
    assert compare.main(["run", *arguments, "--methods", "sequential", "--seeds", "1"]) == 0
    files = sorted(out.rglob("task_matrix.json"))
    assert len(files) == 5
    result = json.loads((out / "two" / "memory" / "seed_0" / "task_matrix.json").read_text())
    found = result["comparison"]
    assert found["tasks"] == ["colour", "taste"]
    assert found["cost"]["steps"] == 2 * 4
    assert found["cost"]["peak_memory_bytes"] is None  # no GPU here
    assert {"command", "commit", "versions", "hardware"} <= result["provenance"].keys()
    assert set(found["files"]) >= {"colour.train.jsonl", "taste.test.jsonl", "news.jsonl", "quiz.jsonl"}
    # The second task's batches are longer by the memory's rows: the tokens that a method adds are counted.
    plain = json.loads((out / "two" / "sequential" / "seed_0" / "task_matrix.json").read_text())["comparison"]
    assert found["cost"]["tokens"] > plain["cost"]["tokens"] > 0
    assert found["cost"]["disk_bytes"] > plain["cost"]["disk_bytes"]
    # What the tables need is evaluated, and no more: a task from its own stage on, probes at both ends.
    cells = {(cell["stage"], cell["task"]) for cell in result["matrix"]["scores"]}
    ends = {(stage, probe) for stage in (-1, 1) for probe in ("news", "mmlu")}
    assert cells == {(0, "colour"), (1, "colour"), (1, "taste"), *ends}

    # What is there is not run again.
    times = [file.stat().st_mtime_ns for file in files]
    capsys.readouterr()
    assert compare.main(["run", *arguments, "--seeds", "0"]) == 0
    assert "4 of 4 runs are there already" in capsys.readouterr().out
    assert [file.stat().st_mtime_ns for file in files] == times

    assert compare.main(["cost", *arguments, "--steps", "6", "--rounds", "2"]) == 0
    assert sorted(folder.name for folder in (out / "cost").iterdir()) == ["round_0", "round_1"]
    capsys.readouterr()
    assert compare.main(["table", str(out), "--config", str(config)]) == 0
    text = capsys.readouterr().out
    lines = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in text.splitlines() if line.startswith("|")}
    assert list(lines)[2:] == ["sequential", "multi-task", "memory", "i-lora"]
    assert lines["sequential"][8] == "1.00x"
    assert "±" in lines["sequential"][1]
    assert lines["sequential"][-1] == "2 |"
    assert lines["multi-task"][2] == "-"  # one training on all tasks forgets nothing that could be measured
    assert float(lines["memory"][8].rstrip("x")) > 0
    assert "Not run: two: multi-task (seed 1), memory (seed 1), i-lora (seed 1)." in text

    # The same files are ordinary runs of the report.
    assert report([str(out / "two"), "--out", str(tmp_path / "page.html")]) == 0
    assert "memory/seed_0" in (tmp_path / "page.html").read_text()

    # Equal time: a method that costs more a step takes fewer of them.
    assert compare.main(["run", *arguments, "--seeds", "0", "--methods", "memory", "--budget", "time"]) == 0
    timed = json.loads((out / "equal-time" / "two" / "memory" / "seed_0" / "task_matrix.json").read_text())
    assert timed["comparison"]["budget"].endswith(" steps")
    assert compare.main(["table", str(out), "--config", str(config)]) == 0
    text = capsys.readouterr().out.split("(equal time)")[1].split("###")[0]
    lines = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in text.splitlines() if line.startswith("|")}
    assert list(lines)[2:] == ["sequential", "memory"]
    assert "-" not in {lines["memory"][column].strip() for column in (8, 9)}  # wall time and tokens against it
    # Sequential training is what the others are compared with: asked for, it is not run again.
    assert compare.main(["run", *arguments, "--seeds", "0", "--methods", "sequential", "--budget", "time"]) == 0
    assert "Nothing to run: the time of sequential training" in capsys.readouterr().out
    assert not (out / "equal-time" / "two" / "sequential").exists()


def write_cost(folder: Path, method: str, step: float, fixed: float, stages: int = 2, once: float = 0.0) -> None:
    """Three rounds of the cost pass: so many seconds a step, and in each task before and once within them.

    The first round was on a host that was idle, the third on one that was busy.
    """
    for number, slower in enumerate((0.5, 1.0, 7.0)):
        one = {
            "prepare_seconds": slower * fixed,
            "finish_seconds": 0.0,
            "train_seconds": slower * (10 * step + once),
            "steps": 10,
            "step_seconds": slower * step,
        }
        document = {"comparison": {"method": method}, "costs": {str(stage): one for stage in range(stages)}}
        results.write(folder / "cost" / f"round_{number}" / "two" / method / "seed_0", matrix(), document)


def test_steps_of_equal_time(compare: Any, tmp_path: Path) -> None:
    write_cost(tmp_path, "sequential", 0.125, 0.0)
    write_cost(tmp_path, "dear", 0.25, 0.0)
    write_cost(tmp_path, "slow-start", 0.125, 1.25)
    write_cost(tmp_path, "compiles", 0.125, 0.0, once=1.25)
    write_cost(tmp_path, "cheap", 0.0625, 0.0)
    write_cost(tmp_path, "hopeless", 0.125, 100.0)
    write_cost(tmp_path, "at-once", 0.125, 1.25, stages=1)
    config: dict[str, Any] = {
        "methods": {name: {} for name in ("sequential", "dear", "slow-start", "compiles", "cheap", "hopeless")}
    }
    config["methods"]["at-once"] = {"joint": True}

    def steps(own: list[int]) -> dict[str, int]:
        return compare.compare_table.steps_of_equal_time(tmp_path, config, config["methods"], own)

    whole = {"sequential": 40, "cheap": 40, "hopeless": 1}  # never more than a task's own, and at least one
    # A pass of an earlier version, which did not tell a task's steps apart, does not count.
    old = {"comparison": {"method": "cheap"}, "costs": {"0": {"train_seconds": 9.0, "steps": 1}}}
    results.write(tmp_path / "cost" / "two" / "cheap" / "seed_0", matrix(), old)
    # What a task does once is not for each step; of the first task's own, a process's start is not told apart.
    assert steps([40] * 5) == {**whole, "dear": 20, "slow-start": 30, "compiles": 32, "at-once": 190}
    # A short task gives its time to the others: 96 steps in all, 48 of the dear one's.
    assert steps([40, 40, 16]) == {**whole, "dear": 16, "slow-start": 25, "compiles": 30, "at-once": 86}


class Slow(pl.Callback):
    """Works for a while before a task's first step."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 and trainer.current_epoch == 0:
            time.sleep(0.5)


def test_what_is_done_before_the_first_step_is_preparation(
    compare: Any, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["compare_run"], "build", lambda *args: [Slow()])
    assert compare.main(one_run(config, tmp_path / "o")) == 0
    costs = json.loads((tmp_path / "o" / "two" / "sequential" / "seed_0" / "task_matrix.json").read_text())["costs"]
    for stage in ("0", "1"):
        assert costs[stage]["prepare_seconds"] > 0.5
        assert costs[stage]["train_seconds"] < 0.5
        assert 0 < costs[stage]["step_seconds"] * costs[stage]["steps"] < 0.5


def test_tuning_says_what_it_chose(
    compare: Any, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main(["tune", "--config", str(config), "--out", str(tmp_path / "tune"), "--methods", "i-lora"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| i-lora")]
    tried = [json.loads(row.split(" | ")[1].removesuffix(" **chosen**")) for row in rows]
    winner = next(settings for settings, row in zip(tried, rows, strict=True) if "**chosen**" in row)
    assert yaml.safe_load((tmp_path / "tune" / "chosen.yaml").read_text()) == {"i-lora": winner}
    # One setting at a time around the method's own: two rates, three decays, two weights, of which one of each is its own.
    assert len(tried) == 1 + 1 + 2 + 1
    assert {"lr": 0.01, "decay": 0.99, "consistency": 1.0} in tried
    assert sum("**chosen**" in row for row in rows) == 1


def test_chosen_settings_reach_the_methods_that_were_not_tuned(compare: Any, config: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(config.read_text())
    interpolator = content["methods"]["i-lora"]["callbacks"]
    content["methods"]["alike"] = {"tuned_as": "i-lora", "callbacks": interpolator, "settings": {"consistency": 0.0}}
    content["methods"]["plain"] = {"tuned_as": "i-lora"}
    config.write_text(yaml.safe_dump(content, sort_keys=False))
    (tmp_path / "chosen.yaml").write_text("i-lora: {lr: 0.5, decay: 0.9, consistency: 2.0}\n")
    methods = compare.read_config(config, settings=tmp_path / "chosen.yaml")["methods"]
    assert methods["i-lora"]["settings"] == {"lr": 0.5, "decay": 0.9, "consistency": 2.0}
    assert methods["alike"]["settings"] == {"lr": 0.5, "decay": 0.9, "consistency": 0.0}  # its own comes first
    assert methods["plain"]["settings"] == {"lr": 0.5}  # it has no use for the others
    (tmp_path / "chosen.yaml").write_text("magic: {lr: 0.5}\n")
    with pytest.raises(SystemExit, match="there is no method 'magic' in"):
        compare.read_config(config, settings=tmp_path / "chosen.yaml")
    with pytest.raises(SystemExit, match=r"--settings .*nothere.yaml"):
        compare.read_config(config, settings=tmp_path / "nothere.yaml")


def test_a_run_that_another_process_is_at_is_left_to_it(compare: Any, config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "o" / "two" / "sequential" / "seed_0"
    folder.mkdir(parents=True)
    arguments = one_run(config, tmp_path / "o")
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert compare.main(arguments) == 0
        assert not (folder / "task_matrix.json").exists()
    assert compare.main(arguments) == 0
    assert (folder / "task_matrix.json").is_file()


def fabricated(folder: Path, compare: Any, seed: int, shift: float, **made_by: Any) -> None:
    """A whole result with known figures."""
    comparison = {
        "method": "memory",
        "order": "three",
        "tasks": ["red", "green", "blue"],
        "seed": seed,
        "settings": {},
        "recipe": {"epochs": 2},
        "budget": "epochs",
        "files": {},
        "cost": {"tokens": 100, "generated_tokens": 0, "peak_memory_bytes": None, "disk_bytes": 2_500_000, "steps": 9},
    }
    provenance = {"hardware": "1 x A", "versions": {"torch": "2"}, "commit": "c0ffee11", **made_by}
    write_run(folder / f"run_{seed}", shift=shift, comparison=comparison, provenance=provenance)


def rows_of(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| memory")]


def test_means_and_intervals_over_seeds(compare: Any, config: Path, tmp_path: Path) -> None:
    for seed, shift in enumerate((0.0, 0.05, 0.1)):
        fabricated(tmp_path / "r", compare, seed, shift)
    values = [matrix(shift).compute()["average"] * 100 for shift in (0.0, 0.05, 0.1)]
    text = compare.compare_table.document(tmp_path / "r", compare.read_config(config), None)
    (row,) = rows_of(text)
    # t(0.975, 2) * s / sqrt(3), with s the standard deviation of three evenly spaced values.
    half = 4.303 * (values[0] - values[2]) / 2 / 3**0.5
    assert row[1] == f"{values[1]:.1f} ± {half:.1f}"
    assert row[5] == "+0.250 ± 0.000"  # 3.0 before, 3.25 after: the sign of the loss itself
    assert row[-1] == "3"
    assert row[-2] == "2.5 MB"


def test_other_machines_and_versions_are_never_averaged(compare: Any, config: Path, tmp_path: Path) -> None:
    fabricated(tmp_path / "r", compare, 0, 0.0)
    fabricated(tmp_path / "r", compare, 1, 0.1, hardware="1 x B")
    fabricated(tmp_path / "r", compare, 2, 0.1, versions={"torch": "3"})
    text = compare.compare_table.document(tmp_path / "r", compare.read_config(config), None)
    assert "several versions or machines: each has tables of its own, none is averaged" in text
    assert [row[-1] for row in rows_of(text)] == ["1", "1", "1"]
    assert "1 x B; torch 2; recipe" in text
    assert "commit c0ffee1." in text


def test_a_switch_that_is_off_is_as_if_it_were_not_there(compare: Any, config: Path, tmp_path: Path) -> None:
    for seed, recipe in enumerate(({"epochs": 2}, {"epochs": 2, "graphs": False}, {"epochs": 2, "graphs": True})):
        fabricated(tmp_path / "r", compare, seed, 0.0)
        file = tmp_path / "r" / f"run_{seed}" / "task_matrix.json"
        document = json.loads(file.read_text())
        document["comparison"]["recipe"] = document["comparison"]["settings"] = recipe
        file.write_text(json.dumps(document))
    text = compare.compare_table.document(tmp_path / "r", compare.read_config(config), None)
    assert sorted(row[-1] for row in rows_of(text)) == ["1", "2"]


def test_a_result_of_changed_files_says_so(compare: Any, config: Path, tmp_path: Path) -> None:
    fabricated(tmp_path / "r", compare, 0, 0.0, commit="c0ffee11-dirty")
    assert "commit c0ffee1-dirty." in compare.compare_table.document(tmp_path / "r", compare.read_config(config), None)


def test_other_settings_of_a_method_have_a_line_of_their_own(compare: Any, config: Path, tmp_path: Path) -> None:
    fabricated(tmp_path / "r", compare, 0, 0.0)
    fabricated(tmp_path / "r", compare, 1, 0.1)
    file = tmp_path / "r" / "run_1" / "task_matrix.json"
    content = json.loads(file.read_text())
    content["comparison"]["settings"] = {"lr": 0.1}
    file.write_text(json.dumps(content))
    names = [
        row[0] for row in rows_of(compare.compare_table.document(tmp_path / "r", compare.read_config(config), None))
    ]
    assert len(names) == 2
    assert any("memory (lr 0.1)" in name for name in names)


def test_half_written_and_foreign_files_are_listed(compare: Any, config: Path, tmp_path: Path) -> None:
    fabricated(tmp_path / "r", compare, 0, 0.0)
    fabricated(tmp_path / "r", compare, 1, 0.0)
    file = tmp_path / "r" / "run_1" / "task_matrix.json"
    file.write_text(file.read_text()[:200])
    write_run(tmp_path / "r" / "other")
    text = compare.compare_table.document(tmp_path / "r", compare.read_config(config), None)
    assert [row[-1] for row in rows_of(text)] == ["1"]
    assert "run_1/task_matrix.json is cut short or damaged" in text
    assert "other/task_matrix.json is no result of compare.py" in text


def test_a_half_written_result_is_run_again(compare: Any, config: Path, tmp_path: Path) -> None:
    arguments = one_run(config, tmp_path / "o")
    assert compare.main(arguments) == 0
    file = tmp_path / "o" / "two" / "sequential" / "seed_0" / "task_matrix.json"
    whole = json.loads(file.read_text())["figures"]
    file.write_text(file.read_text()[:300])
    assert compare.main(arguments) == 0
    # The same seed, the same run: also to the last digit.
    assert json.loads(file.read_text())["figures"] == whole


def test_a_run_that_fails_stops_no_other(
    compare: Any, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = yaml.safe_load(config.read_text())
    content["methods"]["memory"]["callbacks"][0]["init_args"]["rows_per_batch"] = 0
    config.write_text(yaml.safe_dump(content, sort_keys=False))
    out = tmp_path / "o"
    arguments = ["--config", str(config), "--out", str(out), "--seeds", "0", "--methods", "memory,sequential"]
    assert compare.main(["run", *arguments]) == 1
    assert "two memory seed 0: failed" in capsys.readouterr().out
    assert "must be at least 1" in (out / "two" / "memory" / "seed_0" / "error.txt").read_text()
    assert (out / "two" / "sequential" / "seed_0" / "task_matrix.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--methods", "magic"], r"--methods \['magic'\]: unknown. There are sequential"),
        (["run", "--orders", "three"], r"--orders \['three'\]: unknown. There are two, tune"),
        (["run", "--data", "nowhere"], r"no colour.train.jsonl\[.gz\] in 'nowhere'. Give the folder"),
        (["cost", "--rounds", "0"], r"--rounds 0: costs are measured at least once. Give 1 or more"),
        (["run", "--budget", "time"], r"`--budget time` needs the costs of .*'sequential'.* Run `compare.py cost"),
    ],
)
def test_what_cannot_run_is_said_at_once(
    compare: Any, config: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit, match=said):
        compare.main([*arguments, "--config", str(config), "--out", str(tmp_path / "o")])


def test_a_missing_probe_names_the_script_that_makes_it(compare: Any, config: Path, tmp_path: Path) -> None:
    (tmp_path / "quiz.jsonl").unlink()
    with pytest.raises(SystemExit, match=r"The probe 'mmlu' needs .*quiz.jsonl. Run `python a script` first"):
        compare.main(["run", "--config", str(config), "--out", str(tmp_path / "o")])


def test_zero_runs(compare: Any, config: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"nothere does not exist. Give the folder"):
        compare.main(["table", str(tmp_path / "nothere"), "--config", str(config)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"zero finished runs in .*empty. Wait for the first"):
        compare.main(["table", str(tmp_path / "empty"), "--config", str(config)])


def test_tables_go_between_the_marks(compare: Any, config: Path, tmp_path: Path) -> None:
    for seed in range(2):
        fabricated(tmp_path / "r", compare, seed, 0.0)
    page = tmp_path / "RESULTS.md"
    marks = compare.compare_table.BEGIN, compare.compare_table.END
    page.write_text(f"# Results\n\n{marks[0]}\nold\n{marks[1]}\n\nThe end.\n")
    arguments = ["table", str(tmp_path / "r"), "--config", str(config), "--results", str(page)]
    assert compare.main(arguments) == 0
    assert compare.main(arguments) == 0
    text = page.read_text()
    assert text.startswith("# Results\n\n")
    assert text.endswith("\n\nThe end.\n")
    assert "old" not in text
    assert text.count("### three: red, green, blue") == 1
    assert (tmp_path / "results_three.png").stat().st_size > 10_000
    page.write_text("# Results\n")
    with pytest.raises(SystemExit, match="has no place for the tables"):
        compare.main(arguments)


def test_every_method_of_the_standard_can_be_built(compare: Any) -> None:
    standard = compare.read_config(compare.STANDARD, data="x")
    assert set(standard["groups"]["core"]) <= standard["methods"].keys()
    for name, spec in standard["methods"].items():
        callbacks = sys.modules["compare_run"].build(spec.get("callbacks", []), spec["settings"])
        assert len(callbacks) == len(spec.get("callbacks", [])), name
    assert all(len(set(order)) == len(order) for order in standard["orders"].values())
    assert standard["tune"]["order"] in standard["orders"]
    assert not set(standard["tune"]["seeds"]) & set(standard["seeds"])


def test_questions_become_choices(compare: Any) -> None:
    question = "Which?\n\nA. one\nB. two \nC. three\nD. four\nAnswer:"
    lines = [json.dumps({"question": question, "answer": "B"}).encode()]
    twice = json.dumps({"question": question.replace("three", "one"), "answer": "A"}).encode()
    (row,) = compare.compare_data.mmlu_rows([*lines, twice])
    assert row == {"prompt": "Question: Which?\nAnswer:", "answer": "two", "options": ["one", "two", "three", "four"]}
    with pytest.raises(SystemExit, match="A question of another form"):
        compare.compare_data.mmlu_rows([json.dumps({"question": "Why?", "answer": "A"}).encode()])


def test_sequential_training_beside_equal_time_has_no_table_of_its_own(
    compare: Any, config: Path, tmp_path: Path
) -> None:
    for folder, method in (("r/seq", "sequential"), ("r/equal-time", "memory")):
        fabricated(tmp_path / folder, compare, 0, 0.0)
        file = tmp_path / folder / "run_0" / "task_matrix.json"
        file.write_text(file.read_text().replace('"method": "memory"', f'"method": "{method}"'))
    text = compare.compare_table.document(tmp_path / "r", compare.read_config(config), None)
    assert text.count("###") == 1
    assert "three: " not in text.split("Not run:")[-1]
    assert [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")][2:] == [
        "| sequential",
        "| memory",
    ]


def test_the_committed_runs_give_the_tables_of_the_report(compare: Any, tmp_path: Path) -> None:
    folder = Path(compare.__file__).parent
    with tarfile.open(folder / "results_h200.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    page = tmp_path / "RESULTS.md"
    page.write_text((folder / "RESULTS.md").read_text(encoding="utf8"), encoding="utf8")
    assert compare.main(["table", str(tmp_path / "compare"), "--results", str(page)]) == 0
    assert page.read_text(encoding="utf8") == (folder / "RESULTS.md").read_text(encoding="utf8")
