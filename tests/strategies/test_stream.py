# SPDX-License-Identifier: Apache-2.0
"""A stream of tasks over two ranks with a sharded 4-bit base equals one process, and survives being broken off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import spawn
from tests.strategies import stream_scenarios, workers


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("stream")
    spawn.run(workers.run_scenarios, 2, folder, stream_scenarios.ALL)
    return spawn.load(folder)


@pytest.mark.slow
def test_two_ranks_in_4_bits_learn_the_stream_of_one(ranks: Any, tmp_path: Path) -> None:
    expected = stream_scenarios.run(tmp_path, "cl_single_device_4bit", 1, [])
    for found in workers.result(ranks, "alone"):
        workers.close(found["weights"], expected["weights"], atol=2e-3)
        assert found["matrix"] == pytest.approx(expected["matrix"], abs=1e-6)


@pytest.mark.slow
def test_a_broken_stream_with_five_callbacks_ends_where_the_unbroken_one_does(ranks: Any) -> None:
    for unbroken, resumed in workers.result(ranks, "all_on"):
        assert unbroken["matrix"] == resumed["matrix"]
        assert all(torch.equal(resumed["weights"][n], v) for n, v in unbroken["weights"].items())
