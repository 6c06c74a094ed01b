# SPDX-License-Identifier: Apache-2.0
"""What one process does to the others of its run: its death, its signals, its versions."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_cl.stream import files
from tests.helpers.spawn import _free_port

ROOT = Path(__file__).resolve().parent.parent

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_cl import Task, TaskStream, fit_stream, rank_watch
from tests.helpers import models
from tests.stream_tools import trainer

folder, mode, strategy, ckpt_path, accelerator = Path(sys.argv[1]), *sys.argv[2:]
hangs = mode.startswith("hang")
if hangs or mode.startswith("stuck") or accelerator == "gpu":
    rank_watch.GRACE, rank_watch.SILENCE = 3.0, 4
torch.set_num_threads(1)
torch.manual_seed(0)


class Module(models.PlainLM):
    def training_step(self, batch, batch_idx):
        (folder / f"step{self.global_rank}").write_text(str(self.trainer.global_step))
        if mode == "slow":
            time.sleep(0.1 * (1 + self.global_rank))
        if self.trainer.global_step == 3 and mode not in ("slow", "fast"):
            if self.global_rank == 0 and hangs and accelerator == "cpu":
                time.sleep(300)  # as in a collective call of NCCL whose partner is gone
            if self.global_rank == 1:
                if mode.endswith("killed"):
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ValueError("row 17 of task t0 is broken")
        return super().training_step(batch, batch_idx)

    def cpu(self):
        if mode.startswith("stuck") and self.global_rank == 0:
            time.sleep(300)  # as taking a Trainer apart waits for a kernel of NCCL whose partner is gone
        return super().cpu()


module = Module(models.lora(models.tiny_llama()), optimizer="adamw")
tasks = [Task(f"t{i}", train=models.TokenRows(40, seed=i)) for i in range(2)]
data = TaskStream(tasks, batch_size=2, collate_fn=models.collate, seed=3)
checkpoints = ModelCheckpoint(every_n_train_steps=100)
run = trainer(folder, accelerator=accelerator, strategy=strategy, devices=2, callbacks=[checkpoints])
fit_stream(run, module, data, ckpt_path=None if ckpt_path == "None" else ckpt_path)
from lightning_cl.weights import local
end = {name: local(p).detach() for name, p in module.named_parameters() if p.requires_grad}
torch.save(end, folder / f"end{module.global_rank}.pt")
"""


def start(
    folder: Path,
    mode: str,
    strategy: str,
    ckpt_path: str = "None",
    path_of_rank_1: str = "",
    accelerator: str = "cpu",
    slurm: Path | None = None,
) -> list[subprocess.Popen]:
    folder.mkdir(exist_ok=True)
    port = _free_port()
    processes = []
    for rank in range(2):
        env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
        env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{path_of_rank_1 if rank else ''}{os.pathsep}{ROOT}"}
        if slurm is not None:
            env |= {"PATH": f"{slurm}:{os.environ['PATH']}", "SLURM_JOB_NAME": "stream", "SLURM_JOB_ID": "77"}
            env |= {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NODELIST": "localhost"}
            env |= {"SLURM_NODEID": "0", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        command = [sys.executable, "-c", SCRIPT, str(folder), mode, strategy, ckpt_path, accelerator]
        with open(folder / f"log{rank}", "a") as log:
            processes.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT))
    return processes


def codes(processes: list[Any], seconds: float = 200) -> list[int]:
    end = time.monotonic() + seconds
    try:
        return [process.wait(max(0.1, end - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()


RAISED = "rank 1 on .*: ValueError: row 17 of task t0 is broken"
GONE = "rank 1 is gone without a message"
DEATHS = {
    "hang": f"has waited 3 s and is ended: {RAISED}",
    "hang-killed": f"has waited 3 s and is ended: {GONE}",
    "raised": f"ends because another one did: {RAISED}",
    "stuck-killed": f"has waited 3 s and is ended: {GONE}",
    "killed": f"ends because another one did: {GONE}",
}


@pytest.mark.parametrize(
    ("mode", "strategy"),
    [
        ("hang", "ddp"),
        ("hang-killed", "ddp"),
        pytest.param("stuck-killed", "ddp", marks=pytest.mark.slow),
        pytest.param("raised", "ddp", marks=pytest.mark.slow),
        pytest.param("raised", "cl_fsdp", marks=pytest.mark.slow),
        pytest.param("killed", "ddp", marks=pytest.mark.slow),
        pytest.param("killed", "cl_fsdp", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_dies_takes_the_other_down_with_its_message(mode: str, strategy: str, tmp_path: Path) -> None:
    dies(tmp_path, mode, strategy, "cpu", DEATHS[mode])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices; this machine has fewer")
@pytest.mark.parametrize(("mode", "strategy"), [("killed", "cl_fsdp"), ("raised", "ddp"), ("killed", "ddp")])
def test_two_gpus_a_rank_that_dies_takes_the_other_down(mode: str, strategy: str, tmp_path: Path) -> None:
    # Which call of the other meets the death first is NCCL's: it ends with an error, or it waits and is ended.
    dies(tmp_path, mode, strategy, "gpu", RAISED if mode == "raised" else GONE)


def dies(folder: Path, mode: str, strategy: str, accelerator: str, message: str) -> None:
    """Rank 1 dies in a step: rank 0 must end within 30 s, and say why."""
    processes = start(folder, mode, strategy, accelerator=accelerator)
    try:
        processes[1].wait(200)
        died = time.monotonic()
        processes[0].wait(60)
        seconds = time.monotonic() - died
    finally:
        found = codes(processes)
    log = (folder / "log0").read_text()
    print(f"{accelerator} {strategy}: rank 1 {mode}, rank 0 ended {seconds:.1f} s later with status {found[0]}")
    assert seconds < 30
    assert found[0] == 1, log
    assert found[1] == (-signal.SIGKILL if mode.endswith("killed") else 1)
    assert re.search(message, log), log[-3000:]


@pytest.fixture(scope="module", params=["ddp", "cl_fsdp"])
def unbroken(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A strategy, and the folder of a run that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("unbroken")
    assert codes(start(folder, "fast", request.param)) == [0, 0]
    return request.param, folder


def signalled(folder: Path, strategy: str, signum: int, slurm: Path | None = None) -> list[subprocess.Popen]:
    """Two processes to which a scheduler has sent a signal, one after the other, in different places of their steps."""
    processes = start(folder, "slow", strategy, slurm=slurm)
    step = folder / "step0"
    while processes[0].poll() is None and not (step.is_file() and step.read_text() in ("3", "4", "5")):
        time.sleep(0.01)
    processes[1].send_signal(signum)
    time.sleep(0.15)
    processes[0].send_signal(signum)
    return processes


def equal_ends(whole: Path, broken: Path) -> bool:
    pairs = [[torch.load(f / f"end{rank}.pt", weights_only=True) for f in (whole, broken)] for rank in range(2)]
    return all(torch.equal(one[name], other[name]) for one, other in pairs for name in one)


@pytest.mark.slow
def test_sigterm_on_two_processes_ends_in_one_checkpoint_and_status_0(
    unbroken: tuple[str, Path], tmp_path: Path
) -> None:
    strategy, whole = unbroken
    assert codes(signalled(tmp_path, strategy, signal.SIGTERM)) == [0, 0], (tmp_path / "log0").read_text()[-3000:]
    assert files.damage(tmp_path / "task_0_t0" / files.INTERRUPTED) is None
    assert codes(start(tmp_path, "fast", strategy, "last")) == [0, 0], (tmp_path / "log0").read_text()[-3000:]
    assert equal_ends(whole, tmp_path)


@pytest.mark.slow
def test_slurm_requeues_two_processes_after_one_checkpoint(unbroken: tuple[str, Path], tmp_path: Path) -> None:
    strategy, whole = unbroken
    slurm = tmp_path / "bin"
    slurm.mkdir()
    (slurm / "scontrol").write_text("#!/bin/sh\necho $@ >> $(dirname $0)/asked\n")
    (slurm / "scontrol").chmod(0o755)
    folder = tmp_path / "run"
    processes = signalled(folder, strategy, signal.SIGUSR1, slurm)
    end = time.monotonic() + 60
    while not (slurm / "asked").is_file() and time.monotonic() < end:
        time.sleep(0.05)
    for process in processes:  # what SLURM does next
        process.kill()
    codes(processes)
    assert (slurm / "asked").read_text().split() == ["requeue", "77"], (folder / "log0").read_text()[-3000:]
    assert files.damage(folder / "hpc_ckpt_1.ckpt") is None
    # The job script calls it as before: without a checkpoint.
    assert codes(start(folder, "fast", strategy, slurm=slurm)) == [0, 0], (folder / "log0").read_text()[-3000:]
    assert "hpc_ckpt_1.ckpt" in (folder / "log0").read_text()
    assert equal_ends(whole, folder)


def test_other_versions_on_a_rank_are_shown(tmp_path: Path) -> None:
    # What another machine would have installed, before everything else on rank 1's path.
    other = tmp_path / "site" / "peft-0.1.2.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.1.2\n")
    folder = tmp_path / "run"
    assert codes(start(folder, "fast", "ddp", path_of_rank_1=str(other.parent))) == [0, 0]
    log = (folder / "log0").read_text()
    assert "other versions of peft: " in log
    assert "0.1.2 (rank 1 on " in log
    assert log.count("have other versions of") == 1
