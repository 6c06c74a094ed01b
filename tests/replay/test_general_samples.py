# SPDX-License-Identifier: Apache-2.0
"""General samples: which texts, cut and encoded how, and found where."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cl.callbacks import ReplayMixer
from lightning_cl.replay import GeneralSamples
from tests.helpers import models
from tests.test_attachment import Probe, _fit

TEXTS = [f"The {i}th sentence." for i in range(8)]


class WithTokenizer(models.PlainLM):
    def __init__(self) -> None:
        super().__init__(models.tiny_llama())
        self.tokenizer = models.tiny_tokenizer()


def _encoded(source: GeneralSamples, tmp_path: Path) -> list[dict[str, Any]]:
    source.prepare(models.trainer(tmp_path), WithTokenizer(), 0)
    return [source.row(i).content for i in range(source.available())]


def test_texts_have_no_bos_and_are_cut(tmp_path: Path) -> None:
    rows = _encoded(GeneralSamples(TEXTS, num_samples=8, max_tokens=6), tmp_path)
    tokenizer = models.tiny_tokenizer()
    assert sorted(tokenizer.decode(row["input_ids"]) for row in rows) == ["The 0t"[:6]] + [
        f"The {i}t" for i in range(1, 8)
    ]
    assert all(torch.equal(row["labels"], row["input_ids"]) for row in rows)


def test_the_choice_depends_on_the_seed_alone(tmp_path: Path) -> None:
    one, again, other = (
        [row["input_ids"].tolist() for row in _encoded(GeneralSamples(TEXTS, num_samples=4, seed=s), tmp_path)]
        for s in (0, 0, 1)
    )
    assert one == again != other
    assert len(one) == 4


def test_fewer_rows_than_asked_for_are_all_used_and_it_says_so() -> None:
    with pytest.warns(UserWarning, match=r"`GeneralSamples\(num_samples=1000\)`: the data has 8 rows, and all of them"):
        assert GeneralSamples(TEXTS).available() == 8


@pytest.mark.parametrize("packed", [False, True])
def test_files(tmp_path: Path, packed: bool) -> None:
    lines = [{"text": "plain"}, {"prompt": "ask", "answer": "say"}]
    path = tmp_path / ("rows.jsonl.gz" if packed else "rows.jsonl")
    with (gzip.open if packed else open)(path, "wt") as file:
        file.write("\n".join(json.dumps(line) for line in lines))
    rows = _encoded(GeneralSamples(str(path), num_samples=2), tmp_path)
    assert any((row["labels"] == -100).any() for row in rows)


def test_encoded_rows_are_used_as_they_are(tmp_path: Path) -> None:
    rows = _encoded(GeneralSamples([{"text": "x", "input_ids": [5, 6, 7]}], num_samples=1, max_tokens=2), tmp_path)
    assert rows[0]["input_ids"].tolist() == [5, 6]


def test_it_trains_with_the_modules_tokenizer(tmp_path: Path) -> None:
    module, probe = WithTokenizer(), Probe()
    _fit(tmp_path, module, [ReplayMixer(GeneralSamples(TEXTS, num_samples=8), rows_per_batch=2), probe])
    assert all(name.startswith("GeneralSamples:") for name in probe.steps[0]["ids"])


def test_no_tokenizer_anywhere(tmp_path: Path) -> None:
    mixer = ReplayMixer(GeneralSamples(TEXTS, num_samples=8))
    with pytest.raises(MisconfigurationException, match="has texts but no tokenizer"):
        _fit(tmp_path, models.PlainLM(models.tiny_llama()), [mixer])


def test_the_fingerprint_follows_texts_choice_and_length(tmp_path: Path) -> None:
    def mark(**kwargs: Any) -> str:
        source = GeneralSamples(TEXTS, **{"num_samples": 4, **kwargs})
        source.prepare(models.trainer(tmp_path), WithTokenizer(), 0)
        return source.fingerprint()

    marks = [mark(), mark(seed=1), mark(num_samples=5), mark(max_tokens=3)]
    assert mark() == marks[0]
    assert len(set(marks)) == 4


@pytest.mark.parametrize("name", ["num_samples", "max_tokens"])
def test_numbers_out_of_range(name: str) -> None:
    with pytest.raises(ValueError, match=rf"`GeneralSamples\({name}=0\)`: must be at least 1"):
        GeneralSamples(TEXTS, **{name: 0})


def test_no_data() -> None:
    with pytest.raises(ValueError, match=r"`GeneralSamples\(data=\[\]\)` has no rows"):
        GeneralSamples([]).available()
