# SPDX-License-Identifier: Apache-2.0
"""Episodic memory: a uniform sample of fixed size, whatever the order, the ranks and the restarts."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_cl.replay import EpisodicMemory, Row


def _row(number: int, task: str = "a") -> Row:
    return Row({"x": torch.tensor([number]), "name": f"n{number}"}, id=f"{number:08x}", task=task)


def _numbers(memory: EpisodicMemory) -> list[int]:
    return sorted(int(row.content["x"]) for _, row in memory._kept)


def _remember(memory: EpisodicMemory, tasks: list[list[int]]) -> EpisodicMemory:
    for index, numbers in enumerate(tasks):
        memory.observe([_row(n, str(index)) for n in numbers])
        memory.end_task(None, None, index)
    return memory


def test_every_row_is_kept_with_equal_probability() -> None:
    """600 memories of 5 of 20 rows in two tasks: chi-squared of 19 degrees of freedom below its 0.999 quantile."""
    counts = torch.zeros(20)
    for seed in range(600):
        for n in _numbers(_remember(EpisodicMemory(5, seed=seed), [list(range(12)), list(range(12, 20))])):
            counts[n] += 1
    assert counts.sum() == 3000
    # Rows without replacement vary less than independent draws: the bound is on the safe side.
    assert ((counts - 150) ** 2 / 150).sum() < 43.8


@given(order=st.permutations(list(range(12))), parts=st.integers(1, 4))
def test_order_and_parts_do_not_matter(order: list[int], parts: int) -> None:
    """One reservoir in one process keeps what several ranks keep together."""
    expected = _numbers(_remember(EpisodicMemory(4, seed=1), [list(range(12))]))
    assert _numbers(_remember(EpisodicMemory(4, seed=1), [order])) == expected
    ranks = [EpisodicMemory(4, seed=1) for _ in range(parts)]
    for rank, memory in enumerate(ranks):
        memory.observe([_row(n, "0") for n in order[rank::parts]])
    united = EpisodicMemory(4, seed=1)
    united.observe([row for memory in ranks for _, row in memory._all_candidates()])
    united.end_task(None, None, 0)
    assert _numbers(united) == expected


def test_a_row_is_inserted_once() -> None:
    memory = EpisodicMemory(10)
    for _ in range(3):
        memory.observe([_row(n) for n in range(4)])
    memory.end_task(None, None, 0)
    assert _numbers(memory) == [0, 1, 2, 3]


def test_ring_keeps_the_latest() -> None:
    assert _numbers(_remember(EpisodicMemory(3, policy="ring"), [[0, 1, 2, 3], [4]])) == [2, 3, 4]


def test_task_balanced_gives_each_task_its_share() -> None:
    tasks_of_rows = [list(range(50)), list(range(50, 52)), list(range(60, 90))]
    memory = _remember(EpisodicMemory(9, policy="task_balanced"), tasks_of_rows)
    tasks = [row.task for _, row in memory._kept]
    # The second task has only two rows; the others share what it leaves.
    assert {t: tasks.count(t) for t in set(tasks)} == {"0": 3, "1": 2, "2": 4}


def test_rows_are_not_replayed_in_their_own_task_unless_asked() -> None:
    memory = EpisodicMemory(4)
    memory.observe([_row(n) for n in range(4)])
    assert memory.available() == 0
    asked = EpisodicMemory(4, replay_current_task=True)
    asked.observe([_row(n) for n in range(4)])
    assert sorted(int(row.content["x"]) for row in asked.draw(4, 0, 1)) == [0, 1, 2, 3]


@pytest.mark.parametrize("policy", ["reservoir", "ring", "task_balanced"])
def test_state_in_the_middle_of_a_task(policy: str) -> None:
    unbroken = EpisodicMemory(4, policy=policy)
    _remember(unbroken, [[0, 1, 2]])
    unbroken.observe([_row(n, "b") for n in range(3, 7)])
    drawn = [row.id for row in unbroken.draw(5, 0, 1)]
    restored = EpisodicMemory(4, policy=policy)
    restored.load_state_dict(unbroken.state_dict())
    for memory in (unbroken, restored):
        memory.observe([_row(n, "b") for n in range(6, 12)])
    assert [r.id for r in unbroken.draw(5, 0, 1)] == [r.id for r in restored.draw(5, 0, 1)] != drawn
    for memory in (unbroken, restored):
        memory.end_task(None, None, 1)
    assert _numbers(unbroken) == _numbers(restored)
    assert [r.content["name"] for _, r in restored._kept] == [r.content["name"] for _, r in unbroken._kept]


def test_state_is_plain(tmp_path: object) -> None:
    state = _remember(EpisodicMemory(4), [[0, 1, 2]]).state_dict()
    torch.save(state, f"{tmp_path}/memory.pt")
    again = EpisodicMemory(4)
    again.load_state_dict(torch.load(f"{tmp_path}/memory.pt", weights_only=True))
    assert _numbers(again) == [0, 1, 2]


def test_rows_are_kept_where_the_model_is_if_asked() -> None:
    """Those of the memory that was loaded before the model had a device, too; what is being seen stays on the CPU."""
    memory = EpisodicMemory(4, device="model")
    memory.load_state_dict(_remember(EpisodicMemory(4), [[0]]).state_dict())
    memory.start(None, SimpleNamespace(device=torch.device("meta")), None)  # type: ignore[arg-type]
    assert memory.draw(1, 0, 1)[0].content["x"].device.type == "meta"
    memory.observe([_row(1, "1")])
    assert memory._candidates[0][2].content["x"].device.type == "cpu"
    memory.end_task(None, None, 1)
    assert {row.content["x"].device.type for row in memory.draw(2, 0, 1)} == {"meta"}


def test_drawing_does_not_depend_on_the_size() -> None:
    """8 rows of 200,000 cost at most three times 8 rows of 200 (the README's table has the absolute figure)."""
    seconds = {}
    for size in (200, 200_000):
        memory = EpisodicMemory(size)
        row = _row(0)
        memory._kept = [(i, row) for i in range(size)]
        memory.draw(8, 0, 1)
        best = float("inf")
        for _ in range(50):
            start = time.perf_counter()
            memory.draw(8, 0, 1)
            best = min(best, time.perf_counter() - start)
        seconds[size] = best
    assert seconds[200_000] < 3 * seconds[200]


@pytest.mark.parametrize("capacity", [0, -3])
def test_capacity_out_of_range(capacity: int) -> None:
    with pytest.raises(
        ValueError, match=rf"`EpisodicMemory\(capacity={capacity}\)`: a memory must hold at least 1 row"
    ):
        EpisodicMemory(capacity)


def test_unknown_policy() -> None:
    with pytest.raises(ValueError, match=r"`EpisodicMemory\(policy='fifo'\)`: use \"reservoir\", \"ring\""):
        EpisodicMemory(3, policy="fifo")  # type: ignore[arg-type]


def test_unknown_device() -> None:
    with pytest.raises(ValueError, match=r"`EpisodicMemory\(device='cuda'\)`: use \"cpu\", or \"model\""):
        EpisodicMemory(3, device="cuda")  # type: ignore[arg-type]
