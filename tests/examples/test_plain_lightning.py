# SPDX-License-Identifier: Apache-2.0
"""The example of an ordinary project: its two lines make it forget less."""

from __future__ import annotations

import runpy
from pathlib import Path

import lightning.pytorch  # noqa: F401 - changes the environment when it is first imported
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "plain_lightning.py"


def test_two_lines_make_it_forget_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    main = runpy.run_path(str(EXAMPLE))["main"]
    without, with_replay = main(["--forget"]), main([])
    assert without["backward_transfer"] < -0.05
    assert with_replay["backward_transfer"] > without["backward_transfer"] / 2
    assert with_replay["learning_accuracy"] > without["learning_accuracy"] - 0.02
