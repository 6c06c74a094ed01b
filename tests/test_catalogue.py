# SPDX-License-Identifier: Apache-2.0
"""Every fragment and card of the catalogue, found by globbing it: a new file is tested by existing."""

from __future__ import annotations

import importlib
import re
import runpy
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel

import lightning_cl.callbacks

ROOT = Path(__file__).parent.parent
FRAGMENTS = sorted((ROOT / "callbacks").glob("*.yaml"))
CARDS = sorted(path for path in (ROOT / "callbacks").glob("*.md") if path.name != "README.md")


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower().replace("lo_ra", "lora")


def test_every_callback_has_a_fragment_and_a_card() -> None:
    names = {_snake(name) for name in lightning_cl.callbacks.__all__ if name != "ContinualCallback"}
    assert {path.stem for path in FRAGMENTS} == names
    assert {path.stem for path in CARDS} == names


def test_the_folder_holds_no_python() -> None:
    assert not list((ROOT / "callbacks").rglob("*.py"))


@pytest.mark.parametrize("path", FRAGMENTS, ids=lambda p: p.stem)
def test_fragment_parses_in_a_stock_cli_and_round_trips(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Full class paths: a LightningCLI that knows nothing of this package builds the callback and prints it back."""
    base = tmp_path / "base.yaml"
    base.write_text("trainer:\n  callbacks:\n  - class_path: lightning.pytorch.callbacks.RichModelSummary\n")
    arguments = ["--config", str(base), "--config", str(path)]
    with pytest.raises(SystemExit) as stopped:
        LightningCLI(BoringModel, run=False, args=[*arguments, "--print_config"])
    assert not stopped.value.code
    printed = capsys.readouterr().out
    callbacks = yaml.safe_load(printed)["trainer"]["callbacks"]
    fragment = yaml.safe_load(path.read_text())["trainer"]["callbacks+"]
    assert [entry["class_path"] for entry in callbacks[-len(fragment) :]] == [e["class_path"] for e in fragment]
    again = tmp_path / "again.yaml"
    again.write_text(printed)
    cli = LightningCLI(BoringModel, run=False, args=["--config", str(again)], save_config_callback=None)
    built = {type(callback).__name__ for callback in cli.trainer.callbacks}
    assert {entry["class_path"].rpartition(".")[2] for entry in fragment} <= built


@pytest.mark.parametrize("path", CARDS, ids=lambda p: p.stem)
def test_card_opens_with_links_that_lead_somewhere(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    for target in re.findall(r"\]\(([^)]+)\)", first):
        assert (path.parent / target).resolve().is_file(), target
    module, name = re.search(r"`from (\S+) import (\w+)`", first).groups()  # type: ignore[union-attr]
    assert hasattr(importlib.import_module(module), name)
    assert "| argument |" in path.read_text()


@pytest.mark.parametrize("path", CARDS, ids=lambda p: p.stem)
def test_snippet_of_the_card_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snippet = re.search(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    assert snippet, "the card has no Python snippet"
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "snippet.py"
    script.write_text(snippet.group(1))
    runpy.run_path(str(script), run_name="__main__")
