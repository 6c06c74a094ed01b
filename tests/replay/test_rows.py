# SPDX-License-Identifier: Apache-2.0
"""Batches taken apart and put together again."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_cl.replay.packing import join_packed
from lightning_cl.replay.rows import Row, collate_rows, content_id, join, layout_of, split_rows
from tests.helpers import models


def _batch(lengths: list[int], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for n in lengths:
        ids = torch.randint(4, 100, (n,), generator=generator)
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()})
    return models.collate(rows)


@settings(deadline=None, max_examples=50)
@given(
    task=st.lists(st.integers(1, 9), min_size=1, max_size=5), replay=st.lists(st.integers(1, 9), min_size=1, max_size=4)
)
def test_split_and_join_give_what_collating_all_rows_gives(task: list[int], replay: list[int]) -> None:
    rows = split_rows(layout_of(_batch(replay, 1)))
    assert [row.length for row in rows] == replay
    layout = layout_of(_batch(task))
    joined = join(layout, collate_rows(rows, layout, {}), {})
    everything = [row.content for row in split_rows(layout_of(_batch(task)))] + [row.content for row in rows]
    expected = models.collate(everything)
    for key in expected:
        assert torch.equal(joined[key], expected[key]), key


def test_left_padding_is_removed_too() -> None:
    batch = {k: v.flip(1) for k, v in _batch([2, 5]).items()}
    rows = split_rows(layout_of(batch))
    assert [row.length for row in rows] == [2, 5]
    assert 0 not in rows[0].content["input_ids"]


def test_rows_have_stable_ids() -> None:
    first, second = split_rows(layout_of(_batch([3, 3])))
    again, _ = split_rows(layout_of(_batch([3, 9])))
    assert first.id == again.id != second.id
    assert content_id({"x": torch.tensor([1])}) != content_id({"x": torch.tensor([1.0])})


def test_loss_tokens_leave_out_ignored_labels_and_the_first() -> None:
    batch = _batch([4])
    batch["labels"][0, :2] = -100
    assert split_rows(layout_of(batch))[0].tokens == 2


@dataclasses.dataclass
class Nested:
    image: Tensor
    rest: Any


def test_containers_keep_their_types() -> None:
    Point = collections.namedtuple("Point", ["a", "b"])
    batch = Nested(
        torch.zeros(2, 3), {"names": ["x", "y"], "point": Point(torch.ones(2), torch.ones(2, 1)), "scale": 0.5}
    )
    layout = layout_of(batch)
    assert layout.rows == 2
    assert set(layout.per_row) == {"image", "rest.names", "rest.point.a", "rest.point.b"}
    rows = split_rows(layout)
    joined = join(layout, collate_rows(rows, layout, {}), {})
    assert isinstance(joined, Nested)
    assert isinstance(joined.rest["point"], Point)
    assert joined.rest["names"] == ["x", "y", "x", "y"]
    assert joined.rest["scale"] == 0.5
    assert joined.image.shape == (4, 3)


def test_a_key_of_unknown_fill_is_refused_and_can_be_named() -> None:
    layout = layout_of({"ticks": torch.ones(2, 3)})
    rows = [Row({"ticks": torch.ones(5)}, "a")]
    with pytest.raises(
        MisconfigurationException, match=r"key 'ticks' have different lengths.*`pad_values=\{'ticks': V"
    ):
        join(layout, collate_rows(rows, layout, {}), {})
    pads = {"ticks": -1.0}
    assert join(layout, collate_rows(rows, layout, pads), pads)["ticks"].tolist() == [[1, 1, 1, -1, -1]] * 2 + [[1] * 5]


def test_missing_and_unknown_keys_are_named() -> None:
    layout = layout_of({**_batch([3]), "score": torch.ones(1)})
    with pytest.raises(MisconfigurationException, match=r"missing keys \['score'\], unknown keys \['extra'\]"):
        collate_rows([Row({"input_ids": torch.ones(2, dtype=torch.long), "extra": 1}, "a")], layout, {})


def test_what_follows_from_the_tokens_is_made() -> None:
    batch = _batch([3])
    batch["position_ids"] = torch.arange(3)[None].repeat(1, 1) + 0
    batch = {k: v.repeat(2, 1) for k, v in batch.items()}
    columns = collate_rows([Row({"input_ids": torch.tensor([5, 6])}, "a")], layout_of(batch), {})
    assert columns["attention_mask"].tolist() == [[1, 1]]
    assert columns["labels"].tolist() == [[5, 6]]
    assert columns["position_ids"].tolist() == [[0, 1]]


def test_other_kinds_of_numbers_are_refused() -> None:
    layout = layout_of((torch.ones(2, 3), torch.zeros(2, dtype=torch.long)))
    row = Row({"0": torch.ones(3, dtype=torch.long), "1": torch.tensor(1)}, "a")
    with pytest.raises(
        MisconfigurationException, match=r"at key '0': the batch holds a tensor float32\[3\] a row.*int64"
    ):
        collate_rows([row], layout, {})


def test_other_shapes_are_refused() -> None:
    layout = layout_of({"x": torch.ones(2, 3, 4)})
    with pytest.raises(MisconfigurationException, match=r"shapes .* beyond the first dimension cannot be joined"):
        collate_rows([Row({"x": torch.ones(3, 5)}, "a")], layout, {})


def test_a_batch_without_tensors_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="type `dict` holds no tensor"):
        layout_of({"a": "text"})


def _packed(lengths: list[int], cumulative: bool) -> dict[str, Any]:
    padded = split_rows(layout_of(_batch(lengths)))
    ids = torch.cat([row.content["input_ids"] for row in padded])[None]
    labels = ids.clone()
    starts = torch.tensor([0, *lengths]).cumsum(0)
    labels[0, starts[:-1]] = -100
    batch: dict[str, Any] = {"input_ids": ids, "labels": labels}
    if cumulative:
        return {**batch, "cu_seqlens": starts, "max_length_q": max(lengths)}
    return {**batch, "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}


@pytest.mark.parametrize("cumulative", [False, True])
def test_packed_batches_get_segments(cumulative: bool) -> None:
    layout = layout_of(_packed([3, 4], cumulative))
    assert layout.packed
    assert layout.rows == 2
    rows = split_rows(layout_of(_batch([6, 2], 1)))
    joined = join_packed(layout, rows)
    again = layout_of(joined)
    assert again.lengths == [3, 4, 6, 2]
    assert joined["input_ids"][0, 7:13].tolist() == rows[0].content["input_ids"].tolist()
    assert joined["labels"][0, 7] == joined["labels"][0, 13] == -100
    if cumulative:
        assert joined["max_length_q"] == 6
    segments = split_rows(again)
    assert [s.content["input_ids"].tolist() for s in segments[2:]] == [r.content["input_ids"].tolist() for r in rows]


def test_an_unknown_key_of_a_packed_batch_is_refused() -> None:
    layout = layout_of({**_packed([3], True), "block_mask": torch.zeros(3)})
    with pytest.raises(
        MisconfigurationException, match=r"key 'block_mask' .* that replay segments cannot be appended to"
    ):
        join_packed(layout, [Row({"input_ids": torch.tensor([5])}, "a")])


def test_segment_numbers_go_on() -> None:
    batch = {**_packed([3, 2], False), "seq_idx": torch.tensor([[0, 0, 0, 1, 1]], dtype=torch.int32)}
    rows = split_rows(layout_of(batch))
    assert all("seq_idx" not in row.content for row in rows)
    joined = join_packed(layout_of(batch), rows)
    assert joined["seq_idx"].tolist() == [[0, 0, 0, 1, 1, 2, 2, 2, 3, 3]]
    assert joined["seq_idx"].dtype == torch.int32


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            {"input_ids": torch.arange(12), "labels": torch.arange(12), "cu_seqlens": torch.tensor([0, 5, 12])},
            r"`cu_seqlens` beside `input_ids` of shape \[12\]",
        ),
        (
            {"input_ids": torch.ones(2, 6, dtype=torch.long), "cu_seq_lens_q": torch.tensor([0, 5, 12])},
            r"`cu_seq_lens_q` beside `input_ids` of shape \[2, 6\]",
        ),
        (
            {"input_ids": torch.ones(1, 8, dtype=torch.long), "cu_seqlens": torch.tensor([0, 5])},
            r"`cu_seqlens` of the packed batch covers 5 of its 8 tokens",
        ),
        ({"input_ids": [torch.arange(5), torch.arange(7)]}, r"2 tensors of unlike lengths \(5, 7\) at key 'input_ids'"),
        ([torch.ones(3, 4, 4), torch.ones(1, 4, 4)], r"2 tensors of unlike lengths \(3, 1\), so"),
        (
            {"input_ids": torch.nested.nested_tensor([torch.arange(5), torch.arange(7)], layout=torch.jagged)},
            "nested tensor at key 'input_ids'",
        ),
    ],
)
def test_other_ragged_layouts_are_refused_by_name(batch: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        layout_of(batch)


def test_columns_of_unlike_kinds_are_no_ragged_rows() -> None:
    assert layout_of([torch.ones(4, 3), torch.ones(4, dtype=torch.long)]).rows == 4
    assert layout_of([torch.ones(4, 3), torch.ones(10)]).per_row == ["0"]
