# SPDX-License-Identifier: Apache-2.0
"""Sums over tasks, and where samples went."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lightning_cl.routing import Expansion
from lightning_cl.routing.confusion import RoutingConfusion
from lightning_cl.routing.router import BASE, Routes
from lightning_cl.routing.statistics import RouterStatistics


def test_statistics_are_the_joint_solution_and_resume_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(30, 8, generator=generator) + k for k in range(3)]

    def fit(resume_at: int | None) -> Tensor:
        statistics, number = RouterStatistics(16, 0.5, seed=0), 0
        for task in range(3):
            statistics.restart_task()
            label = statistics.label(f"t{task}", f"task_{task}")
            for block in rows[task].split(7):
                statistics.observe(block, label)
                number += 1
                if number == resume_at:
                    state, statistics = statistics.state_dict(), RouterStatistics(16, 0.5, seed=0)
                    statistics.load_state_dict(state)
            statistics.end_task()
        return statistics.weight()[0]

    whole = fit(None)
    features = torch.relu(torch.cat(rows) @ Expansion(8, 16).matrix()).double()
    targets = torch.eye(3, dtype=torch.float64).repeat_interleave(30, 0)
    expected = torch.linalg.solve(features.T @ features + 0.5 * torch.eye(16), features.T @ targets)
    torch.testing.assert_close(whole, expected, atol=1e-9, rtol=1e-7)
    for at in (2, 5, 8, 13):
        assert torch.equal(fit(at), whole)


def test_statistics_show_the_running_task_without_touching_it():
    statistics = RouterStatistics(16, "auto", seed=0)
    label = statistics.label("a", "task_0")
    statistics.observe(torch.randn(20, 4), label)
    weight, seen = statistics.weight(running=True)
    assert weight.shape == (16, 1)
    assert seen == [True]
    assert statistics.rows_in_task == 20
    assert statistics.total.num_classes == 0
    statistics.restart_task()
    assert statistics.rows_in_task == 0
    with pytest.raises(ValueError, match="gives 5 numbers a sample, but the router was fitted on 4"):
        statistics.observe(torch.randn(2, 5), label)
    with pytest.raises(ValueError, match="has `expansion_dim=16`, this one `expansion_dim=8`"):
        RouterStatistics(8, "auto", seed=0).load_state_dict(statistics.state_dict())


def test_confusion_counts_tasks_bases_and_probes(tmp_path):
    confusion = RoutingConfusion()
    assert confusion.accuracy() is None
    confusion.start()
    routes = SimpleNamespace(names=["a", "b", "a", "a"], adapters=["task_0", "task_1", BASE, "task_0"])
    confusion.add("a", routes)
    confusion.add("b", Routes(["general"], [BASE], torch.zeros(1), torch.zeros(1, 2)))
    confusion.add("probe", Routes(["b"], ["task_1"], torch.zeros(1), torch.zeros(1, 2)))
    assert confusion.finish(["a", "b"]) == pytest.approx(2 / 5)
    assert confusion.accuracy(1) == pytest.approx(2 / 5)
    assert confusion.table().splitlines() == [
        "| task | a | b | general | base | accuracy |",
        "| --- | --- | --- | --- | --- | --- |",
        "| a | 2 | 1 | 0 | 1 | 50.0 % |",
        "| b | 0 | 0 | 1 | 0 | 0.0 % |",
        "| probe | 0 | 1 | 0 | 0 | - |",
    ]
    confusion.plot(tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").stat().st_size > 1000
    again = RoutingConfusion()
    again.load_state_dict(confusion.state_dict())
    assert again.table() == confusion.table()
