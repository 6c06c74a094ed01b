# SPDX-License-Identifier: Apache-2.0
"""Two ranks give the score of one, each row counted once, and none waits for the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from lightning_cl.strategies.evaluation import CountedRows, count_each_row_once
from tests.helpers import spawn
from tests.strategies import evaluation_scenarios, workers


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("evaluation")
    spawn.run(workers.run_scenarios, 2, folder, [evaluation_scenarios.scores])
    return spawn.load(folder)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("number", range(len(evaluation_scenarios.CASES)))
def test_two_ranks_give_the_score_of_one(ranks: Any, tmp_path: Path, number: int) -> None:
    rows, batch, loaders = evaluation_scenarios.CASES[number]
    expected = evaluation_scenarios.score(tmp_path, 1, rows, batch, loaders)
    for found in workers.result(ranks, "scores"):
        assert found[number] == pytest.approx(expected, rel=1e-5)
    if loaders == 1:
        assert expected["rows"] == expected["test/rows"] == rows


@given(rows=st.integers(1, 60), world=st.integers(1, 5), batch=st.integers(1, 12))
def test_each_row_counts_once_in_equally_many_batches(rows: int, world: int, batch: int) -> None:
    counted: list[int] = []
    batches = []
    for rank in range(world):
        sampler = CountedRows(DistributedSampler(range(rows), world, rank, shuffle=False), batch)
        parts = list(BatchSampler(sampler, batch, drop_last=False))
        assert len(sampler) == sum(map(len, parts))
        batches.append(len(parts))
        if sampler.filler is not None:
            assert len(parts[sampler.filler]) == 1
        counted += [i for n, part in enumerate(parts) if n != sampler.filler for i in part]
    assert sorted(counted) == list(range(rows))
    assert len(set(batches)) == 1


def test_training_and_own_samplers_are_left_alone() -> None:
    data = list(range(5))
    shuffled = DistributedSampler(data, 2, 0, shuffle=True)
    for loader in (
        DataLoader(data, 2, sampler=shuffled),
        DataLoader(data, 2),
        DataLoader(data, 2, sampler=DistributedSampler(data, 2, 0, shuffle=False), drop_last=True),
        DataLoader(data, batch_size=None),
    ):
        count_each_row_once(loader)
        assert not isinstance(getattr(loader.batch_sampler, "sampler", None), CountedRows)
    assert count_each_row_once([1]) == [1]
