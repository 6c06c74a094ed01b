# SPDX-License-Identifier: Apache-2.0
"""Each callback under each strategy: it does its work over two tasks, on two processes where the strategy shards."""

from __future__ import annotations

import traceback
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

import lightning_cl  # noqa: F401  (registers the strategies)
from tests.helpers import cases, spawn
from tests.helpers.fsdp1 import cpu_fsdp1

IN_PROCESS = ["auto", "cl_single_device", "cl_single_device_4bit", "manual optimization", "torch.compile"]
SPAWNED = ["ddp", "cl_fsdp", "cl_fsdp_4bit", "fsdp"]
#: What FSDP1 and DeepSpeed do not do is refused; see the tests that the README names.
REFUSED = {("ActivationMarginRegularizer", "fsdp"), ("RLSRouterFitter", "fsdp")} | {
    (name, "deepspeed") for name in cases.NAMES
}
_ROUTER = "RLSRouterFitter"


def _strategy(name: str) -> Any:
    from lightning_cl.strategies import CLFSDPStrategy

    return {
        "ddp": lambda: DDPStrategy(timeout=timedelta(seconds=90)),
        "cl_fsdp": lambda: CLFSDPStrategy(timeout=timedelta(seconds=90)),
        "cl_fsdp_4bit": lambda: CLFSDPStrategy(quantization="nf4", timeout=timedelta(seconds=90)),
        "fsdp": cpu_fsdp1,
        "cl_single_device": "cl_single_device",
        "cl_single_device_4bit": "cl_single_device_4bit",
    }.get(name, "auto")


def _run(folder: Path, strategy: str, devices: int) -> dict[str, str]:
    """All callbacks in two runs, one without and one with the router: for each "works", or where it broke."""
    tasks = 1 if strategy == "fsdp" else 2  # Lightning cannot wrap a module with FSDP1 a second time
    found: dict[str, str] = {}
    runs = [[name for name in cases.NAMES if name != _ROUTER and (name, strategy) not in REFUSED]]
    if (_ROUTER, strategy) not in REFUSED:
        runs.append([_ROUTER])
    for names in runs:
        torch.manual_seed(0)
        try:
            made = [cases.make(name, tuple(names)) for name in names]
            lm = cases.module(manual=strategy == "manual optimization", compiled=strategy == "torch.compile")
            run = partial(cases.run, folder, made, lm, tasks, _strategy(strategy), devices)
            lm, trainer = run()
        except Exception:
            found |= dict.fromkeys(names, traceback.format_exc())
            continue
        for name, callback in zip(names, made, strict=True):
            try:
                cases.check(callback, lm, trainer, tasks)
                found[name] = "works"
            except Exception:
                found[name] = traceback.format_exc()
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Results on one process, by strategy."""
    return {strategy: _run(tmp_path_factory.mktemp("alone"), strategy, 1) for strategy in IN_PROCESS}


@pytest.mark.parametrize("strategy", IN_PROCESS)
@pytest.mark.parametrize("name", cases.NAMES)
def test_on_one_process(alone: Any, name: str, strategy: str) -> None:
    assert alone[strategy][name] == "works"


def _worker(rank: int, folder: Path, strategy: str) -> None:
    spawn.save(folder, rank, _run(folder, strategy, 2))


@pytest.fixture(scope="module", params=SPAWNED)
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Any]]:
    """A strategy, and the results of both of its processes."""
    folder = tmp_path_factory.mktemp("together")
    spawn.run(_worker, 2, folder, request.param)
    return request.param, spawn.load(folder)


@pytest.mark.parametrize("name", cases.NAMES)
def test_on_two_processes(together: Any, name: str) -> None:
    strategy, ranks = together
    if (name, strategy) in REFUSED:
        assert all(name not in found for found in ranks)
        return
    for found in ranks:
        assert found[name] == "works"
