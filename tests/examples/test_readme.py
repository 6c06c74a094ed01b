# SPDX-License-Identifier: Apache-2.0
"""What the README shows is run as it stands there, on a tiny model and made-up rows."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_cl.cli import main
from lightning_cl.modules import CausalLMModule
from tests.helpers.models import tiny_llama, tiny_tokenizer, trainer

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def block(language: str, containing: str) -> str:
    """The one block of the README in this language that contains a text."""
    found = [text for text in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if containing in text]
    assert len(found) == 1, f"{len(found)} {language} blocks of the README contain {containing!r}"
    return found[0]


def commands(containing: str) -> list[list[str]]:
    """The commands of a shell block, each as its words, without comments."""
    lines = block("bash", containing).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture
def project() -> dict[str, Any]:
    """The module, the loaders and the names of an ordinary project: ``examples/plain_lightning.py``."""
    return runpy.run_path(str(ROOT / "examples" / "plain_lightning.py"))


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone whose model is tiny and whose texts are short; the working directory and ``sys.argv`` are a user's."""
    (tmp_path / "examples").mkdir()
    assets = tmp_path / "examples" / "assets"
    shutil.copy(ROOT / "examples" / "quickstart.yaml", tmp_path / "examples")
    shutil.copytree(ROOT / "callbacks", tmp_path / "callbacks")
    tiny_llama(max_position_embeddings=256).save_pretrained(assets / "smollm2-135m-instruct")
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 256
    tokenizer.save_pretrained(assets / "smollm2-135m-instruct")
    for path in [path for path in yaml_paths(tmp_path) if path.suffix == ".jsonl"]:
        rows = [{"prompt": f"{path.name} {i}?", "answer": "yn"[i % 2], "options": ["y", "n"]} for i in range(8)]
        path.write_text(
            "".join(json.dumps(row if "news" not in path.name else {"text": "Rain."}) + "\n" for row in rows)
        )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-cl"])
    return tmp_path


def yaml_paths(folder: Path) -> list[Path]:
    """Every file that the quickstart names."""
    text = (folder / "examples" / "quickstart.yaml").read_text()
    return [folder / name for name in sorted(set(re.findall(r"examples/assets/[\w.-]+", text)))]


def test_the_lines_for_an_ordinary_project(
    project: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tasks = [project["make_task"](seed) for seed in range(2)]
    names = {
        "pl": pl,
        "model": project["Classifier"](),
        "tasks": [train for train, _ in tasks],
        "val_loaders": [val for _, val in tasks],
    }
    exec(block("python", "pl.Trainer"), names)
    mixer, monitor = names["callbacks"]
    assert monitor.matrix.stages == [0, 1]
    assert monitor.matrix.compute()["backward_transfer"] is not None
    assert len(mixer.sources[0]) == 500  # of 768 rows


def test_the_same_in_the_configuration_of_a_stock_cli(
    project: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(block("yaml", "ReplayMixer"))
    train, val = project["make_task"](0)

    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return train

        def val_dataloader(self) -> Any:
            return val

    cli = LightningCLI(
        project["Classifier"],
        Data,
        args=["fit", "--config", "config.yaml", "--trainer.max_epochs=1", "--trainer.accelerator=cpu"],
        save_config_callback=None,
    )
    assert cli.trainer.global_step == len(train)
    assert {"ReplayMixer", "ForgettingMonitor"} <= {type(callback).__name__ for callback in cli.trainer.callbacks}


def test_the_lines_for_a_stream(clone: Path) -> None:
    rows = (clone / "examples" / "assets" / "topics.train.jsonl").read_text()
    for name in ("news.jsonl", "news.test.jsonl"):
        (clone / name).write_text(rows)
    code = block("python", "fit_stream")
    assert code.count(", ...]") == 1
    model = CausalLMModule(tiny_llama(), tokenizer=tiny_tokenizer(), lr=1e-2)
    names: dict[str, Any] = {"trainer": trainer(clone), "model": model}
    exec(code.replace(", ...]", "]"), names)
    assert names["matrix"].stages == [-1, 0]
    assert 0 <= names["matrix"].compute()["learning_accuracy"] <= 1


def test_the_command_line(clone: Path) -> None:
    assets, fit, again, report = commands("lightning-cl fit")
    assert (ROOT / assets[1]).is_file()
    assert not main(fit[1:])
    (run,) = (clone / "runs" / "quickstart").iterdir()
    # A task added next month: the same configuration with one more task, in another folder.
    config = yaml.safe_load((clone / "examples" / "quickstart.yaml").read_text())
    tasks = config["data"]["init_args"]["tasks"]
    tasks.append({**tasks[0], "name": "added"})
    (clone / "next.yaml").write_text(yaml.safe_dump(config))
    assert again[-2:] == ["--config", "..."]
    assert not main([str(run) if word == "RUN_DIR" else word for word in again[1:-1]] + ["next.yaml", *fit[4:]])
    added = next(path for path in (clone / "runs" / "quickstart").iterdir() if path != run)
    assert not main([str(added) if word == "RUN_DIR" else word for word in report[1:]])
    assert "added" in (added / "report.html").read_text()


def test_the_install_lines_keep_the_torch_that_is_there(tmp_path: Path) -> None:
    keep, install = block("bash", "pip install").splitlines()
    subprocess.run(keep.replace("python", shlex.quote(sys.executable), 1), shell=True, cwd=tmp_path, check=True)
    assert (tmp_path / "constraints.txt").read_text().strip() == f"torch=={torch.__version__}"
    assert install.startswith("pip install -c constraints.txt ")


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_two_commands_are_targets() -> None:
    for words in commands("make demo"):
        done = subprocess.run([*words, "--dry-run", "VENV=none"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert {"demo": "examples/demo.py", "test": "-m pytest"}[words[1]] in done.stdout
