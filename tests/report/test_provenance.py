# SPDX-License-Identifier: Apache-2.0
"""Where a result comes from: the commit, and whether the files were the commit's."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from lightning_cl.report.provenance import provenance


def _commit() -> Any:
    return provenance.__wrapped__()["commit"]


def test_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert _commit() is None

    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=A", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    (tmp_path / "code.py").write_text("1\n")
    git("add", "code.py")
    git("commit", "--quiet", "--message", "First")
    git("tag", "--annotate", "v1", "--message", "a tag's name is no commit")
    assert _commit() == git("rev-parse", "HEAD")
    (tmp_path / "result.json").write_text("{}")
    assert _commit() == git("rev-parse", "HEAD")
    (tmp_path / "code.py").write_text("2\n")
    assert _commit() == git("rev-parse", "HEAD") + "-dirty"
    # A work tree that takes too long to read: the commit alone.
    run = subprocess.run

    def slow(command: list[str], **kwargs: Any) -> Any:
        if "--dirty" in command:
            raise subprocess.TimeoutExpired(command, 5)
        return run(command, **kwargs)

    monkeypatch.setattr(subprocess, "run", slow)
    assert _commit() == git("rev-parse", "HEAD")
