# SPDX-License-Identifier: Apache-2.0
"""`lightning-cl callbacks`, from a clone, an editable install and a wheel, from another folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_cl.commands import callbacks

ROOT = Path(callbacks.__file__).resolve().parents[2]


@pytest.fixture
def small_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "catalogue"
    folder.mkdir()
    (folder / "replay_mixer.yaml").write_text("# Mixes replay rows in.\ntrainer: {callbacks+: []}\n")
    (folder / "rls_router_fitter.yaml").write_text("trainer: {callbacks+: []}\n")
    (folder / "rls_router_fitter.md").write_text("# RLSRouterFitter\n\n[links]\n\nFits a router. It is exact.\n")
    monkeypatch.setattr(callbacks, "catalogue", lambda: folder)
    return folder


def test_list_shows_each_with_a_sentence(small_catalogue: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert callbacks.main(["list"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "replay_mixer       Mixes replay rows in.",
        "rls_router_fitter  Fits a router.",
    ]


@pytest.mark.parametrize("name", ["rls_router_fitter", "RLSRouterFitter", "rls-router-fitter"])
def test_show_takes_either_name(small_catalogue: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert callbacks.main(["show", name.replace("-", "_")]) == 0
    out = capsys.readouterr().out
    assert "Fits a router." in out
    assert "# rls_router_fitter.yaml\ntrainer:" in out


def test_copy_brings_fragment_and_card_and_overwrites_nothing(
    small_catalogue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "mine"
    assert callbacks.main(["copy", "RLSRouterFitter", str(target)]) == 0
    assert {p.name for p in target.iterdir()} == {"rls_router_fitter.yaml", "rls_router_fitter.md"}
    (target / "rls_router_fitter.yaml").write_text("changed")
    assert callbacks.main(["copy", "RLSRouterFitter", str(target)]) == 1
    assert "exists already and may hold your changes" in capsys.readouterr().err
    assert (target / "rls_router_fitter.yaml").read_text() == "changed"


def test_an_unknown_name_is_answered_with_the_closest(
    small_catalogue: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callbacks.main(["show", "ReplayMixr"]) == 1
    error = capsys.readouterr().err
    assert "no callback is named 'ReplayMixr'. Did you mean replay_mixer?" in error
    assert "The catalogue has replay_mixer, rls_router_fitter." in error


def _list_from_elsewhere(python_path: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    code = "import sys; from lightning_cl.commands.callbacks import main; sys.exit(main(['list']))"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(python_path)},
        capture_output=True,
        text=True,
        timeout=200,
    )


def _put_package(target: Path) -> None:
    """The package as an installer would lay it out (links stand for the copies)."""
    package = target / "lightning_cl"
    package.mkdir(parents=True)
    for entry in (ROOT / "lightning_cl").iterdir():
        if entry.name not in ("_catalogue", "__pycache__"):
            os.symlink(entry, package / entry.name)
    # `__file__` must lie in the target: packages resolve their folder by the file they were loaded from.
    (package / "__init__.py").unlink()
    (package / "__init__.py").write_text((ROOT / "lightning_cl" / "__init__.py").read_text())


def test_it_is_found_in_a_clone_and_in_an_editable_install(tmp_path: Path) -> None:
    if not any((ROOT / "callbacks").glob("*.yaml")):
        pytest.skip("the catalogue beside the package is empty")
    # An editable install puts the clone's root on the path, as PYTHONPATH does.
    done = _list_from_elsewhere(ROOT, tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == sorted(
        path.stem for path in (ROOT / "callbacks").glob("*.yaml")
    )


def test_it_is_found_in_a_wheels_layout(tmp_path: Path) -> None:
    site = tmp_path / "site"
    _put_package(site)
    (site / "lightning_cl" / "_catalogue").mkdir()
    (site / "lightning_cl" / "_catalogue" / "only_here.yaml").write_text("# From the wheel.\n")
    done = _list_from_elsewhere(site, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["only_here", "From", "the", "wheel."]


def test_without_a_catalogue_the_places_are_named(tmp_path: Path) -> None:
    site = tmp_path / "site"
    _put_package(site)
    done = _list_from_elsewhere(site, tmp_path)
    assert done.returncode == 1
    assert "The catalogue is neither in" in done.stderr
