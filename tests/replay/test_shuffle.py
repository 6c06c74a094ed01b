# SPDX-License-Identifier: Apache-2.0
"""The shuffled walk: a bijection that ranks share, with one integer for its state."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from lightning_cl.replay.shuffle import ShuffledWalk, permuted, round_keys


@given(n=st.integers(1, 300), key=st.integers(0, 2**63))
def test_permuted_is_a_bijection(n: int, key: int) -> None:
    assert sorted(permuted(i, n, round_keys(key)) for i in range(n)) == list(range(n))


def test_permuted_looks_random() -> None:
    """Positions are uniform over keys: a chi-squared statistic of 9 degrees of freedom stays below its 0.999 quantile."""
    counts = Counter(permuted(3, 10, round_keys(key)) for key in range(5000))
    assert sum((counts[i] - 500) ** 2 / 500 for i in range(10)) < 27.9


@given(n=st.integers(1, 40), world=st.integers(1, 4), draws=st.lists(st.integers(1, 5), min_size=1, max_size=20))
def test_ranks_share_one_walk(n: int, world: int, draws: list[int]) -> None:
    """Together the ranks draw what one process draws: every item equally often, within one."""
    ranks = [ShuffledWalk(7) for _ in range(world)]
    drawn = [[i for count in draws for i in walk.take(count, n, r, world)] for r, walk in enumerate(ranks)]
    together = [i for step in zip(*drawn, strict=True) for i in step]
    assert together == ShuffledWalk(7).take(len(together), n)
    counts = Counter(together)
    assert max(counts.values()) - min(counts[i] for i in range(n)) <= 1


@given(n=st.integers(1, 20), before=st.integers(0, 30), after=st.integers(1, 30))
def test_resume_goes_on_where_it_was(n: int, before: int, after: int) -> None:
    unbroken, first, second = ShuffledWalk(1), ShuffledWalk(1), ShuffledWalk(1)
    expected = unbroken.take(before, n) + unbroken.take(after, n)
    got = first.take(before, n)
    second.load_state_dict(first.state_dict())
    assert got + second.take(after, n) == expected


def test_a_changed_number_of_items_starts_a_new_order() -> None:
    walk = ShuffledWalk(0)
    walk.take(3, 5)
    assert sorted(walk.take(8, 8)) == list(range(8))
    assert sorted(walk.take(8, 8)) == list(range(8))


def test_two_ranks_go_on_as_one() -> None:
    """2 -> 1 processes: what two ranks have drawn is not drawn again before the pass ends."""
    ranks = [ShuffledWalk(0), ShuffledWalk(0)]
    drawn = [i for r, walk in enumerate(ranks) for i in walk.take(3, 10, r, 2)]
    one = ShuffledWalk(0)
    one.load_state_dict({**ranks[0].state_dict(), "steps": [3, 3]})
    assert sorted(drawn + one.take(4, 10)) == list(range(10))
