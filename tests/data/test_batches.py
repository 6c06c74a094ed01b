# SPDX-License-Identifier: Apache-2.0
"""Datasets, samplers and the collator."""

from __future__ import annotations

from collections import Counter

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset

from lightning_cl.data import Collator, DataError, EncodedDataset, EncodedIterableDataset, Encoder, EvalSampler
from tests.helpers.models import tiny_tokenizer

ROWS = [{"prompt": "Q" * (i + 1), "answer": str(i), "options": [str(i), "none"]} for i in range(7)]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(ROWS)


@pytest.fixture
def encoder():
    return Encoder(tiny_tokenizer(chat=False))


def prompts(encoder, batches):
    """The prompts of training batches, read back from the ids."""
    texts = [encoder.tokenizer.decode(ids[mask.bool()]) for b in batches for ids, mask in zip(b[0], b[1], strict=True)]
    return Counter(len(text.split()[0]) - 1 for text in texts)


def train_batches(loader):
    return [(batch["input_ids"], batch["attention_mask"]) for batch in loader]


def test_training_batches_pad_on_the_right(encoder):
    batch = next(
        iter(DataLoader(EncodedDataset(ROWS, encoder), batch_size=7, collate_fn=Collator(encoder.pad_token_id)))
    )
    for i, row in enumerate(ROWS):
        alone = encoder.encode_train(row)
        n = len(alone["input_ids"])
        assert batch["input_ids"][i, :n].tolist() == alone["input_ids"].tolist()
        assert batch["labels"][i, :n].tolist() == alone["labels"].tolist()
        assert (batch["input_ids"][i, n:] == encoder.pad_token_id).all()
        assert (batch["labels"][i, n:] == -100).all()
        assert batch["attention_mask"][i].sum() == n
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_evaluation_batches_pad_prompts_on_the_left(encoder):
    dataset = EncodedDataset(ROWS, encoder, "eval", "accuracy")
    batch = next(iter(DataLoader(dataset, batch_size=7, collate_fn=Collator(encoder.pad_token_id))))
    for i, row in enumerate(ROWS):
        alone = encoder.encode_eval(row, "accuracy")
        n = len(alone["input_ids"])
        assert batch["input_ids"][i, -n:].tolist() == alone["input_ids"].tolist()
        assert batch["attention_mask"][i].tolist() == [0] * (len(batch["input_ids"][i]) - n) + [1] * n
        for j, ids in enumerate(alone["option_ids"]):
            assert batch["option_ids"][i, j][batch["option_mask"][i, j]].tolist() == ids.tolist()
    assert batch["metric"] == "accuracy"
    assert batch["row"].tolist() == list(range(7))
    assert batch["reference"] == [row["answer"] for row in ROWS]


def test_loss_batches_suit_any_module(encoder):
    dataset = EncodedDataset(ROWS, encoder, "eval", "loss")
    batch = next(iter(DataLoader(dataset, batch_size=2, collate_fn=Collator(0))))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_rows_with_unequal_numbers_of_options(encoder):
    rows = [ROWS[0], {"prompt": "Q", "answer": "a", "options": ["a", "bb", "c"]}]
    batch = Collator(0)([encoder.encode_eval(row, "accuracy") for row in rows])
    assert batch["option_mask"].any(-1).tolist() == [[True, True, False], [True, True, True]]


def test_other_rows_pass_through():
    images = torch.utils.data.TensorDataset(torch.rand(4, 3), torch.arange(4))
    batch = next(iter(DataLoader(EncodedDataset(images, None), batch_size=4, collate_fn=Collator())))
    assert batch[0].shape == (4, 3)
    assert batch[1].tolist() == [0, 1, 2, 3]
    ids = [{"input_ids": [5, 6, 7]}, {"input_ids": [5]}]
    batch = Collator(9)(ids)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_mixed_rows_in_a_batch_are_refused(encoder):
    with pytest.raises(DataError, match="rows of one batch have different keys"):
        Collator(0)([encoder.encode_train(ROWS[0]), {"input_ids": torch.tensor([1])}])
    rows = [encoder.encode_eval(ROWS[0], metric) for metric in ("exact_match", "rouge_l")]
    with pytest.raises(DataError, match=r"different metrics: \['exact_match', 'rouge_l'\]"):
        Collator(0)(rows)


def test_bad_rows_are_named_when_they_are_read(encoder):
    class Lazy(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return {"prompt": "Q", "answer": "x", "options": ["a", "b"]}

    with pytest.raises(DataError, match="row 1: the answer 'x' is not among"):
        EncodedDataset(Lazy(), encoder)[1]
    with pytest.raises(DataError, match="row 0: the metric 'accuracy' needs"):
        EncodedDataset([{"text": "a"}], encoder, "eval", "accuracy")[0]
    with pytest.raises(TypeError, match="Stream has no length or index: use `EncodedIterableDataset`"):
        EncodedDataset(Stream(), encoder)


def test_fillers_are_not_counted(encoder):
    scored = EncodedDataset(ROWS, encoder, "eval", "accuracy")
    assert scored[-3]["row"] == -1
    assert scored[-3]["input_ids"].tolist() == scored[2]["input_ids"].tolist()
    by_loss = EncodedDataset(ROWS, encoder, "eval", "loss")
    assert (by_loss[-3]["labels"] == -100).all()
    assert by_loss[-3]["input_ids"].tolist() == by_loss[2]["input_ids"].tolist()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(1, 4))
def test_sampler_deals_each_row_once(lengths, world_size):
    ranks = [list(EvalSampler(lengths, rank, world_size)) for rank in range(world_size)]
    assert len({len(indices) for indices in ranks}) == 1
    counted = sorted(index for indices in ranks for index in indices if index >= 0)
    assert counted == list(range(len(lengths)))
    for indices in ranks:
        sizes = [lengths[index] for index in indices if index >= 0]
        assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("source", [Stream, lambda: datasets.Dataset.from_list(ROWS).to_iterable_dataset(num_shards=4)])
def test_each_row_of_a_stream_once(encoder, workers, world_size, source):
    seen: Counter = Counter()
    for rank in range(world_size):
        dataset = EncodedIterableDataset(source(), encoder, rank=rank, world_size=world_size)
        loader = DataLoader(dataset, batch_size=2, num_workers=workers, collate_fn=Collator(0))
        seen += prompts(encoder, train_batches(loader))
    assert seen == Counter(range(7))


@pytest.mark.parametrize("workers", [0, 2])
def test_each_row_of_a_map_once(encoder, workers):
    dataset = EncodedDataset(ROWS, encoder)
    loader = DataLoader(dataset, batch_size=2, shuffle=True, num_workers=workers, collate_fn=Collator(0))
    assert sum(prompts(encoder, train_batches(loader)).values()) == 7
    assert set(prompts(encoder, train_batches(loader)).values()) == {1}


def test_stream_rows_are_numbered_over_all_parts(encoder):
    parts = [EncodedIterableDataset(Stream(), encoder, "eval", "accuracy", rank=r, world_size=2) for r in range(2)]
    assert [[item["row"] for item in part] for part in parts] == [[0, 2, 4, 6], [1, 3, 5]]
