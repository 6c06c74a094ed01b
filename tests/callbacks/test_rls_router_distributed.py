# SPDX-License-Identifier: Apache-2.0
"""`RLSRouterFitter` in two processes: DDP, FSDP2, FSDP2 with a 4-bit base."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from tests.callbacks import router_tools as tools
from tests.callbacks.router_tools import fit, fitter, module
from tests.helpers import models, spawn
from tests.strategies.workers import result, run_scenarios


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Any:
    lm, router = module(), fitter()
    for task in range(3):
        fit(tmp_path_factory.mktemp("one"), router, lm, task, rows=tools.loader_of_two(task))
    return router._statistics.total, router.router.weight, tools.adapters(router)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("two")
    scenarios = [tools.ddp, tools.fsdp, tools.fsdp_4bit, tools.resumed, tools.resumed_sharded, tools.stream]
    spawn.run(run_scenarios, 2, folder, scenarios)
    return spawn.load(folder)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp_4bit"])
def test_three_tasks_in_two_processes_are_those_of_one(two_processes, one_process, strategy):
    first, second = result(two_processes, strategy)
    assert torch.equal(first["weight"], second["weight"])
    assert first["counts"].tolist() == [16, 16, 16]
    assert first["routes"] == second["routes"] == first["route"] == tools.EXPECTED
    torch.testing.assert_close(first["logits"], second["logits"])
    for name, value in first["adapters"].items():
        assert torch.equal(value, second["adapters"][name])
    for k in range(3):
        stored = first["stored"][f"task_{k}"]
        assert all(torch.equal(value, first["adapters"][name]) for name, value in stored.items())
        assert all(bool(value.any()) for name, value in stored.items() if "lora_B" in name)
    if strategy != "ddp":  # adapters of the third task are shards of their block's group
        assert len(first["sharded"]) == len(first["stored"]["task_2"])
    if strategy == "fsdp_4bit":  # the forward pass reads rounded weights, so the numbers are others
        assert first["quantized"] > 0
        return
    total, weight, adapters = one_process
    for name, value in first["adapters"].items():
        torch.testing.assert_close(value, adapters[name], atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(first["gram"], total.gram, atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(first["weight"], weight, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("form", ["resumed", "resumed_sharded"])
def test_resumed_in_the_middle_of_a_task_under_fsdp2(two_processes, form):
    for found in result(two_processes, form):
        assert found["counts"] == [16, 16]
        assert torch.equal(*found["weights"])
        assert all(torch.equal(value, found["again"][name]) for name, value in found["whole"].items())


def test_a_stream_under_fsdp2_allocates_its_adapters_ahead(two_processes):
    first, second = result(two_processes, "stream")
    assert first["names"] == ["task_0", "task_1", "task_2"]
    assert first["stages"] == second["stages"]
    assert first["scores"] == second["scores"]
    routed, oracle, base = (first["scores"][mode] for mode in ("routed", "oracle", "base"))
    assert routed == pytest.approx(oracle)
    assert all(base[task] > routed[task] for task in ("t0", "t1", "t2"))
    last = first["stages"][2]
    assert {task: row.get(task, 0) for task, row in last.items()} == {f"t{k}": 6 for k in range(3)}
    assert all(torch.equal(value, second["adapters"][name]) for name, value in first["adapters"].items())


def test_a_task_too_many_for_a_sharded_model_and_fsdp1_are_refused(tmp_path, monkeypatch):
    from lightning.pytorch.strategies import FSDPStrategy

    lm, router = module(), fitter()
    fit(tmp_path, router, lm, 0)
    monkeypatch.setattr("lightning_cl.weights.is_sharded", lambda part: True)
    with pytest.raises(MisconfigurationException, match="sharded already and has 1 adapters, so 'task_1'"):
        fit(tmp_path, router, lm, 1)
    trainer = models.trainer(tmp_path)
    trainer._accelerator_connector.strategy = FSDPStrategy()  # which refuses to run on a CPU
    with pytest.raises(MisconfigurationException, match=r"`FSDPStrategy` flattens all adapters of a block"):
        fitter()._prepare(trainer, module())
