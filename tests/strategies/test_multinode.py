# SPDX-License-Identifier: Apache-2.0
"""Two nodes of two processes each, in network namespaces of one machine, through the launch script of the examples."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.helpers import models
from tests.strategies import workers
from tests.strategies.cli_module import TinyRun

ROOT = Path(__file__).parents[2]
ADDRESSES = ("10.213.77.1", "10.213.77.2")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def nodes() -> Iterator[list[list[str]]]:
    """For each node, the words before a command that run it there."""
    names = [f"lcl{os.getpid() % 10000}n{i}" for i in range(2)]
    made = []
    try:
        for name in names:
            _ip("netns", "add", name)
            made.append(name)
        links = [f"v{name}"[:15] for name in names]
        _ip("link", "add", links[0], "netns", names[0], "type", "veth", "peer", "name", links[1], "netns", names[1])
        for name, link, address in zip(names, links, ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            _ip("-n", name, "link", "set", link, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield [
            ["ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={link}"]
            for name, link in zip(names, links, strict=True)
        ]
    except (OSError, subprocess.CalledProcessError) as error:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        made = []
        warnings.warn(f"No network namespaces here ({error}): both nodes are two processes of this host.", stacklevel=1)
        yield [["env"], ["env"]]
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _config(folder: Path, epochs: int, pause_after: int) -> Path:
    config = {
        "seed_everything": 0,
        "model": {
            "class_path": "tests.strategies.cli_module.TinyRun",
            "init_args": {"folder": str(folder), "pause_after": pause_after},
        },
        "trainer": {
            "max_epochs": epochs,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(folder),
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"dirpath": str(folder / "checkpoints"), "save_last": True},
                }
            ],
        },
    }
    path = folder / f"config-{epochs}-{pause_after}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def _start(
    nodes: list[list[str]], folder: Path, epochs: int, port: int, pause_after: int = -1
) -> list[subprocess.Popen]:
    config = _config(folder, epochs, pause_after)
    head = ADDRESSES[0] if "netns" in nodes[0] else "127.0.0.1"
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HEAD": head,
        "NODES": "2",
        "GPUS": "2",
        "PORT": str(port),
        "RESTARTS": "0",
        "RUN": f"run{port}",
        "OMP_NUM_THREADS": "1",
    }
    overlay = [
        "--trainer.accelerator=cpu",
        "--trainer.precision=32-true",
        "--trainer.strategy.init_args.quantization=null",
        "--trainer.strategy.init_args.activation_checkpointing=false",
        "--trainer.strategy.init_args.timeout=0:01:00",
    ]
    script = str(ROOT / "examples" / "multinode" / "torchrun.sh")
    hybrid = str(ROOT / "examples" / "multinode" / "hybrid_fsdp.yaml")
    return [
        subprocess.Popen(
            [*node, script, "--config", str(config), "--config", hybrid, *overlay],
            env={
                **environment,
                "NODE_RANK": str(i),
                "LOCAL_ADDR": ADDRESSES[i] if "netns" in node else "127.0.0.1",
            },
            cwd=ROOT,
            stdout=open(folder / f"node{i}-{port}.log", "w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        for i, node in enumerate(nodes)
    ]


def _stop(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _finish(processes: list[subprocess.Popen], folder: Path, port: int, seconds: int = 240) -> None:
    end = time.monotonic() + seconds
    try:
        for i, process in enumerate(processes):
            code = process.wait(timeout=max(1, end - time.monotonic()))
            log = (folder / f"node{i}-{port}.log").read_text()
            assert code == 0, f"node {i} ended with {code}:\n{log[-4000:]}"
    finally:
        for process in processes:
            _stop(process)


def _expected(folder: Path, epochs: int) -> dict[str, torch.Tensor]:
    module = TinyRun(str(folder))
    data = models.TokenRows(32)
    for epoch in range(epochs):
        parts = []
        for rank in range(4):
            sampler = torch.utils.data.DistributedSampler(data, 4, rank, shuffle=True, seed=0)
            sampler.set_epoch(epoch)
            parts.append(list(sampler))
        order = [i for start in (0, 4) for part in parts for i in part[start : start + 4]]
        loader = torch.utils.data.DataLoader(data, 16, sampler=order, collate_fn=models.collate)
        workers.trainer(folder, devices=1).fit(module, loader)
    return workers.whole(module)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("bash") is None, reason="the launch script needs bash")
def test_two_nodes_equal_one_process_and_survive_the_loss_of_one(nodes: Any, tmp_path: Path) -> None:
    port = 20000 + os.getpid() % 20000
    unbroken, broken, single = (tmp_path / n for n in ("unbroken", "broken", "single"))
    for folder in (unbroken, broken, single):
        folder.mkdir()
    _finish(_start(nodes, unbroken, 3, port), unbroken, port)
    weights = torch.load(unbroken / "weights.pt", weights_only=True)
    workers.close(weights, _expected(single, 3))
    losses = [float(line.split()[1]) for line in (unbroken / "losses.txt").read_text().splitlines()]
    one = [float(line.split()[1]) for line in (single / "losses.txt").read_text().splitlines()]
    assert losses == pytest.approx(one, abs=2e-5)

    # Node 1 is killed in the second epoch; node 0 must end by itself, with an error and not a hang.
    processes = _start(nodes, broken, 3, port + 1, pause_after=0)
    try:
        end = time.monotonic() + 150
        while len(list(broken.glob("paused-*"))) < 4:
            assert time.monotonic() < end, (broken / f"node0-{port + 1}.log").read_text()[-4000:]
            time.sleep(0.2)
        os.killpg(processes[1].pid, signal.SIGKILL)
        assert processes[0].wait(timeout=150) != 0
    finally:
        for process in processes:
            _stop(process)
    assert (broken / "checkpoints" / "last.ckpt").is_dir()
    assert not (broken / "weights.pt").exists()
    _finish(_start(nodes, broken, 3, port + 2), broken, port + 2)
    resumed = torch.load(broken / "weights.pt", weights_only=True)
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())
