# SPDX-License-Identifier: Apache-2.0
"""SIGTERM, a requeue by SLURM, and a kill without warning: processes of their own, resumed afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lightning_cl.stream import files
from tests.kill_worker import SETUPS

ROOT = Path(__file__).resolve().parent.parent

SCRIPT = """
import sys, time, torch
from pathlib import Path
import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_cl import fit_stream
from tests.stream_tools import Scored, stream, trainer, weights

class Slow(pl.Callback):
    def on_train_batch_end(self, trainer, *_):
        (Path(sys.argv[1]) / "running").write_text(str(trainer.global_step))
        if trainer.datamodule.current_index == 1 and sys.argv[2] == "slow":
            time.sleep(0.3)

torch.set_num_threads(1)
torch.manual_seed(1)
module = Scored()
module.net[1].p = 0.0
module.training_step = lambda batch, batch_idx: torch.nn.functional.cross_entropy(module.net(batch[0]), batch[1])
fit_stream(
    trainer(Path(sys.argv[1]), callbacks=[Slow(), ModelCheckpoint()], max_epochs=3),
    module, stream(count=2), ckpt_path=None if sys.argv[3] == "None" else sys.argv[3],
)
torch.save(weights(module), Path(sys.argv[1]) / "end.pt")
"""


def start(folder: Path, pace: str, ckpt_path: str, **env: str) -> subprocess.Popen[str]:
    folder.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), pace, ckpt_path],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def until_second_task(process: subprocess.Popen[str], folder: Path) -> None:
    for _ in range(2000):
        if (folder / "task_0_t0" / "row.json").is_file() and (folder / "running").read_text() in ("1", "2", "3"):
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    pytest.fail("the second task never began")


def end(folder: Path) -> torch.Tensor:
    return torch.load(folder / "end.pt", weights_only=True)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    folder = tmp_path_factory.mktemp("unbroken")
    process = start(folder, "fast", "None")
    assert process.wait(200) == 0, process.communicate()[0]
    return end(folder)


def test_sigterm_ends_in_a_checkpoint_and_status_0(tmp_path: Path, unbroken: torch.Tensor) -> None:
    process = start(tmp_path, "slow", "None")
    until_second_task(process, tmp_path)
    process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=200)[0]
    assert process.returncode == 0, out
    written = tmp_path / "task_1_t1" / files.INTERRUPTED
    assert files.damage(written) is None
    assert files.find_last_in(tmp_path, "TaskStream") == written
    again = start(tmp_path, "fast", "last")
    out = again.communicate(timeout=200)[0]
    assert again.returncode == 0, out
    assert torch.equal(end(tmp_path), unbroken)


def test_a_run_requeued_by_slurm_goes_on_by_itself(tmp_path: Path, unbroken: torch.Tensor) -> None:
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "scontrol").write_text("#!/bin/sh\necho $@ > $(dirname $0)/asked\n")
    (bin_folder / "scontrol").chmod(0o755)
    slurm = {
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "SLURM_NTASKS": "1",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_JOB_NAME": "stream",
        "SLURM_JOB_ID": "77",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "localhost",
    }
    folder = tmp_path / "run"
    process = start(folder, "slow", "None", **slurm)
    until_second_task(process, folder)
    process.send_signal(signal.SIGUSR1)
    # SLURM's own order: the warning, then SIGTERM, then the kill.
    for _ in range(400):
        if (bin_folder / "asked").is_file():
            break
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert (bin_folder / "asked").read_text().split() == ["requeue", "77"]
    assert (folder / "hpc_ckpt_1.ckpt").is_file()
    again = start(folder, "fast", "None", **slurm)  # as the job script calls it: without a checkpoint
    out = again.communicate(timeout=200)[0]
    assert again.returncode == 0, out
    assert "hpc_ckpt_1.ckpt" in out
    assert torch.equal(end(folder), unbroken)


def test_a_short_kill_campaign(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "kill_campaign.py"), "--setup", "schedule", "--kills", "3"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bit for bit" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("setup", SETUPS)
def test_the_kill_campaign(setup: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "kill_campaign.py"), "--setup", setup, "--kills", "20"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{setup}: 20 kills" in done.stdout
