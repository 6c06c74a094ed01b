# SPDX-License-Identifier: Apache-2.0
"""The command line: streams by `fit`, plain LightningCLI otherwise, and configurations that would go wrong refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cl import cli as cli_module
from lightning_cl.cli import ContinualCLI, double_callback, fragment_problem, main

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    # LightningCLI warns when it is given arguments while the process has some too: here those are pytest's.
    monkeypatch.setattr(sys, "argv", ["lightning-cl"])


def points(seed: int, rows: int = 8) -> dict[str, Any]:
    return {"class_path": "tests.test_cli.Points", "init_args": {"seed": seed, "rows": rows}}


class Points(torch.utils.data.Dataset):
    def __init__(self, seed: int, rows: int = 8) -> None:
        from tests.stream_tools import points as make

        self._rows = make(seed, rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        return self._rows[index]


def config(folder: Path, count: int = 2, **trainer: Any) -> Path:
    tasks = [{"name": f"t{i}", "train": points(i), "test": points(i + 20)} for i in range(count)]
    content = {
        "seed_everything": 3,
        "model": {"class_path": "tests.stream_tools.Scored"},
        "data": {"class_path": "lightning_cl.TaskStream", "init_args": {"tasks": tasks, "batch_size": 4}},
        "trainer": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(folder / "run"),
            "callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}],
            **trainer,
        },
    }
    path = folder / f"config_{count}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def fragment(folder: Path, name: str = "stopping", callback: str = "tests.stream_tools.Hooks") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"callbacks+": [{"class_path": callback}]}}))
    return path


def run(*args: Any) -> ContinualCLI:
    return ContinualCLI(args=[str(arg) for arg in args])


def test_fit_runs_the_whole_stream(tmp_path: Path) -> None:
    cli = run("fit", "--config", config(tmp_path), "--config", fragment(tmp_path))
    assert cli.matrix.stages == [-1, 0, 1]
    assert [type(c).__name__ for c in cli.trainer.callbacks].count("Hooks") == 1
    assert {p.name for p in (tmp_path / "run").glob("task_*")} == {"task_0_t0", "task_1_t1"}


def test_fit_is_lightnings_own_with_other_data(tmp_path: Path) -> None:
    plain = tmp_path / "plain.yaml"
    plain.write_text(
        yaml.safe_dump(
            {
                "model": {"class_path": "lightning.pytorch.demos.boring_classes.BoringModel"},
                "data": {"class_path": "lightning.pytorch.demos.boring_classes.BoringDataModule"},
                "trainer": {"max_steps": 2, "accelerator": "cpu", "default_root_dir": str(tmp_path), "logger": False},
            }
        )
    )
    cli = run("fit", "--config", plain)
    assert cli.matrix is None
    assert cli.trainer.global_step == 2
    assert run("validate", "--config", plain).trainer.state.finished
    with pytest.raises(MisconfigurationException, match="goes on with a stream of tasks, but the data is"):
        run("fit", "--config", plain, "--continue-from", tmp_path)


def test_the_printed_configuration_reads_back_as_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def printed(*configs: Path) -> str:
        with pytest.raises(SystemExit) as stop:
            run("fit", *(part for path in configs for part in ("--config", path)), "--print_config")
        assert stop.value.code == 0
        return capsys.readouterr().out

    first = printed(config(tmp_path), fragment(tmp_path))
    again = tmp_path / "printed.yaml"
    again.write_text(first)
    assert printed(again) == first
    assert "Hooks" in first
    assert run("fit", "--config", again).matrix.stages == [-1, 0, 1]


def test_a_fragment_before_a_base_that_sets_callbacks_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, extra = config(tmp_path), fragment(tmp_path)
    for args, late in (
        (["--config", extra, "--config", base], base),
        ([f"--config={extra}", f"--config={base}"], base),
        (["--trainer.callbacks+=tests.stream_tools.Hooks", "--config", base], base),
        (["--config", base, "--config", extra, "--trainer.callbacks=tests.stream_tools.Hooks"], "--trainer.callbacks"),
    ):
        with pytest.raises(SystemExit):
            run("fit", *args)
        error = capsys.readouterr().err
        assert f"{late} sets `trainer.callbacks` after" in error
        assert "would silently drop what was appended" in error
    # A base that leaves the callbacks alone may come later.
    quiet = tmp_path / "quiet.yaml"
    quiet.write_text("trainer: {max_epochs: 1}")
    assert fragment_problem(["fit", "--config", str(base), "--config", str(extra), "--config", str(quiet)]) is None


def test_a_callback_given_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = config(tmp_path)
    extra = fragment(tmp_path)
    with pytest.raises(SystemExit):
        run("fit", "--config", base, "--config", extra, "--config", extra)
    assert f"the configuration {extra} is given twice" in capsys.readouterr().err
    ours = [fragment(tmp_path, name, "lightning_cl.callbacks.ContinualCallback") for name in ("one", "two")]
    with pytest.raises(SystemExit):
        run("fit", "--config", base, "--config", ours[0], "--config", ours[1])
    assert "the callback `ContinualCallback` is given 2 times" in capsys.readouterr().err
    # Two of one class with different arguments are two callbacks.
    mixer = "lightning_cl.callbacks.ReplayMixer"
    several = {
        "subcommand": None,
        "trainer.callbacks": [{"class_path": mixer, "init_args": {"ratio": r}} for r in (0.1, 0.2)],
    }
    assert double_callback(several) is None


def test_tasks_are_added_in_a_new_run(tmp_path: Path) -> None:
    whole = run("fit", "--config", config(tmp_path, 4), "--trainer.default_root_dir", tmp_path / "whole")
    run("fit", "--config", config(tmp_path, 2))
    added = run(
        "fit",
        "--config",
        config(tmp_path, 4),
        "--continue-from",
        tmp_path / "run",
        "--trainer.default_root_dir",
        tmp_path / "added",
    )
    assert added.matrix.stages == [-1, 0, 1, 2, 3]
    for ours, theirs in zip(added.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_continue_from_says_what_is_wrong_with_the_folder(tmp_path: Path) -> None:
    base = config(tmp_path)
    with pytest.raises(MisconfigurationException, match="there is no such folder"):
        run("fit", "--config", base, "--continue-from", tmp_path / "none")
    with pytest.raises(MisconfigurationException, match="holds no whole checkpoint of a stream"):
        run("fit", "--config", base, "--continue-from", tmp_path)
    with pytest.raises(MisconfigurationException, match="both say where to begin"):
        run("fit", "--config", base, "--continue-from", tmp_path, "--ckpt_path", "last")


def test_a_saved_configuration_lets_a_resume_pass(tmp_path: Path) -> None:
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(tmp_path), "version": 0},
    }
    base = config(tmp_path, logger=logger)
    folder = tmp_path / "lightning_logs" / "version_0"
    run("fit", "--config", base)
    run("fit", "--config", base)
    assert [p.name for p in sorted(folder.glob("config*.yaml"))] == ["config.yaml"]
    run("fit", "--config", base, "--ckpt_path", "last")
    run("fit", "--config", base, "--ckpt_path", "last")
    assert [p.name for p in sorted(folder.glob("config*.yaml"))] == ["config.yaml", "config_1.yaml"]
    assert yaml.safe_load((folder / "config_1.yaml").read_text())["ckpt_path"] == "last"


def test_own_commands_are_dispatched_before_lightningcli(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Module:
        @staticmethod
        def main(argv: list[str]) -> int:
            asked.append(argv)
            return 3

    def load(name: str) -> Any:
        asked.append(name)
        return Module

    monkeypatch.setattr(cli_module.importlib, "import_module", load)
    assert main(["generate-replay", "--out", "x"]) == 3
    assert asked == ["lightning_cl.commands.generate_replay", ["--out", "x"]]


def test_the_help_names_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in (*cli_module.COMMANDS, "fit", "validate", "test", "predict"):
        assert name in text


def test_python_dash_m_is_the_same(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lightning_cl", "fit", "--config", str(config(tmp_path)), "--trainer.max_epochs=1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "task_1_t1" / "row.json").is_file()


def test_the_quickstart_parses_and_names_classes_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "examples" / "quickstart.yaml"
    with pytest.raises(SystemExit) as stop:
        run("fit", "--config", path, "--print_config")
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert len(printed["data"]["init_args"]["tasks"]) == 4
    for task in printed["data"]["init_args"]["tasks"]:
        assert str(task["test"]).startswith("examples/assets/")
