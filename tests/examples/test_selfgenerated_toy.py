# SPDX-License-Identifier: Apache-2.0
"""The paper's toy sequence, small: without replay the earlier tasks are lost, with the model's own samples they stay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from examples.selfgenerated_toy import BOS, EOS, SEPARATOR, TASKS, Size, Toy, loss_of, main, make_rows, run_sequence

SMALL = Size(width=48, digits=1, steps=200, batch=32, pool=256, rate=5e-3)


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_right(task: str) -> None:
    rows, question = make_rows(task, 64, 2, torch.Generator().manual_seed(0))
    for row in rows.tolist():
        assert (row[0], row[question - 1], row[-1]) == (BOS, SEPARATOR, EOS)
        asked, answered = [i - 4 for i in row[2 : question - 1]], [i - 4 for i in row[question:-1]]
        a, b = asked[0] + 10 * asked[1], asked[2] + 10 * asked[3]
        number = sum(digit * 10**i for i, digit in enumerate(answered))
        expected = {"add": a + b, "modular add": (a + b - 10 * (a % 10 + b % 10 > 9)) % 100}
        if task in expected:
            assert number == expected[task]
        else:
            assert answered == (asked[::-1] if task == "reverse" else sorted(asked))


def test_what_is_forgotten_does_not_count_which_task_comes_next() -> None:
    model = Toy(SMALL, 0)
    data, _ = make_rows("sort", 5, SMALL.digits, torch.Generator().manual_seed(10**6))
    with torch.no_grad():
        scores = model.model(input_ids=data).logits.log_softmax(-1)
    lost = [-scores[row, i - 1, data[row, i]] for row in range(5) for i in range(2, data.shape[1])]
    assert loss_of(model, ("sort",), 5) == pytest.approx(float(torch.stack(lost).mean()), rel=1e-5)


def test_self_generated_replay_keeps_the_first_task() -> None:
    result = run_sequence(SMALL, 0, "cpu", ("reverse", "sort"), ("none", "distillation"))
    assert result["none"]["stages"][0]["reverse"] > 0.95
    assert result["none"]["final"]["reverse"] < 0.7
    assert min(result["distillation"]["final"].values()) > 0.95
    assert 0 < result["distillation"]["generation_seconds"] < result["distillation"]["seconds"]


@pytest.mark.slow
def test_the_whole_sequence() -> None:
    size = Size(width=64, digits=1, steps=400, batch=32, pool=512, rate=4e-3)
    result = run_sequence(size, 0, "cpu")
    lost = [result["none"]["final"][name] for name in TASKS[:3]]
    assert max(lost) < 0.5
    assert min(result["distillation"]["final"].values()) > 0.95
    # At this size the model's own mistakes add up in hard labels (the paper's larger model: about 100 %).
    assert min(result["labels"]["final"].values()) > 0.4


@pytest.mark.slow
@pytest.mark.parametrize("study", ["sequence", "width", "tokens", "rate"])
def test_every_study_runs(tmp_path: Path, study: str) -> None:
    out = tmp_path / f"{study}.json"
    main(["--tiny", "--study", study, "--out", str(out), "--device", "cpu", "--steps", "10"])
    assert json.loads(out.read_text())["study"] == study
    assert (tmp_path / f"{study}.png").read_bytes().startswith(b"\x89PNG")
