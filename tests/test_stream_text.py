# SPDX-License-Identifier: Apache-2.0
"""Text sources of every kind in a stream, with a causal language model."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_cl import CausalLMModule, Task, TaskStream, fit_stream
from lightning_cl.data import Encoder
from tests.helpers.models import tiny_llama, tiny_tokenizer
from tests.stream_tools import Stream, trainer

CHOICES = [{"prompt": f"row {i}?", "answer": ("yes", "no")[i % 2], "options": ["yes", "no"]} for i in range(7)]
TALKS = [
    {"messages": [{"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": f"hello {i}"}]}
    for i in range(5)
]
TEXTS = [{"text": "some ordinary words " * (1 + i % 3)} for i in range(6)]


def write(path: Path, rows: list[Any]) -> str:
    text = "\n".join(json.dumps(row) for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def test_files_lists_hub_datasets_and_streams_of_text(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    tasks = [
        Task("file", train=write(tmp_path / "a.jsonl.gz", CHOICES), test=CHOICES, metric="accuracy"),
        Task("hub", train=datasets.Dataset.from_list(TALKS), val=write(tmp_path / "b.jsonl", TALKS), metric="token_f1"),
        Task("stream", train=Stream(TEXTS), test=Stream(TEXTS), metric="loss"),
        Task("hub stream", train=datasets.Dataset.from_list(TEXTS).to_iterable_dataset(), test=TEXTS, metric="loss"),
        Task("general", test=TEXTS, role="probe", metric="loss"),
    ]
    module = CausalLMModule(tiny_llama(), tokenizer=tiny_tokenizer(), lr=1e-2, max_new_tokens=4)
    data = TaskStream(tasks, batch_size=4, max_length=64)
    matrix = fit_stream(trainer(tmp_path, max_epochs=1), module, data)
    assert len(matrix.scores()) == 5 * 5
    rows = {task: score.rows for (stage, task), score in matrix.scores().items() if stage == 0}
    assert rows == {"file": 7, "hub": 5, "stream": 6, "hub stream": 6, "general": 6}
    assert all(score.interval is not None for score in matrix.scores().values())
    assert matrix.mode_of("general") == "min"
    # What is scored does not depend on how the rows were given.
    same = matrix.score(0, "stream").value
    assert same == pytest.approx(matrix.score(0, "general").value, abs=1e-5)
    assert matrix.compute()["general_change"]["general"] is not None


def test_long_rows_are_reported_before_training(tmp_path: Path) -> None:
    module = CausalLMModule(tiny_llama(), tokenizer=tiny_tokenizer())
    long = [{"prompt": "word " * 40, "answer": "yes"}]
    data = TaskStream([Task("long", train=long)], batch_size=1, max_length=32)
    with pytest.warns(UserWarning, match=r"task 'long', train: 1 of 1 rows are longer than `max_length=32`"):
        fit_stream(trainer(tmp_path, max_steps=1), module, data)


def test_the_users_own_function_may_take_text_as_it_is() -> None:
    data = TaskStream([Task("a", train=TEXTS)], batch_size=2, shuffle=False, collate_fn=lambda rows: rows)
    assert next(iter(data.train_dataloader())) == TEXTS[:2]


def test_evaluation_batches_hold_rows_of_like_length() -> None:
    module = CausalLMModule(tiny_llama(), tokenizer=tiny_tokenizer())
    data = TaskStream([Task("a", train=TEXTS, val=TEXTS)], batch_size=2, tokenizer=module.tokenizer)
    widths = [batch["input_ids"].shape[1] for batch in data.val_dataloader()[0]]
    assert widths == sorted(widths, reverse=True)
    assert all(torch.is_tensor(batch["labels"]) for batch in data.train_dataloader())


def test_evaluation_rows_are_encoded_once_however_often_they_are_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    plain = Encoder.encode_eval

    def counted(self: Encoder, example: Any, metric: str | None = None) -> dict[str, Any]:
        encoded.append(example["prompt"])
        return plain(self, example, metric)

    monkeypatch.setattr(Encoder, "encode_eval", counted)
    tasks = [Task(name, train=CHOICES, test=CHOICES, metric="accuracy") for name in "ab"]
    module = CausalLMModule(tiny_llama(), tokenizer=tiny_tokenizer(), lr=1e-2)
    matrix = fit_stream(trainer(tmp_path, max_epochs=1), module, TaskStream(tasks, batch_size=4, max_length=64))
    assert len(matrix.scores()) == 3 * 2  # three rows of the matrix were evaluated
    assert sorted(encoded) == sorted(2 * [row["prompt"] for row in CHOICES])
