# SPDX-License-Identifier: Apache-2.0
"""A long run stays flat: memory and open files do not grow with tasks or steps."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory and open files from /proc")
@pytest.mark.parametrize("setup", ["callbacks", "router"])
def test_2000_steps_over_20_tasks(setup: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "long_run.py"), str(tmp_path), "--setup", setup],
        cwd=ROOT,
        # One arena: what several threads free is given back alike, so that the process's size is what is in use.
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    used = json.loads(done.stdout.splitlines()[-1])
    assert used["steps"] == 2000
    early, late = slice(3, 8), slice(15, 20)
    for what in ("megabytes", "files"):
        growth = statistics.median(used[what][late]) / statistics.median(used[what][early])
        assert growth < 1.01, (what, used[what])
