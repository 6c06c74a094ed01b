# SPDX-License-Identifier: Apache-2.0
"""The package as its users get it: the wheel, the import, the public names."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _call(command: list[str], cwd: Path | None = None, path: Path | None = None) -> str:
    environment = os.environ if path is None else {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def _run(code: str, cwd: Path, path: Path) -> str:
    return _call([sys.executable, "-c", code], cwd, path)


def test_importing_costs_next_to_nothing(tmp_path: Path) -> None:
    """No transformers, peft or bitsandbytes beyond what `import lightning.pytorch` loads, and at most 0.2 s."""
    # Processor time: other processes on the machine take none of it.
    code = (
        "import sys, time, lightning.pytorch; before = set(sys.modules); start = time.process_time();"
        "import lightning_cl; seconds = time.process_time() - start;"
        "new = set(sys.modules) - before;"
        "heavy = {m.split('.')[0] for m in new} & {'transformers', 'peft', 'bitsandbytes', 'datasets', 'matplotlib'};"
        "print(sorted(heavy), seconds)"
    )
    heavy, seconds = _run(code, tmp_path, ROOT).split("]")
    assert heavy == "["
    assert float(seconds) < 0.2


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel, installed into an empty folder."""
    folder = tmp_path_factory.mktemp("wheel")
    # A copy, so that building leaves nothing in the working tree.
    source = folder / "source"
    source.mkdir()
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split("\n")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    _call([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(source)])
    wheels = [str(path) for path in folder.glob("*.whl")]
    _call([*pip, "install", "--no-deps", "--no-index", "--target", str(folder / "installed"), *wheels])
    return folder / "installed"


def test_the_wheel_passes_the_tests_of_the_public_names_from_elsewhere(wheel: Path, tmp_path: Path) -> None:
    found = _run("import lightning_cl; print(lightning_cl.__file__)", tmp_path, wheel)
    assert found.startswith(str(wheel))
    shutil.copy(ROOT / "tests" / "test_public_api.py", tmp_path)
    (tmp_path / "pytest.ini").touch()  # not the repository's settings, which put the clone on the path
    done = _call([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"], cwd=tmp_path, path=wheel)
    assert re.search(r"\d+ passed", done), done


def test_the_console_script_of_the_wheel_starts(wheel: Path, tmp_path: Path) -> None:
    script = next(path for path in (wheel / "bin").iterdir() if path.name == "lightning-cl")
    listed = _call([sys.executable, str(script), "callbacks", "list"], cwd=tmp_path, path=wheel)
    assert "replay_mixer" in listed


def test_the_wheel_carries_the_catalogue(wheel: Path, tmp_path: Path) -> None:
    fragments = {path.name for path in (ROOT / "callbacks").iterdir()}
    assert {path.name for path in (wheel / "lightning_cl" / "_catalogue").iterdir()} == fragments
    code = "from lightning_cl.cli import main; main(['callbacks', 'show', 'replay_mixer'])"
    assert "lightning_cl.callbacks.ReplayMixer" in _run(code, tmp_path, wheel)


def test_the_repository_names_no_machine() -> None:
    """No file names a path of a development machine or a package registry's host."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    pattern = re.compile("/" + r"work/|" + "/" + r"root/|files\.pythonhosted|pypi\.org/simple")
    for name in files:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".yaml", ".txt", ".sh", ".html", "") and path.is_file():
            assert not pattern.search(path.read_text(errors="replace")), name


def test_the_repository_holds_no_symlink() -> None:
    """Windows checks them out as text files."""
    listed = subprocess.run(["git", "ls-files", "--stage"], cwd=ROOT, capture_output=True, text=True).stdout
    assert listed
    assert not [line for line in listed.splitlines() if line.startswith("120000")]
